"""A real Triton that is killed in several ways, and brought back where it was."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread

import pytest
from certificates import Certificates
from server_checks import regions
from tiny_snapshot import TinySnapshot, tiny_users, write_configs, write_snapshot

from clients.retrieval import RetrievalClient
from hsnn_core.errors import DeadlineExceeded, HsnnError, ServerError
from hsnn_server.probe import HEALTHY, probe
from hsnn_server.processes import wait_until
from hsnn_server.state import ServerState
from hsnn_server.supervisor import Patience, Supervisor
from hsnn_server.triton import TritonServer

pytestmark = pytest.mark.triton

MODEL, VERSION = "hsnn_retrieve", 1


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> TinySnapshot:
    snapshot = write_snapshot(tmp_path_factory.mktemp("repository"), VERSION)
    write_configs(snapshot.root, snapshot.schema, {MODEL: {"mode": "in_process", "workers": "2"}})
    return snapshot


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def server(
    snapshot: TinySnapshot, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """Supervised while the tests run, with mutual TLS, which the supervisor's own calls need too; its lines are in
    ``server.lines``."""
    state = tmp_path_factory.mktemp("state") / "server.json"
    with TritonServer(
        snapshot.root, preload=lambda: [MODEL], state_file=state, tls=certificates.mutual()
    ) as running:
        ended, lines = Event(), []
        running.lines, running.state_path, running.reader = lines, state, certificates.reader()

        def start_again() -> int:
            running.restart()
            return VERSION

        supervisor = Supervisor(
            running, start_again, lambda: probe(running.urls.http, snapshot.root, 2.0),
            Patience(look=0.05, probe=0.2, failures=2, settled=0.4), lines.append,
        )  # fmt: skip
        thread = Thread(target=supervisor.run, args=[ended.is_set])
        thread.start()
        yield running
        ended.set()
        thread.join()


def recovered(server: TritonServer, snapshot: TinySnapshot, strike: Callable[[], None]) -> float:
    """Seconds from the strike until a client that was open before is answered again; it must be refused meanwhile."""
    time.sleep(1.0)  # what was before has settled
    with RetrievalClient(server.urls.grpc, timeout=0.5, tls=server.reader) as client:
        client.retrieve(tiny_users()[:1], timeout=30)
        strike()
        began = time.monotonic()
        errors: list[HsnnError] = []
        longest = 0.0
        while time.monotonic() - began < 60:
            asked = time.monotonic()
            try:
                client.retrieve(tiny_users()[:1])
                break
            except HsnnError as error:
                errors.append(error)
            longest = max(longest, time.monotonic() - asked)
            time.sleep(0.02)
        else:
            raise AssertionError(f"not answered in a minute: {errors[-1]}; {server.lines}")
        assert errors, "the strike was not noticed"
        assert all(type(error) in (ServerError, DeadlineExceeded) and error.status for error in errors)
        assert longest < 0.5 + 1.0, "a call outlived its timeout"
        return time.monotonic() - began


def stub(server: TritonServer) -> int:
    [pid] = [pid for pid in server.pids if pid != server.pid]
    return pid


def test_a_killed_stub_serves_again_on_its_own(server: TritonServer, snapshot: TinySnapshot) -> None:
    before, process = len(server.lines), server.pid
    assert probe(server.urls.http, snapshot.root).state == HEALTHY
    assert recovered(server, snapshot, lambda: os.kill(stub(server), signal.SIGKILL)) < 20
    assert server.pid == process, server.lines
    [line] = server.lines[before:]
    assert line.startswith("supervisor: the stub of hsnn_retrieve version 1 has died; loaded again in")


def test_a_killed_server_comes_back_where_it_was(server: TritonServer, snapshot: TinySnapshot) -> None:
    urls, key, process = server.urls, server.admin_key, server.pid
    assert recovered(server, snapshot, lambda: os.kill(process, signal.SIGKILL)) < 20
    assert server.urls == urls and server.admin_key == key and server.pid != process
    assert wait_until(lambda: ServerState.read(server.state_path).process.pid == server.pid, 5)
    assert len(regions(server.region_prefix)) == 1, "what the dead one left in /dev/shm is gone"


def test_a_stopped_server_is_started_again(server: TritonServer, snapshot: TinySnapshot) -> None:
    process = server.pid
    assert recovered(server, snapshot, lambda: os.kill(process, signal.SIGSTOP)) < 20
    assert server.pid != process and not Path(f"/proc/{process}").exists()


def test_a_model_that_was_never_there_is_not_revived(server: TritonServer) -> None:
    with pytest.raises(ServerError, match="no model file there to load again"):
        server.revive("hsnn_index", 1)
