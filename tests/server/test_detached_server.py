"""Servers that outlive a command, and servers whose command is ended from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from server_checks import ended, regions
from tiny_repository import write_model

from hsnn_core.errors import ServerError
from hsnn_server import TritonServer

pytestmark = pytest.mark.triton

START = """
import sys
from hsnn_server import TritonServer
TritonServer.start_detached(sys.argv[1], sys.argv[2], models=["single"])
"""
FOREGROUND = """
import sys
from hsnn_server import TritonServer
try:
    with TritonServer(sys.argv[1], models=["single"]) as server:
        print(server.pid, server.region_prefix, flush=True)
        server.wait()
except KeyboardInterrupt:
    pass  # the signal came before wait(), which returns on it
print("stopped", flush=True)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_model(tmp_path / "repository", "single")
    return tmp_path / "repository"


def test_a_detached_server_is_found_and_stopped_by_another_process(repository: Path, tmp_path: Path) -> None:
    state = tmp_path / "server.json"
    subprocess.run([sys.executable, "-c", START, repository, state], check=True, timeout=60)
    server = TritonServer.attach(state)
    try:
        assert server.ready("single", 1)
        assert state.stat().st_mode & 0o777 == 0o600
        assert server.admin_key not in state.read_text()
        with pytest.raises(
            ServerError, match=rf"a server is running already \(process {server.pid}, gRPC 127"
        ):
            TritonServer.start_detached(repository, state)
        pid, prefix = server.pid, server.region_prefix
    finally:
        server.stop()
    assert ended(pid)
    assert not regions(prefix)
    assert not state.exists()


def test_a_killed_server_is_noticed_and_cleaned_up(repository: Path, tmp_path: Path) -> None:
    state = tmp_path / "server.json"
    server = TritonServer.start_detached(repository, state, models=["single"])
    pid, prefix = server.pid, server.region_prefix
    assert regions(prefix)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(
        ServerError, match=rf"the server \(process {pid}\) ended by itself[^$]*The last lines of"
    ):
        server.wait()
    with pytest.raises(
        ServerError, match=rf"the server \(process {pid}\) is gone; its state file was removed"
    ):
        TritonServer.attach(state)
    assert ended(pid)
    assert not regions(prefix)
    assert not state.exists()


def test_a_foreground_server_ends_with_its_command(repository: Path) -> None:
    command = [sys.executable, "-c", FOREGROUND, str(repository)]
    commands = {
        number: subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    servers = [process.stdout.readline().split() for process in commands.values() if process.stdout]
    for number, process in commands.items():
        process.send_signal(number)
    for process in commands.values():
        assert process.communicate(timeout=60) == ("stopped\n", None)
        assert process.returncode == 0
    for pid, prefix in servers:
        assert ended(int(pid))
        assert not regions(prefix)
