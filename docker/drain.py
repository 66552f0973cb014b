"""End the models of a server that clients ask, so that it can be stopped: requests in flight are answered first.

Triton, told to end, refuses at once what models ask of each other, and with that every request in flight. Here the
orchestrator is unloaded while its networks still answer. Standard library only: the serving image runs this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ASKED = ("hsnn_retrieve", "hsnn_canary", "hsnn_index")
# A container's http_proxy is for the world outside; the key goes to this server alone.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def call(url: str, key: str, timeout: float) -> Any:
    """POST without a body; the JSON that comes back."""
    request = urllib.request.Request(url, data=b"", headers={"admin-key": key}, method="POST")
    with _DIRECT.open(request, timeout=timeout) as answer:
        return json.loads(answer.read() or b"null")


def drain(url: str, key: str, timeout: float) -> None:
    """Unload these models of the Triton at ``url`` and wait until they are gone, for ``timeout`` seconds at most.
    OSError when it does not answer."""
    until = time.monotonic() + timeout
    loaded = {
        model["name"] for model in call(f"{url}/v2/repository/index", key, timeout) if model.get("version")
    }
    with ThreadPoolExecutor(len(ASKED)) as pool:  # each call may wait for its model
        unload = (f"{url}/v2/repository/models/{name}/unload" for name in ASKED if name in loaded)
        list(pool.map(lambda address: call(address, key, timeout), unload))
    while time.monotonic() < until:
        states = call(f"{url}/v2/repository/index", key, timeout)
        if not any(m["name"] in ASKED and m.get("state") in ("READY", "UNLOADING") for m in states):
            return
        time.sleep(0.05)
    raise TimeoutError(f"{url}: requests were still under way after {timeout:g} s")


def main() -> int:
    """0: nothing is in flight any more; 1: it is, or the server did not answer, and why."""
    parser = argparse.ArgumentParser(prog="drain.py", description="End the models that clients ask.")
    parser.add_argument("--url", required=True, help="Triton's HTTP endpoint")
    parser.add_argument(
        "--key-file", type=Path, required=True, metavar="FILE", help="file with the admin key"
    )
    parser.add_argument(
        "--timeout", type=float, default=10.0, metavar="SECONDS", help="at most (default: %(default)s)"
    )
    options = parser.parse_args()
    try:
        drain(options.url, options.key_file.read_text().strip(), options.timeout)
    except (OSError, ValueError) as error:
        print(f"drain.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
