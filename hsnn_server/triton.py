"""One Triton server on this machine: started, watched and stopped without leftovers."""

from __future__ import annotations

import http.client
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from clients.admin import RepositoryAdmin
from clients.tls import Tls
from hsnn_core.errors import ServerError

from .binaries import environment, find_wheel, lay_out
from .processes import (
    HOST,
    check_port_free,
    ended_like_ctrl_c,
    free_ports,
    launch,
    listening,
    remove_regions,
    wait_until,
)
from .state import ServerState, Urls, write_private
from .stubs import Dead, dead, make_newer
from .tls import ServerTls, own_tls
from .tracing import Tracing

# The paper's system never needs them over the network, and each would let a client read or change the server.
RESTRICTED = "model-repository,shared-memory,trace,logging"
_DRAIN_SECONDS = 10  # for requests in flight at the stop
_STOP_SECONDS = _DRAIN_SECONDS + 10
_SHARED_BYTES = (
    4 << 20
)  # a stub's region at its start (pages are only taken when used) and the steps it grows by
_LOG_LINES = 20
_LOOK_SECONDS = 2.0  # for the list of models
_ATTEMPTS = 3  # a free port may be taken between its choice and the server's start


class TritonServer:
    """Triton over ``repository`` with explicit model control, on loopback, as a context manager.

    >>> with TritonServer("repository", models=["hsnn_user_tower", "hsnn_retrieve"]) as server:
    ...     client = RetrievalClient(server.urls.grpc)

    ``models`` are loaded in their order, once the server answers. A port of 0 is replaced by a free one; a
    port in use is refused. ``threads``: threads of NumPy in each model, and of each network whose
    config.pbtxt does not set ``intra_op_thread_count``. ``log_file``: kept where it is; by default the log
    goes with the server. ``state_file``: written once the server is up and removed with it, for ``attach``.
    ``tracing``: off unless given. ``arguments``: further arguments of tritonserver. ``preload``: asked at every start
    for models to load, all in parallel, before the server answers; one that fails is left out, and loading it again
    says why. ``tls``: the gRPC address speaks TLS. Seconds: ``start_timeout`` until the server answers,
    ``load_timeout`` per model.

    Model control, shared memory, tracing and logging settings are refused without ``admin_key``. A new key
    is made for every server and kept in a file of mode 0600; Triton takes it as an argument only, so
    whoever may list this machine's processes can read it there (another reason why this server is for one
    machine's tests and demos).

    Failures are ServerErrors that end with the last lines of the server's log. Within ``with``, SIGTERM
    ends the block like Ctrl-C, so that the server is stopped then too.
    """

    def __init__(
        self,
        repository: str | Path,
        *,
        models: Sequence[str] = (),
        grpc_port: int = 0,
        http_port: int = 0,
        metrics_port: int = 0,
        threads: int = 1,
        log_file: str | Path | None = None,
        state_file: str | Path | None = None,
        tracing: Tracing | None = None,
        arguments: Sequence[str] = (),
        preload: Callable[[], Sequence[str]] = tuple,
        tls: ServerTls | None = None,
        start_timeout: float = 60.0,
        load_timeout: float = 120.0,
    ) -> None:
        self._repository = Path(repository).absolute()
        self._models = tuple(models)
        self._ports = {"grpc": grpc_port, "http": http_port, "metrics": metrics_port}
        self._threads = threads
        self._log_file = None if log_file is None else Path(log_file).absolute()
        self._state_file = None if state_file is None else Path(state_file).absolute()
        self._tracing = tracing
        self._arguments, self._preload = tuple(arguments), preload
        self._server_tls = tls
        self._start_timeout, self._load_timeout = start_timeout, load_timeout
        self._state: ServerState | None = None
        self._admin: RepositoryAdmin | None = None
        self._looked_at: frozenset[int] | None = None
        self._exit = ExitStack()

    @classmethod
    def start_detached(cls, repository: str | Path, state_file: str | Path, **options: Any) -> TritonServer:
        """Start a server that goes on after this process; ``attach(state_file)`` finds it. ``options``: as
        above."""
        server = cls(repository, state_file=state_file, **options)
        with ended_like_ctrl_c():
            server.start()
        return server

    @classmethod
    def attach(cls, state_file: str | Path) -> TritonServer:
        """The running server that wrote ``state_file``; ServerError (and no leftovers) when it is gone."""
        path = Path(state_file).absolute()
        state = ServerState.read(path)
        if not state.process.alive():
            state.end(0.0)
            path.unlink(missing_ok=True)
            raise ServerError(
                f"{path}: the server (process {state.process.pid}) is gone; its state file was removed, "
                "start it again"
            )
        server = cls(state.repository, state_file=path)
        server._state = state
        return server

    @property
    def urls(self) -> Urls:
        """Where it listens."""
        return self._running().urls

    @property
    def pid(self) -> int:
        return self._running().process.pid

    @property
    def pids(self) -> list[int]:
        """Its processes at this moment: the server, and a stub per model instance."""
        process = self._running().process
        return [process.pid, *process.children()]

    @property
    def region_prefix(self) -> str:
        """How the names of its regions in /dev/shm begin."""
        return self._running().region_prefix

    @property
    def log_file(self) -> Path:
        return self._running().log_file

    @property
    def key_file(self) -> Path:
        """The file (mode 0600) with the admin key, for commands that are given its path and not the key."""
        return self._running().key_file

    @property
    def admin_key(self) -> str:
        return self.key_file.read_text()

    @property
    def tls(self) -> Tls | None:
        """How to talk to its gRPC address from here, None: in plain text. Good for as long as the server runs."""
        return own_tls(self._running().directory)

    @property
    def admin(self) -> RepositoryAdmin:
        """Model control with this server's key, for as long as the server runs."""
        if self._admin is None:
            self._admin = RepositoryAdmin(self.urls.grpc, self.admin_key, self._load_timeout, self.tls)
        return self._admin

    def start(self) -> TritonServer:
        """Start, wait until the server answers and load the models; whatever fails leaves nothing behind."""
        if self._state is not None:
            raise ServerError(
                f"this server already runs as process {self.pid}; stop it before starting it again"
            )
        self._check_state_file()
        self._check_repository()
        for option, port in self._ports.items():
            if port:
                check_port_free(port, f"--{option}-port")
        attempts = _ATTEMPTS if 0 in self._ports.values() else 1
        try:
            while True:
                attempts -= 1
                try:
                    self._start_once()
                    break
                except _PortTaken:
                    if not attempts:
                        raise
                    self.stop()
            for model in self._models:
                self.load(model)
            if self._state_file is not None:
                self._running().write(self._state_file)
        except BaseException:
            self.stop()
            raise
        return self

    def alive(self) -> bool:
        """Whether its process runs; its models may be dead all the same."""
        return self._running().process.alive()

    def restart(self) -> None:
        """End the server at once, in whatever state it is, and start it again where it was: ports, key file, log
        file and state file stay, and /dev/shm is cleaned. Loaded are the models of ``preload`` alone. ServerError when
        it does not come up; then it can be tried again."""
        state = self._running()
        state.process.stop(0.0)
        remove_regions(state.region_prefix)
        ports = {option: int(getattr(state.urls, option).rpartition(":")[2]) for option in self._ports}
        self._launch(state.directory, ports, state.region_prefix, state.log_file)
        # The old server's channel has its certificates, and refuses calls until it has tried the new one. It is left to
        # whoever is using it: a rollout may be in the middle.
        self._admin = None
        if not wait_until(self._admin_answers, self._start_timeout):
            raise self._error(
                f"the server did not answer at {self.urls.grpc} within {self._start_timeout:g} s"
            )
        if self._state_file is not None:
            self._running().write(self._state_file)

    def _admin_answers(self) -> bool:
        try:
            self.admin.index()
        except ServerError:
            return False
        return True

    def revive(self, model: str, version: int) -> None:
        """Load a version whose Python stub has died once more, while all others go on serving: Triton never ends an
        unload of a dead one. ServerError when the load fails, or the repository can't be written."""
        make_newer(self._repository / model / str(version))
        self.load(model)

    def dead_models(self) -> list[Dead]:
        """The versions that Triton calls ready while a Python stub of theirs has died: calls of them fail.
        Those that are unloading without any: most have just ended, but of one that died it never says so.

        Costs next to nothing as long as no stub has come or gone since the last look. ServerError when the server
        does not answer."""
        living = frozenset(self._running().process.children())
        if living == self._looked_at:
            return []
        with RepositoryAdmin(self.urls.grpc, self.admin_key, _LOOK_SECONDS, self.tls) as admin:
            found = dead(admin.index, self._running().process.children, admin.instances)
        self._looked_at = None if found else living
        return found

    def load(self, model: str) -> None:
        """Load or reload ``model``; returns when it is ready. A new version that fails leaves the old one
        serving."""
        self._with_log(lambda: self.admin.load(model))

    def unload(self, model: str) -> None:
        """Unload ``model``; returns when it is gone."""
        self._with_log(lambda: self.admin.unload(model))

    def ready(self, model: str, version: int | None = None) -> bool:
        """Whether ``model`` (its newest version, or the given one) answers requests."""
        return self.admin.ready(model, version)

    def log_tail(self, lines: int = _LOG_LINES) -> str:
        """The last lines of the server's log, without its tables and its help text."""
        text = self._running().log_file.read_text(errors="replace").partition("Usage: tritonserver")[0]
        kept = [line for line in text.splitlines() if line.strip() and not line.startswith(("+--", "|"))]
        return "\n".join(kept[-lines:])

    def wait(self) -> None:
        """Block until Ctrl-C or, inside ``with``, SIGTERM; ServerError when the server ends by itself."""
        process = self._running().process
        try:
            while not wait_until(lambda: not process.alive(), 60.0, interval=0.2):
                pass
        except KeyboardInterrupt:
            return
        raise self._error(f"the server (process {process.pid}) ended by itself")

    def stop(self) -> None:
        """End the server and its stubs, remove its shared memory, its private files and its state file."""
        if self._admin is not None:
            self._admin.close()
            self._admin = None
        state, self._state = self._state, None
        if state is None:
            return
        try:
            state.end(_STOP_SECONDS)
        finally:
            if self._state_file is not None:
                self._state_file.unlink(missing_ok=True)

    def __enter__(self) -> TritonServer:
        with ExitStack() as stack:
            stack.enter_context(ended_like_ctrl_c())
            if self._state is None:
                self.start()
            stack.callback(self.stop)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def _start_once(self) -> None:
        wheel = find_wheel()
        directory = Path(tempfile.mkdtemp(prefix="hsnn-triton-"))
        try:
            write_private(directory / "admin.key", secrets.token_hex(16))
            lay_out(wheel, directory / "backends")
            # Python puts the working directory first on the stubs' module path: an empty one changes nothing.
            (directory / "empty").mkdir()
            free = iter(free_ports(len(self._ports)))
            ports = {option: port or next(free) for option, port in self._ports.items()}
            log = self._log_file or directory / "triton.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_bytes(b"")
            self._launch(directory, ports, f"hsnn-{secrets.token_hex(6)}-", log)
        except BaseException:
            if self._state is None:
                shutil.rmtree(directory, ignore_errors=True)
            raise

    def _launch(self, directory: Path, ports: Mapping[str, int], prefix: str, log: Path) -> None:
        """Start the process out of its private ``directory`` and wait until it answers."""
        wheel = find_wheel()
        command = [str(wheel.server), *self._options(directory, directory / "backends", ports, prefix)]
        variables = environment(wheel, self._threads)
        if self._tracing is not None:
            variables |= self._tracing.environment()
        process = launch(command, variables, directory / "empty", log)
        urls = Urls(**{option: f"{HOST}:{port}" for option, port in ports.items()})
        self._state = ServerState(process, urls, self._repository, directory, log, prefix)
        self._await_health(ports)

    def _options(
        self, directory: Path, backends: Path, ports: Mapping[str, int], region_prefix: str
    ) -> list[str]:
        key = (directory / "admin.key").read_text()
        options: dict[str, object] = {
            "model-repository": self._repository,
            "backend-directory": backends,
            "model-control-mode": "explicit",
            "strict-readiness": "false",  # one model that failed says nothing of the others: each has its own
            "exit-timeout-secs": _DRAIN_SECONDS,
            "log-format": "ISO8601",
            "grpc-restricted-protocol": f"{RESTRICTED}:admin-key={key}",
            "http-restricted-api": f"{RESTRICTED}:admin-key={key}",
        }
        if self._server_tls is not None:
            options |= self._server_tls.prepare(directory)
        for endpoint, port in ports.items():
            options |= {f"{endpoint}-address": HOST, f"{endpoint}-port": port}
        stubs = {
            "shm-region-prefix-name": region_prefix,
            "shm-default-byte-size": _SHARED_BYTES,
            "shm-growth-byte-size": _SHARED_BYTES,
        }
        return [
            "--disable-auto-complete-config",
            *(f"--{name}={value}" for name, value in options.items()),
            *(f"--backend-config=python,{name}={value}" for name, value in stubs.items()),
            *(self._tracing.arguments() if self._tracing is not None else ()),
            *self._arguments,
            *self._preloading(),
        ]

    def _preloading(self) -> list[str]:
        models = self._preload()
        parallel = ["--exit-on-error=false", f"--model-load-thread-count={len(models)}"] if models else []
        return [*parallel, *(f"--load-model={model}" for model in models)]

    def _await_health(self, ports: Mapping[str, int]) -> None:
        process = self._running().process
        address = self.urls.http

        def answers() -> bool:
            return _http_ready(address) and all(listening(port) for port in ports.values())

        seconds = self._start_timeout + self._load_timeout * bool(self._preload())
        if wait_until(lambda: not process.alive() or answers(), seconds, interval=0.05):
            if process.alive():
                return
            ended = self._error("the server ended while starting")
            raise _PortTaken(str(ended)) if "already in use" in str(ended) else ended
        raise self._error(f"the server did not answer within {seconds:g} s")

    def _check_state_file(self) -> None:
        if self._state_file is None or not self._state_file.exists():
            return
        state = ServerState.read(self._state_file)
        if state.process.alive():
            raise ServerError(
                f"{self._state_file}: a server is running already (process {state.process.pid}, "
                f"gRPC {state.urls.grpc}); stop that one first, or choose another state file"
            )
        state.end(0.0)
        self._state_file.unlink()

    def _check_repository(self) -> None:
        if not self._repository.is_dir():
            raise ServerError(
                f"{self._repository}: no such directory, expected a model repository; publish one first"
            )

    def _running(self) -> ServerState:
        if self._state is None:
            raise ServerError("the server does not run; start it, or use it inside its with block")
        return self._state

    def _with_log(self, call: Any) -> None:
        try:
            call()
        except ServerError as error:
            raise self._error(str(error)) from error

    def _error(self, what: str) -> ServerError:
        return ServerError(f"{what}\nThe last lines of {self.log_file}:\n{self.log_tail()}")


class _PortTaken(ServerError):
    """A port was free when it was chosen, but not when the server bound it."""


def _http_ready(address: str) -> bool:
    connection = http.client.HTTPConnection(address, timeout=1.0)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
