"""Dropping what the item log need not keep: updates that every kept snapshot contains."""

from __future__ import annotations

from pathlib import Path

from export.publish import current_options
from export.repository import candidate, locked, orchestrator_directory, versions
from hsnn_core.errors import PublishError
from hsnn_core.item_log import ItemLog
from hsnn_core.manifest import read_manifest
from hsnn_core.schema import Schema


def log_of(repository: Path) -> Path:
    """The item log of a repository."""
    return repository / current_options(repository).item_log


def forget(repository: str | Path) -> tuple[int, int]:
    """Drop the content of the updates that all snapshots of a repository contain; returns the position up to which they
    do, and how many were dropped. A snapshot that was made without the log contains none of it.

    From then on an export that does not contain them cannot be published, and a snapshot that was rolled back and lacks
    them cannot be put back. Raises PublishError for a repository without a snapshot, LogError when the log cannot be
    written.
    """
    repository = Path(repository)
    if not versions(repository):
        raise PublishError(
            f"{repository}: no complete snapshot there, expected at least one that contains the log"
        )
    # A publish that is at work has looked at the log already.
    with locked(repository):
        waiting = candidate(repository)
        kept = [*versions(repository), *([] if waiting is None else [waiting])]
        bundles = [orchestrator_directory(repository, version) for version in kept]
        schema = Schema.from_json((bundles[-1] / "schema.json").read_text())
        with ItemLog.open(log_of(repository), schema.hash) as log:
            position = min(_contained(directory, log.identity) for directory in bundles)
            return position, log.forget(position)


def _contained(directory: Path, identity: str) -> int:
    manifest = read_manifest(directory)
    return int(manifest["log_position"]) if manifest.get("log_identity") == identity else 0
