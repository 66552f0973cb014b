"""Bringing a published snapshot into service, and taking the newest one out again.

Both work model by model through a server's explicit model control. Towers and scorers keep one version
more than the orchestrator, so whichever orchestrator answers during a rollout finds its own networks. What
is served after a restart is what `promote` would load: the newest complete snapshot.
"""

from __future__ import annotations

from pathlib import Path

from export.loading import (
    Admin,
    await_drained,
    load_model,
    load_networks,
    load_version,
    retire_leftovers,
    serving,
)
from export.pbtxt import ORCHESTRATOR
from export.repository import (
    LOCK_PATIENCE,
    candidate,
    locked,
    model_versions,
    move_version,
    retire_snapshot,
    snapshot_models,
    snapshots,
    versions,
)
from hsnn_core.errors import PublishError

__all__ = ["Admin", "promote", "rollback"]


def promote(repository: str | Path, admin: Admin) -> int:
    """Make a server serve the newest complete snapshot; return its version. A candidate is left alone (see
    `candidate.promote_candidate`).

    Towers, then scorers, which the server warms up; then the smoke request is replayed on them; then the
    orchestrator: its load is the commit. Whatever fails before, the server goes on serving the snapshot
    before, and PublishError names the model or how the answer differs."""
    repository = Path(repository)
    _newest(repository)
    with locked(repository, LOCK_PATIENCE):
        version = _newest(repository)
        what = f"snapshot {version}"
        *networks, _ = snapshot_models(repository, version)
        gone = serving(admin) - set(model_versions(repository, networks[0]))
        if gone and all(admin.ready(model, version) for model in networks):
            # Rolled back through another server of this repository. The networks' reload would drop those of
            # the snapshot that still serves here, so this time the orchestrator goes first.
            load_model(what, ORCHESTRATOR, version, repository, admin)
        load_networks(what, repository, version, admin)
        load_model(what, ORCHESTRATOR, version, repository, admin)
        finish(repository, version, admin)
    return version


def finish(repository: Path, version: int, admin: Admin) -> None:
    """After snapshot `version` took over: clear away what a killed rollback left, now that nothing calls it.
    Call with the lock."""
    begun = any(snapshot.rolled_back for snapshot in snapshots(repository))
    if begun and retire_leftovers(repository, admin, await_drained(admin)):
        *networks, _ = snapshot_models(repository, version)
        for model in networks:
            load_model(f"snapshot {version}", model, version, repository, admin)


def rollback(repository: str | Path, admin: Admin | None = None, version: int | None = None) -> int:
    """Take the newest snapshot out of service in the reverse order of its publishing; return the version that
    serves now. Its directories move to `.retired`; its number is not used again. Without `admin` only the
    files move, and so they do for a snapshot that the server does not serve yet. A rollback that was killed is
    finished, and nothing else is taken back.

    Raises PublishError when there is no earlier snapshot, when the newest is not `version` (None: whichever it
    is), when a candidate waits (its networks take the place
    of the earlier snapshot's), or when the server can't load the earlier one: the newest one is put back
    then."""
    repository = Path(repository)
    with locked(repository, LOCK_PATIENCE):
        if (waiting := candidate(repository)) is not None:
            raise PublishError(
                f"{repository}: candidate {waiting} waits there, and its networks take the place of an earlier "
                "snapshot's; withdraw the candidate first"
            )
        complete = versions(repository)
        begun = [snapshot.version for snapshot in snapshots(repository) if snapshot.rolled_back]
        if begun and complete:
            newest, previous = begun[-1], complete[-1]
        else:
            if len(complete) < 2:
                raise PublishError(
                    f"{repository}: complete snapshots {complete}, expected at least two: "
                    "rolling back needs an earlier one"
                )
            previous, newest = complete[-2:]
        if version not in (None, newest):
            raise PublishError(
                f"{repository}: the newest snapshot is {newest}, expected {version}: somebody else rolled out or back"
            )
        *networks, _ = snapshot_models(repository, previous)
        quiet: set[int] = set()
        now = set() if admin is None else serving(admin)
        if now and newest not in now and not begun:
            retire_snapshot(repository, newest)
            return max(now)
        if admin is not None:
            for model in networks:
                if not admin.ready(model, previous):
                    load_model(f"snapshot {previous}", model, previous, repository, admin)
        if not begun:
            move_version(repository, ORCHESTRATOR, newest, retire=True)
        if admin is not None:
            try:
                load_version(ORCHESTRATOR, previous, repository, admin)
            except Exception as error:
                if not begun:
                    move_version(repository, ORCHESTRATOR, newest, retire=False)
                state = "run it again" if begun else f"snapshot {newest} stays"
                raise PublishError(
                    f"rolling back snapshot {newest}: the server did not load {ORCHESTRATOR}: {error}; {state}"
                ) from error
            quiet = await_drained(admin)
        retire_leftovers(repository, admin, quiet)
        if admin is not None:
            for model in reversed(networks):
                try:
                    admin.load(model)
                except Exception as error:
                    raise PublishError(
                        f"rolling back snapshot {newest}: the server did not load {model}: {error}; snapshot "
                        f"{previous} serves, {model} needs to be loaded again"
                    ) from error
    return previous


def _newest(repository: Path) -> int:
    complete = versions(repository)
    if not complete:
        raise PublishError(f"{repository}: no complete snapshot there; publish one first")
    return complete[-1]
