"""The operating system's side of a server: its processes, its ports, its shared memory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hsnn_core.errors import ServerError

HOST = "127.0.0.1"
SHARED_MEMORY = Path("/dev/shm")
_KILL_SECONDS = 5.0  # a killed process is gone at once, unless it hangs in the kernel


@dataclass(frozen=True)
class ServerProcess:
    """A process and the group it leads: the server and its Python stubs.

    ``started``: kernel ticks at its start, so that a later process with the same number is not mistaken for
    it.
    """

    pid: int
    started: int

    def alive(self) -> bool:
        self._reap()
        status = _status(self.pid)
        return status is not None and status.started == self.started and not status.dead

    def _reap(self) -> bool:
        """Whether nothing is left for this process to reap: a server that is dead stays in the system's table until
        its last thread has ended and its parent has asked."""
        status = _status(self.pid)
        if status is None or status.started != self.started:
            return True
        try:
            return os.waitpid(self.pid, os.WNOHANG)[0] == self.pid
        except ChildProcessError:  # started by another process: theirs to reap
            return True

    def children(self) -> list[int]:
        """The living processes of the group besides the leader."""
        leader = _status(self.pid)
        if leader is not None and leader.started != self.started:
            return []  # the number was given to a stranger, so the whole group had ended
        others = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return [pid for pid in others if pid != self.pid and _lives_in_group(pid, self.pid)]

    def stop(self, patience: float) -> None:
        """End the whole group: SIGTERM, and SIGKILL once the models are unloaded or ``patience`` s are over.

        All models are Python, each in a stub: when no stub is left there is nothing to wait for, while Triton
        itself would take a few more seconds over closing its ports.
        """
        try:
            if self.alive():
                os.kill(self.pid, signal.SIGTERM)
                wait_until(lambda: not self.alive() or not self.children(), patience)
        finally:
            if self.alive() or self.children():
                with suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            if not wait_until(
                lambda: self._reap() and not self.alive() and not self.children(), _KILL_SECONDS
            ):
                raise ServerError(
                    f"server process {self.pid} outlives SIGKILL; see its state in /proc/{self.pid}"
                )


def launch(
    command: Sequence[str], environment: Mapping[str, str], directory: Path, log: Path
) -> ServerProcess:
    """Start ``command`` as leader of its own session (a terminal's Ctrl-C is for its owner alone), appending to
    ``log``."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    status = _status(process.pid)
    if status is None:
        raise ServerError(f"{command[0]} vanished as it started; see {log}")
    process.returncode = 0  # ServerProcess looks after it from here, possibly beyond this process's life
    return ServerProcess(process.pid, status.started)


@contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Within, SIGTERM and a closed terminal raise KeyboardInterrupt, where they would end this process at
    once.

    Only in the main thread, which is the one signals go to, and only where the program has no handler of
    its own.
    """
    main = threading.current_thread() is threading.main_thread()
    signals = [signal.SIGTERM, signal.SIGHUP] if main else []
    changed = [number for number in signals if signal.getsignal(number) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def wait_until(condition: Callable[[], bool], seconds: float, interval: float = 0.02) -> bool:
    """Poll ``condition`` until it holds (True) or ``seconds`` are over (False)."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(interval)
    return True


def check_port_free(port: int, option: str) -> None:
    """ServerError naming ``option`` when something on this machine already listens on ``port``."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServerError(
                f"{option} {port}: {error.strerror}; stop what listens there, choose another port, "
                "or 0 for a free one"
            ) from error
        except OverflowError as error:
            raise ServerError(
                f"{option} {port}: expected a port from 1 to 65535, or 0 for a free one"
            ) from error


def free_ports(count: int) -> list[int]:
    """``count`` different ports on which nothing listens at this moment."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]


def listening(port: int) -> bool:
    """Whether something accepts connections on ``port``."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0


def remove_regions(prefix: str) -> None:
    """Remove the shared memory of Python stubs, which outlives a killed server."""
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Status:
    dead: bool
    group: int
    started: int


def _status(pid: int) -> _Status | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field, the name, may hold spaces and parentheses; proc(5) counts the others from its end.
    fields = text.rpartition(")")[2].split()
    return _Status(dead=fields[0] in "ZX", group=int(fields[2]), started=int(fields[19]))


def _lives_in_group(pid: int, group: int) -> bool:
    status = _status(pid)
    return status is not None and status.group == group and not status.dead
