"""What a running server holds of a repository, and loading more of it without taking away what it serves with.

A reload makes a model hold the newest versions that lie on the disk and drops the others. So before one, no
orchestrator may still answer requests with networks that the reload would drop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from export import pbtxt
from export.pbtxt import CONFIG_FILE, ORCHESTRATOR
from export.repository import (
    CANARY,
    candidate,
    model_versions,
    orchestrator_directory,
    retire_rest,
    retire_snapshot,
    snapshot_models,
    snapshots,
    versions,
)
from export.smoke import Networks, replay
from hsnn_core.errors import PublishError

READY, UNLOADING = "READY", "UNLOADING"
DRAIN_SECONDS = 120.0  # for the last requests of a version that was replaced
_POLL = 0.05
_KEPT = "the server goes on with what it served. Publish a corrected snapshot, or roll this one back"


class Admin(Networks, Protocol):
    """Model control of a running server, and its networks."""

    def load(self, model: str) -> None:
        """Load or reload a model; returns when it is ready, raises with the server's message."""
        ...

    def unload(self, model: str) -> None:
        """Unload a model; returns when its last requests are answered."""
        ...

    def ready(self, model: str, version: int | None = None) -> bool:
        """Whether a version answers requests."""
        ...

    def states(self, model: str) -> dict[int, str]:
        """READY, LOADING, UNLOADING or UNAVAILABLE by version, of those that the server ever knew."""
        ...


def serving(admin: Admin, model: str = ORCHESTRATOR) -> set[int]:
    """The versions that take new requests."""
    return {version for version, state in admin.states(model).items() if state == READY}


def in_use(admin: Admin) -> set[int]:
    """The snapshots that take new requests or still answer old ones, a canary's included."""
    return {
        version
        for model in (ORCHESTRATOR, CANARY)
        for version, state in admin.states(model).items()
        if state != "UNAVAILABLE"
    }


def await_drained(admin: Admin, patience: float = DRAIN_SECONDS) -> None:
    """Wait until no orchestrator that was replaced still answers requests: it calls its networks.

    PublishError after `patience` seconds."""
    until = time.monotonic() + patience
    while True:
        left = [
            f"{model} version {version}"
            for model in (ORCHESTRATOR, CANARY)
            for version, state in admin.states(model).items()
            if state == UNLOADING
        ]
        if not left:
            return
        if time.monotonic() >= until:
            raise PublishError(
                f"{left[0]} still answers requests {patience:g} s after it was replaced, and needs its networks "
                "until then; see the server's log, then run the command again"
            )
        time.sleep(_POLL)


def load_model(what: str, model: str, version: int, repository: Path, admin: Admin) -> None:
    """Load `model` and see that it has `version`; PublishError begins with `what`, as in "snapshot 3"."""
    try:
        load_version(model, version, repository, admin)
    except Exception as error:
        raise PublishError(f"{what}: the server did not load {model}: {error}; {_KEPT}") from error


def load_version(model: str, version: int, repository: Path, admin: Admin) -> None:
    """Load `model` and see that it has `version`; what the server raises goes through."""
    admin.load(model)
    if not admin.ready(model, version):
        raise PublishError(f"version {version} is not ready; does the server serve {repository}?")


def load_networks(what: str, repository: Path, version: int, admin: Admin) -> None:
    """Load all models of a snapshot but the orchestrator, which warm up, and replay the smoke request on them.

    PublishError names the model, or how the answer differs from the one at export; nothing that serves was
    touched."""
    _make_room(repository, version, admin)
    await_drained(admin)
    *networks, _ = snapshot_models(repository, version)
    for model in networks:
        load_model(what, model, version, repository, admin)
    try:
        replay(orchestrator_directory(repository, version), version, admin)
    except Exception as error:
        raise PublishError(
            f"{what}: its networks do not answer the smoke request as at its export: {error}; {_KEPT}"
        ) from error


def retire_leftovers(repository: Path, admin: Admin | None) -> list[int]:
    """Finish killed rollbacks: what they left in place moves to `.retired` once no orchestrator of the server
    calls it. Returns their versions."""
    busy = set() if admin is None else in_use(admin)
    done = [s.version for s in snapshots(repository) if s.rolled_back and s.version not in busy]
    for version in done:
        retire_rest(repository, version)
    return done


def pushed_out(repository: Path, networks: Sequence[str], needed: set[int]) -> set[int]:
    """Those of the `needed` versions that a reload of these models would drop: newer ones lie on the disk."""
    found: set[int] = set()
    for model in networks:
        config = repository / model / CONFIG_FILE
        held = pbtxt.parse(config.read_text(), str(config)).version_policy.latest.num_versions
        found |= needed & set(model_versions(repository, model)[:-held])
    return found


def _make_room(repository: Path, version: int, admin: Admin) -> None:
    """Retire snapshots that were published and never served, where their networks would push out those of one
    that serves. PublishError instead when `version` is a candidate, which supersedes nothing."""
    needed = serving(admin) | {version}
    *networks, _ = snapshot_models(repository, version)
    dropped = pushed_out(repository, networks, needed)
    unserved = [n for n in versions(repository) if dropped and n > min(dropped) and n not in needed]
    if unserved and candidate(repository) == version:
        raise PublishError(
            f"candidate {version}: snapshot {unserved[-1]} is published and not served, and the server would drop the "
            f"networks of snapshot {min(dropped)}, which serves; withdraw the candidate, then promote snapshot "
            f"{unserved[-1]} or roll it back"
        )
    for number in unserved:
        retire_snapshot(repository, number)
