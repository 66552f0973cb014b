"""Removing what nothing serves any more, so that a repository does not grow with every rollout."""

from __future__ import annotations

import shutil
from pathlib import Path

from export.loading import Admin, in_use, retire_leftovers
from export.pbtxt import ORCHESTRATOR
from export.repository import (
    LOCK_PATIENCE,
    RETIRED,
    locked,
    next_version,
    recover,
    remove_version,
    repository_models,
    retired_versions,
    snapshot_models,
    snapshots,
)
from hsnn_core.errors import PublishError


def retire(repository: str | Path, admin: Admin, keep: int = 2) -> list[int]:
    """Remove the snapshots from disk that nothing needs; return their versions, ascending.

    Kept are the newest `keep` complete ones (with 2, the one in service and one to roll back to), the candidate, and
    whatever the server uses, a replaced orchestrator's last requests included. What was rolled back goes. Numbers
    are not used again. PublishError for a `keep` below 1."""
    repository = Path(repository)
    if keep < 1:
        raise PublishError(f"keep is {keep}, expected at least 1: the snapshot that serves")
    with locked(repository, LOCK_PATIENCE):
        recover(repository)
        retire_leftovers(repository, admin)
        busy = in_use(admin)
        found = snapshots(repository)
        complete = [snapshot.version for snapshot in found if snapshot.complete]
        removed = set()
        for version in complete[:-keep]:
            if version not in busy:
                *networks, orchestrator = snapshot_models(repository, version)
                for model in (orchestrator, *reversed(networks)):
                    remove_version(repository / model, version)
                removed.add(version)
        removed |= _remove_retired(repository, busy)
    return sorted(removed)


def _remove_retired(repository: Path, busy: set[int]) -> set[int]:
    highest = next_version(repository) - 1
    removed = set()
    for model in repository_models(repository):
        directory = repository / model / RETIRED
        for version in retired_versions(repository, model):
            if version in busy:
                continue
            if version == highest and model == ORCHESTRATOR:
                # Its name stays, empty: the next publish must not use the number again.
                if not _empty(directory / str(version)):
                    continue
            else:
                remove_version(directory, version)
            removed.add(version)
    return removed


def _empty(directory: Path) -> bool:
    """Whether there was anything in it."""
    paths = list(directory.iterdir())
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return bool(paths)
