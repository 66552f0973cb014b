"""hsnn serve as a person runs it: it serves, it is healthy, it brings back what is killed, it ends on SIGTERM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hsnn_cli.main import main
from hsnn_server.processes import free_ports
from hsnn_server.stubs import model_of


@pytest.mark.triton
def test_serve_brings_back_what_is_killed_and_ends_when_told(shop, tmp_path, capsys):
    repository, [port] = shop / "repository", free_ports(1)
    ports = ["--http-port", str(port), "--grpc-port", "0", "--metrics-port", "0"]
    serving = subprocess.Popen(
        [sys.executable, "-m", "hsnn_cli.main", "serve", "--repository", str(repository), *ports],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        lines = iter(serving.stdout.readline, "")
        assert re.match(r"serving version \d+: gRPC 127", next(lines))
        [key_file] = re.findall(r"--key-file (\S+)", next(lines))
        assert next(lines).startswith("ask it with: hsnn query")
        health = [
            "health",
            "--url",
            f"http://127.0.0.1:{port}",
            "--repository",
            str(repository),
            "--timeout",
            "20",
        ]
        assert main(health) == 0 and capsys.readouterr().out.startswith("healthy: version ")
        os.kill(_stub("hsnn_user_tower", Path(key_file).parent), signal.SIGKILL)
        assert re.match(
            r"supervisor: the stub of hsnn_user_tower version \d+ has died; loaded again in", next(lines)
        )
        assert main(health) == 0
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(30) == 0 and next(lines, None) is None
        assert not Path(key_file).exists()
    finally:
        serving.terminate()  # it takes its server along
        serving.wait(60)


def _stub(model: str, directory: Path) -> int:
    """Of the server whose private files are in ``directory``; its stubs' programs lie there."""
    for entry in Path("/proc").iterdir():
        named = (
            entry.name.isdigit() and (found := model_of(int(entry.name))) is not None and found[0] == model
        )
        if named and (entry / "cmdline").read_bytes().startswith(os.fsencode(directory)):
            return int(entry.name)
    raise AssertionError(f"no stub of {model} out of {directory}")
