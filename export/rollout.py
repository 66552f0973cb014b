"""Bringing a published snapshot into service, and taking the newest one out again.

Both work model by model through a server's explicit model control. Towers and scorers keep one version
more than the orchestrator, so whichever orchestrator answers during a rollout finds its own networks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from export.pbtxt import ORCHESTRATOR
from export.repository import locked, move_version, snapshot_models, versions
from export.smoke import Networks, replay
from hsnn_core.errors import PublishError

_KEPT = "the server goes on with what it served. Publish a corrected snapshot, or roll this one back"


class Admin(Networks, Protocol):
    """Model control of a running server, and its networks."""

    def load(self, model: str) -> None:
        """Load or reload a model; returns when it is ready, raises with the server's message."""
        ...

    def ready(self, model: str, version: int | None = None) -> bool:
        """Whether a version answers requests."""
        ...


def promote(repository: str | Path, admin: Admin) -> int:
    """Make a server serve the newest complete snapshot; return its version.

    Towers, then scorers, which the server warms up; then the smoke request is replayed on them; then the
    orchestrator: its load is the commit. Whatever fails before, the server goes on serving the snapshot
    before, and PublishError names the model or how the answer differs."""
    repository = Path(repository)
    version = _newest(repository)
    *networks, orchestrator = snapshot_models(repository, version)
    for model in networks:
        _load(repository, version, model, admin)
    try:
        replay(repository / orchestrator / str(version), version, admin)
    except Exception as error:
        raise PublishError(
            f"snapshot {version}: its networks do not answer the smoke request as at its export: {error}; "
            f"{_KEPT}"
        ) from error
    _load(repository, version, orchestrator, admin)
    return version


def _load(repository: Path, version: int, model: str, admin: Admin) -> None:
    try:
        admin.load(model)
        if not admin.ready(model, version):
            raise PublishError(f"version {version} is not ready; does the server serve {repository}?")
    except Exception as error:
        raise PublishError(
            f"snapshot {version}: the server did not load {model}: {error}; {_KEPT}"
        ) from error


def rollback(repository: str | Path, admin: Admin | None = None) -> int:
    """Take the newest snapshot out of service in the reverse order of its publishing; return the version that
    serves now. Its directories move to `.retired`; its number is not used again. Without `admin` only the
    files move.

    Raises PublishError when there is no earlier snapshot, or when the server can't load it: the newest one
    is put back then."""
    repository = Path(repository)
    with locked(repository):
        complete = versions(repository)
        if len(complete) < 2:
            raise PublishError(
                f"{repository}: complete snapshots {complete}, expected at least two: "
                "rolling back needs an earlier one"
            )
        previous, newest = complete[-2:]
        for model in reversed(snapshot_models(repository, newest)):
            move_version(repository, model, newest, retire=True)
            if admin is None:
                continue
            try:
                admin.load(model)
            except Exception as error:
                if model == ORCHESTRATOR:
                    move_version(repository, model, newest, retire=False)
                    state = f"snapshot {newest} stays"
                else:
                    state = f"snapshot {previous} serves, {model} needs to be loaded again"
                raise PublishError(
                    f"rolling back snapshot {newest}: the server did not load {model}: {error}; {state}"
                ) from error
    return previous


def _newest(repository: Path) -> int:
    complete = versions(repository)
    if not complete:
        raise PublishError(f"{repository}: no complete snapshot there; publish one first")
    return complete[-1]
