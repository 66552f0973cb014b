"""The parts of the local server that need no Triton: binaries, processes, ports, state files, the admin
client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients.admin import ModelVersion, RepositoryAdmin
from hsnn_core.errors import ServerError
from hsnn_server import TritonServer, binaries, processes
from hsnn_server.binaries import Wheel, environment, lay_out, wheel_at
from hsnn_server.processes import ServerProcess, check_port_free, free_ports, launch
from hsnn_server.state import ServerState, Urls, write_private
from hsnn_server.stubs import Dead, dead


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The files of a wheel, empty."""
    root = tmp_path / "site-packages" / "pytriton" / "tritonserver"
    (tmp_path / "site-packages" / "nvidia_pytriton.libs").mkdir(parents=True)
    for name in (
        "bin/tritonserver",
        "backends/python/libtriton_python.so",
        "backends/python/triton_python_backend_utils.py",
        "python_backend_stubs/3.11/triton_python_backend_stub",
        "python_backend_stubs/3.12/triton_python_backend_stub",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root.parent


def test_a_missing_wheel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ServerError, match="nvidia-pytriton, which is missing; install it.*nvidia-pytriton==0.7.0"
    ):
        binaries.find_wheel()


def test_a_python_without_a_stub_is_refused(package: Path) -> None:
    with pytest.raises(ServerError, match="no stub for Python 3.7, only for 3.11, 3.12"):
        wheel_at(package, "3.7")


def test_an_incomplete_wheel_names_the_missing_file(package: Path) -> None:
    (package / "tritonserver" / "bin" / "tritonserver").unlink()
    with pytest.raises(ServerError, match="is incomplete: .*/bin/tritonserver is missing; install it"):
        wheel_at(package, "3.11")


def test_a_missing_libpython_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(binaries, "_library_directories", lambda: iter([tmp_path]))
    with pytest.raises(ServerError, match=rf"found in none of {tmp_path}.*apt-get install libpython3\.\d+"):
        binaries._libpython_directory()


def test_the_backends_directory_has_the_stub_and_our_backends(package: Path, tmp_path: Path) -> None:
    target = lay_out(wheel_at(package, "3.12"), tmp_path / "backends")
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert files == [
        "onnxruntime/model.py",
        "onnxruntime/responses.py",
        "python/libtriton_python.so",
        "python/triton_python_backend_stub",
        "python/triton_python_backend_utils.py",
        "tensorrt/model.py",
        "tensorrt/responses.py",
    ]
    stub = target / "python" / "triton_python_backend_stub"
    assert stub.read_text().startswith("python_backend_stubs/3.12/")
    assert os.access(stub, os.X_OK)


def test_the_stub_finds_this_python_and_the_bundled_libraries(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    variables = environment(wheel_at(package, "3.11"), threads=3)
    assert variables["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    libraries = variables["LD_LIBRARY_PATH"].split(":")
    assert libraries[0] == str(package.parent / "nvidia_pytriton.libs")
    assert libraries[-1] == "/mine"
    assert variables["OMP_NUM_THREADS"] == "3"


def test_a_python_without_its_usual_name_is_refused(
    package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel: Wheel = wheel_at(package, "3.11")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python-of-mine"))
    with pytest.raises(ServerError, match=f"{tmp_path} has no python3.*run from a virtual environment"):
        environment(wheel, threads=1)


def test_a_port_in_use_names_the_option() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ServerError, match=f"--grpc-port {port}: Address already in use; stop what listens"
        ):
            check_port_free(port, "--grpc-port")
        with pytest.raises(ServerError, match=f"--http-port {port}: Address already in use"):
            TritonServer(".", http_port=port).start()
    check_port_free(port, "--grpc-port")
    with pytest.raises(ServerError, match="--grpc-port 65536: expected a port from 1 to 65535"):
        check_port_free(65536, "--grpc-port")


def test_free_ports_differ() -> None:
    assert len(set(free_ports(8))) == 8


def test_a_repository_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="absent: no such directory, expected a model repository; publish"):
        TritonServer(tmp_path / "absent").start()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[ServerProcess]:
    """A process with a child in its group, both of which ignore SIGTERM."""
    script = "trap '' TERM; sleep 60 & wait; sleep 60"
    process = launch(["sh", "-c", script], os.environ, tmp_path, tmp_path / "log")
    assert processes.wait_until(lambda: bool(process.children()), 5)
    yield process
    process.stop(0.0)


def test_a_group_that_ignores_sigterm_is_killed(shell: ServerProcess) -> None:
    assert shell.alive()
    shell.stop(patience=0.1)
    assert not shell.alive()
    assert shell.children() == []


def test_children_of_a_killed_leader_are_ended(shell: ServerProcess) -> None:
    os.kill(shell.pid, signal.SIGKILL)
    assert processes.wait_until(lambda: not shell.alive(), 5)
    assert shell.children()
    shell.stop(patience=5.0)
    assert shell.children() == []


def test_a_stranger_with_the_same_number_is_left_alone(shell: ServerProcess) -> None:
    earlier = ServerProcess(shell.pid, shell.started - 1)
    assert not earlier.alive()
    earlier.stop(0.0)
    assert shell.alive()


@pytest.fixture
def state(tmp_path: Path) -> ServerState:
    """That of a server which ended, leaving its private files."""
    (tmp_path / "private").mkdir()
    with subprocess.Popen(["true"]) as gone:
        pass
    urls = Urls("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")
    private = tmp_path / "private"
    return ServerState(
        ServerProcess(gone.pid, 1), urls, tmp_path, private, private / "triton.log", "hsnn-of-nobody-"
    )


def test_a_state_file_reads_back_and_is_private(state: ServerState, tmp_path: Path) -> None:
    path = tmp_path / "run" / "server.json"
    state.write(path)
    assert ServerState.read(path) == state
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["server.json"]


def test_attaching_to_a_server_that_is_gone_removes_its_files(state: ServerState, tmp_path: Path) -> None:
    path, region = tmp_path / "server.json", processes.SHARED_MEMORY / "hsnn-of-nobody-1"
    state.write(path)
    region.write_bytes(b"")
    with pytest.raises(ServerError, match=rf"server \(process {state.process.pid}\) is gone.*start it again"):
        TritonServer.attach(path)
    assert not path.exists()
    assert not region.exists()
    assert not state.directory.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not the state of a server"),
        ("{}", r"not the state of a server \(KeyError"),
        ("[]", r"not the state of a server \(TypeError"),
        ('{"format_version": 9}', "format version 9, expected 1"),
    ],
)
def test_a_damaged_state_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "server.json").write_text(text)
    with pytest.raises(ServerError, match=message):
        TritonServer.attach(tmp_path / "server.json")


def test_a_missing_state_file_says_that_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="no such file, so no server was left running there"):
        TritonServer.attach(tmp_path / "server.json")


def test_a_failed_private_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_private(tmp_path / "admin.key", "key")
    assert list(tmp_path.iterdir()) == []


def test_an_admin_call_to_nobody_says_so() -> None:
    port = free_ports(1)[0]
    admin = RepositoryAdmin(f"127.0.0.1:{port}", "key", timeout=2.0)
    with admin, pytest.raises(ServerError, match=f"127.0.0.1:{port}: can't load m: no server answers there"):
        admin.load("m")


def one_instance(model: str, version: int) -> int:
    return 1


def test_what_a_rollout_loads_and_unloads_meanwhile_is_not_dead(tmp_path: Path) -> None:
    """The looks at Triton's index and at the processes are not at one moment."""
    looks = [
        [ModelVersion("old", 1, "READY", ""), ModelVersion("died", 2, "READY", "")],
        [ModelVersion("old", 1, "UNLOADING", ""), ModelVersion("died", 2, "READY", ""),
         ModelVersion("new", 3, "READY", "")],
    ]  # fmt: skip
    assert dead(lambda: looks.pop(0), list, one_instance) == [Dead("died", 2)]


def test_one_look_is_enough_where_every_stub_lives() -> None:
    looks = [[ModelVersion("absent", None, "", ""), ModelVersion("failed", 1, "UNAVAILABLE", "why")]]
    assert dead(lambda: looks.pop(0), list, one_instance) == []


def test_each_instance_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    stubs = {1: ("tower", 4), 2: ("tower", 4), 3: ("scorer", 4), 4: None}
    monkeypatch.setattr("hsnn_server.stubs.model_of", stubs.get)
    entries = [ModelVersion("tower", 4, "READY", ""), ModelVersion("scorer", 4, "READY", "")]
    two = {"tower": 2, "scorer": 2}
    found = dead(lambda: entries, lambda: stubs, lambda model, version: two[model])
    assert found == [Dead("scorer", 4)]


def test_what_is_unloading_without_a_stub_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several instances may have ended already, and what has ended in the second look was only about to."""
    monkeypatch.setattr("hsnn_server.stubs.model_of", {1: ("drains", 2)}.get)
    looks = [
        [ModelVersion(name, 2, "UNLOADING", "") for name in ("drains", "ends", "died")],
        [ModelVersion("drains", 2, "UNLOADING", ""), ModelVersion("ends", 2, "UNAVAILABLE", "unloaded"),
         ModelVersion("died", 2, "UNLOADING", "")],
    ]  # fmt: skip
    assert dead(lambda: looks.pop(0), lambda: [1], one_instance) == [Dead("died", 2, unloading=True)]
