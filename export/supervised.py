"""A local server of a repository under supervision: what is loaded when it starts anew, and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from export.loading import pushed_out
from export.pbtxt import ORCHESTRATOR
from export.repository import model_versions, snapshot_models, versions
from export.rollout import promote
from hsnn_core.errors import ServerError
from hsnn_server.probe import Verdict, probe
from hsnn_server.stubs import Dead
from hsnn_server.supervisor import PATIENCE, Patience, Supervisor
from hsnn_server.triton import TritonServer

PROBE_SECONDS = 2.0  # on a machine that is busy with other things, an answer may well take one


def models(repository: Path) -> list[str]:
    """The models of the newest complete snapshot; none where there is none. For `TritonServer`'s ``preload``: all at
    once, while `promote` loads one after the other, which takes twice as long. What `promote` checks is checked all
    the same, when it finds them loaded."""
    newest = versions(repository)[-1:]
    return [model for version in newest for model in snapshot_models(repository, version)]


@dataclass(frozen=True)
class Served:
    """A server as its supervisor sees it: what would load more than the version that died is not loaded again."""

    server: TritonServer
    repository: Path

    def alive(self) -> bool:
        return self.server.alive()

    def dead_models(self) -> list[Dead]:
        return self.server.dead_models()

    def revive(self, model: str, version: int) -> None:
        """ServerError where a load would bring up newer versions in its place: a snapshot that was published and not
        promoted, whose orchestrator would serve without its networks."""
        newest = max(model_versions(self.repository, model), default=None)
        if (model == ORCHESTRATOR and newest != version) or pushed_out(self.repository, [model], {version}):
            raise ServerError(
                f"{self.repository}: version {newest} of {model} is the newest there, so a load would not bring back "
                f"{version}"
            )
        self.server.revive(model, version)


def supervisor(
    server: TritonServer,
    repository: Path,
    patience: Patience = PATIENCE,
    say: Callable[[str], None] = print,
    admit: Callable[[], None] | None = None,
) -> Supervisor:
    """One for a running ``server`` of ``repository``, which promotes its newest snapshot whenever it started again.
    ``admit`` is called before that, and raises what it has against the snapshot."""

    def start_again() -> int:
        if admit is not None:
            admit()
        server.restart()
        return promote(repository, server.admin)

    def ask() -> Verdict:
        return probe(server.urls.http, repository, PROBE_SECONDS, metrics=server.urls.metrics)

    return Supervisor(Served(server, repository), start_again, ask, patience, say)


@contextmanager
def supervised(
    server: TritonServer,
    repository: Path,
    patience: Patience = PATIENCE,
    say: Callable[[str], None] = print,
) -> Iterator[None]:
    """Within the block a thread supervises a running ``server``. What made it give up is raised at the end."""
    watching, ended = supervisor(server, repository, patience, say), Event()
    failures: list[BaseException] = []

    def watch() -> None:
        try:
            watching.run(ended.is_set)
        except BaseException as error:
            say(f"supervisor: gave up: {error}")
            failures.append(error)

    thread = Thread(target=watch, name="hsnn-supervisor", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if failures:
        raise failures[0]
