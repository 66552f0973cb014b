"""Does a server answer? The smoke request of the snapshot that it serves, over HTTP, and a look at what comes back.

Standard library only: the serving image runs this file as it is, `python probe.py --url ... --repository ...`. One
user's request is asked, so a probe costs as much as any request.

A server that refuses because it is busy (QueueFull, DeadlineUnmeetable, DeadlineExceeded) is alive. Who restarts what
fails must not restart that one, or an overload would take away what is left: `--live` counts it as success.
"""

from __future__ import annotations

import argparse
import ast
import http.client
import json
import math
import re
import socket
import sqlite3
import struct
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MODEL = "hsnn_retrieve"
HEALTHY, BUSY, WRONG, DEAD = "healthy", "busy", "wrong", "dead"
TIMEOUT = 1.0  # seconds
# Of a probability. TensorRT multiplies float32 in TF32, which has 10 bits of mantissa.
TOLERANCE = 5e-3
_REFUSALS = ("QueueFull", "DeadlineUnmeetable", "DeadlineExceeded")
_ATTEMPTS = 2  # a rollout may change the served version between the two calls of a probe
_WIRE = {"<f4": ("FP32", "f"), "<i8": ("INT64", "q"), "<i4": ("INT32", "i"), "<f8": ("FP64", "d")}
_FORMATS = dict(_WIRE.values())


@dataclass(frozen=True)
class Verdict:
    """What one probe found: ``state`` HEALTHY; BUSY (it refused, clearly and in time); WRONG (it answered, but not as
    its snapshot does); DEAD (anything else, no answer included). ``reason``: one line; ``seconds``: what it took."""

    state: str
    reason: str
    seconds: float

    @property
    def alive(self) -> bool:
        """Whether restarting could only do harm."""
        return self.state != DEAD

    def __str__(self) -> str:
        return f"{self.state}: {self.reason} ({1000 * self.seconds:.0f} ms)"


class _Unanswered(Exception):
    """The verdict, as an exception: (state, reason)."""


@dataclass(frozen=True)
class _Array:
    """An array of a .npy file, not decoded: its type's name in NumPy, shape, and bytes in C order."""

    kind: str
    shape: tuple[int, ...]
    data: bytes

    def first(self) -> tuple[float, ...]:
        """The values of its first row."""
        code = _WIRE[self.kind][1]
        count = math.prod(self.shape[1:])
        return struct.unpack_from(f"<{count}{code}", self.data)


def probe(url: str, repository: str | Path, timeout: float = TIMEOUT) -> Verdict:
    """Ask the server at ``url`` (http://host:port) that serves ``repository`` its smoke request once; never raises for
    what a server or a repository may be like. Takes at most ``timeout`` seconds; the server is told a tenth less."""
    began = time.monotonic()
    try:
        reason = _Probe(url, Path(repository), began + timeout, timeout).run()
        state = HEALTHY
    except _Unanswered as found:
        state, reason = found.args
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        state, reason = WRONG, f"what answers at {url} is not the {MODEL} of {repository} ({error!r})"
    return Verdict(state, reason, time.monotonic() - began)


class _Probe:
    def __init__(self, url: str, repository: Path, until: float, timeout: float) -> None:
        address = urlsplit(url if "//" in url else f"http://{url}")
        if address.scheme != "http" or not address.hostname:
            raise _Unanswered(DEAD, f"--url {url}: expected http://host:port, Triton's HTTP endpoint")
        self._host, self._port = address.hostname, address.port or 8000
        self._repository, self._until, self._timeout = repository, until, timeout

    def run(self) -> str:
        for attempt in range(_ATTEMPTS):
            version = self._served()
            smoke = self._smoke(version)
            if smoke is None:
                continue
            status, headers, body = self._call(*self._request(smoke))
            if status != 200:
                self._refused(status, body)
            answer, tensors = _decoded(headers, body)
            if int(answer["model_version"]) == version or attempt == _ATTEMPTS - 1:
                return self._checked(version, tensors, smoke)
        raise _Unanswered(
            DEAD,
            f"version {version} of {MODEL} is served, but {self._directory(version)} has no smoke.npz; expected "
            "--repository to be the one that is served",
        )

    def _served(self) -> int:
        status, _, body = self._call("GET", f"/v2/models/{MODEL}")
        if status != 200:
            self._refused(status, body)
        versions = [int(version) for version in json.loads(body).get("versions", [])]
        if not versions:
            raise _Unanswered(DEAD, f"no version of {MODEL} is loaded")
        return max(versions)

    def _directory(self, version: int) -> Path:
        return self._repository / MODEL / str(version)

    def _smoke(self, version: int) -> dict[str, _Array] | None:
        """The arrays of the version's smoke.npz; None when it is gone (it was rolled back this moment)."""
        path = self._directory(version) / "smoke.npz"
        try:
            with zipfile.ZipFile(path) as archive:
                return {Path(name).stem: _array(archive.read(name)) for name in archive.namelist()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, struct.error, zipfile.BadZipFile) as error:
            raise _Unanswered(DEAD, f"{path}: not readable as the smoke request ({error!r})") from error

    def _request(self, smoke: Mapping[str, _Array]) -> tuple[str, str, bytes, dict[str, str]]:
        inputs, parts = [], []
        for name, array in smoke.items():
            if not name.startswith("user."):
                continue
            data = array.data[: len(array.data) // array.shape[0]]  # the first user's
            inputs.append({
                "name": name.removeprefix("user."), "shape": [1, *array.shape[1:]],
                "datatype": _WIRE[array.kind][0], "parameters": {"binary_data_size": len(data)},
            })  # fmt: skip
            parts.append(data)
        # Told less than it waits for: a connection that closes as the answer comes may keep the request in Triton.
        left = max(1, int(0.9e6 * (self._until - time.monotonic())))
        names = ("item_ids", "probabilities", "rank_score", "valid")
        outputs = [{"name": name, "parameters": {"binary_data": True}} for name in names]
        head = json.dumps({"inputs": inputs, "outputs": outputs, "parameters": {"timeout": left}}).encode()
        headers = {
            "Inference-Header-Content-Length": str(len(head)),
            "Content-Type": "application/octet-stream",
        }
        return "POST", f"/v2/models/{MODEL}/infer", head + b"".join(parts), headers

    def _call(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        left = self._until - time.monotonic()
        late = f"no answer within {self._timeout:g} s"
        if left <= 0:
            raise _Unanswered(DEAD, late)
        connection = http.client.HTTPConnection(self._host, self._port, timeout=left)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        except TimeoutError as error:
            raise _Unanswered(DEAD, late) from error
        except (OSError, http.client.HTTPException, socket.gaierror) as error:
            raise _Unanswered(DEAD, f"nobody answers at {self._host}:{self._port} ({error})") from error
        finally:
            connection.close()

    def _refused(self, status: int, body: bytes) -> None:
        try:
            text = str(json.loads(body)["error"])
        except (ValueError, KeyError, TypeError):
            text = body[:200].decode(errors="replace")
        text = " ".join(text.split())
        if text.partition(":")[0] in _REFUSALS:
            raise _Unanswered(BUSY, f"it refused the smoke request: {text}")
        raise _Unanswered(DEAD, f"HTTP {status}: {text}")

    def _checked(self, version: int, answer: Mapping[str, _Array], smoke: Mapping[str, _Array]) -> str:
        tensors = {name: array.first() for name, array in answer.items()}
        count = int(tensors["valid"][0])
        tasks = answer["probabilities"].shape[-1]
        items = [int(item) for item in tensors["item_ids"][:count]]
        scores = tensors["rank_score"][:count]
        rows = _rows(tensors["probabilities"], tasks)[:count]
        sound = all(0 <= value <= 1 for row in rows for value in row) and all(map(math.isfinite, scores))
        if not sound or list(scores) != sorted(scores, reverse=True) or len(set(items)) != count:
            raise _Unanswered(
                WRONG,
                f"version {version} answers {count} items that are no ranking; expected different items, finite "
                "scores in descending order and probabilities from 0 to 1: see the server's log, roll back",
            )
        expected = dict(
            zip(map(int, smoke["item_ids"].first()), _rows(smoke["probabilities"].first(), tasks))
        )
        gaps = [
            max(abs(a - b) for a, b in zip(row, expected[item]))
            for item, row in zip(items, rows)
            if item in expected
        ]
        same = sum(gap <= TOLERANCE for gap in gaps)
        if 2 * same < len(gaps) and not _items_changed(self._repository, self._directory(version)):
            raise _Unanswered(
                WRONG,
                f"version {version} answers {same} of {len(gaps)} items with the probabilities of its snapshot (within "
                f"{TOLERANCE:g}), expected at least half of them, as no item has changed since: roll back",
            )
        return f"version {version} answers {count} items, {same} of them as at its export"


def _rows(values: Sequence[float], width: int) -> list[Sequence[float]]:
    return [values[start : start + width] for start in range(0, len(values), width)]


def _array(content: bytes) -> _Array:
    """A .npy file (format 1 to 3), as NumPy documents it."""
    if content[:6] != b"\x93NUMPY":
        raise ValueError("not a .npy file")
    wide = content[6] >= 2
    (length,) = struct.unpack_from("<I" if wide else "<H", content, 8)
    start = (12 if wide else 10) + length
    head = ast.literal_eval(content[12 if wide else 10 : start].decode())
    if head["fortran_order"] or head["descr"] not in _WIRE:
        raise ValueError(f"an array of {head['descr']}, expected one of {sorted(_WIRE)} in C order")
    return _Array(head["descr"], tuple(head["shape"]), content[start:])


def _decoded(headers: http.client.HTTPMessage, body: bytes) -> tuple[dict[str, Any], dict[str, _Array]]:
    """The JSON of an answer and its tensors; _Unanswered(WRONG) when they are not what was asked for."""
    kinds = {wire: kind for kind, (wire, _) in _WIRE.items()}
    try:
        at = int(headers["Inference-Header-Content-Length"])
        answer = json.loads(body[:at])
        tensors = {}
        for output in answer["outputs"]:
            size = output["parameters"]["binary_data_size"]
            array = _Array(kinds[output["datatype"]], tuple(output["shape"]), body[at : at + size])
            if len(array.data) != math.prod(array.shape) * struct.calcsize(_FORMATS[output["datatype"]]):
                raise ValueError(f"{output['name']}: {size} bytes do not fit {array.shape}")
            tensors[output["name"]] = array
            at += size
        return answer, {name: tensors[name] for name in ("item_ids", "probabilities", "rank_score", "valid")}
    except (ValueError, KeyError, TypeError) as error:
        raise _Unanswered(WRONG, f"the answer is not one of {MODEL} ({error!r})") from error


def _items_changed(repository: Path, directory: Path) -> bool:
    """Whether the item log has updates that the snapshot of ``directory`` does not contain; where that can't be read,
    it may."""
    try:
        text = (repository / MODEL / "config.pbtxt").read_text()
        found = re.search(r'key:\s*"item_log"\s*value\s*{\s*string_value:\s*"([^"]*)"', text)
        log = repository / (found.group(1) if found else ".items/log.db")
        if not log.exists():
            return False
        contained = json.loads((directory / "manifest.json").read_text()).get("log_position", 0)
        database = sqlite3.connect(f"{log.absolute().as_uri()}?mode=ro", uri=True, timeout=0.1)
        try:
            (position,) = database.execute("SELECT coalesce(max(position), 0) FROM items").fetchone()
        finally:
            database.close()
        return bool(position > contained)
    except (OSError, ValueError, sqlite3.Error):
        return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this file as a command, and of `hsnn health`."""
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="Triton's HTTP endpoint (default: %(default)s)"
    )
    parser.add_argument(
        "--repository", type=Path, required=True, metavar="DIR", help="the model repository it serves"
    )
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="SECONDS",
                        help="for the whole probe, the server is told (default: %(default)s)")  # fmt: skip
    parser.add_argument("--live", action="store_true", help="for what restarts it: a server that refuses as it is "
                        "busy, or answers wrongly, is alive")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Probe and print one line; 0: healthy (with --live: alive), 1: not."""
    verdict = probe(options.url, options.repository, options.timeout)
    print(verdict)
    return 0 if verdict.state == HEALTHY or (options.live and verdict.alive) else 1


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(
        prog="probe.py", description="Ask a server its smoke request; exit with 0 when it answers."
    )
    add_arguments(arguments)
    sys.exit(run(arguments.parse_args()))
