"""What a running server holds of a repository, and loading more of it without taking away what it serves with.

A reload makes a model hold the newest versions that lie on the disk and drops the others. So before one, no
orchestrator may still answer requests with networks that the reload would drop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

from export import pbtxt
from export.pbtxt import CONFIG_FILE, INDEX, ORCHESTRATOR
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

_LOG = logging.getLogger(__name__)
READY, UNLOADING = "READY", "UNLOADING"
# For the last requests of a version that was replaced, as long as it calls its networks.
DRAIN_SECONDS = 120.0
# Without a call of its networks: no request takes a third of that from one call to the next.
QUIET_SECONDS = 15.0
_POLL, _LONGEST_POLL = 0.05, 0.5
_NOT_NETWORKS = (ORCHESTRATOR, CANARY, INDEX)
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

    def calls_of(self, version: int) -> dict[str, int]:
        """Calls so far of this version of every model that has it ready, those that failed included."""
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


def await_drained(admin: Admin) -> set[int]:
    """Wait until no orchestrator that was replaced still answers requests: it calls its networks.

    Triton may never end an unload. So a version whose networks nobody has called for QUIET_SECONDS is passed over, with
    a warning; returns those versions. PublishError when networks are still called after DRAIN_SECONDS. Networks of
    a version that also serves are not waited for: they stay."""
    began = since = time.monotonic()
    poll = _POLL
    before: dict[int, dict[str, int]] | None = None
    while True:
        states = [(model, admin.states(model)) for model in (ORCHESTRATOR, CANARY)]
        ready = {version for _, of in states for version, state in of.items() if state == READY}
        left = [
            (model, version)
            for model, of in states
            for version, state in of.items()
            if state == UNLOADING and version not in ready
        ]
        if not left:
            return set()
        stuck = {version for _, version in left}
        calls = {version: _network_calls(admin, version) for version in stuck}
        now = time.monotonic()
        if calls != before:
            before, since = calls, now
        named = " and ".join(f"{model} version {version}" for model, version in left)
        if now - since >= QUIET_SECONDS:
            _LOG.warning(
                "%s did not end unloading and called no network for %g s: it is not waited for. If hsnn rollout "
                "status goes on showing it, its memory stays taken until the server is started again",
                named,
                QUIET_SECONDS,
            )
            return stuck
        if now - began >= DRAIN_SECONDS:
            raise PublishError(
                f"{named} still answers requests {DRAIN_SECONDS:g} s after it was replaced: calls of its networks were "
                "counted, and it needs them until then; see the server's log, then run the command again"
            )
        time.sleep(poll)
        poll = min(2 * poll, _LONGEST_POLL)


def _network_calls(admin: Admin, version: int) -> dict[str, int]:
    return {model: count for model, count in admin.calls_of(version).items() if model not in _NOT_NETWORKS}


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


def retire_leftovers(repository: Path, admin: Admin | None, quiet: Collection[int] = ()) -> list[int]:
    """Finish killed rollbacks: what they left in place moves to `.retired` once no orchestrator of the server
    calls it; `quiet`: versions that do not, whatever the server says (`await_drained`). Returns their versions."""
    busy = set() if admin is None else in_use(admin).difference(quiet)
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
