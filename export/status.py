"""Where every snapshot of a repository stands: on disk, and in a running server."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.loading import READY, Admin
from export.pbtxt import ORCHESTRATOR
from export.repository import (
    CANARY,
    RETIRED,
    orchestrator_directory,
    repository_models,
    retired_versions,
    snapshots,
)
from hsnn_core.manifest import MANIFEST


@dataclass(frozen=True)
class SnapshotStatus:
    """One version.

    `disk`: complete, candidate, rolled back (its networks are not moved yet), unfinished (a publish that was killed),
    retired, or gone (the server holds it, the disk does not). `orchestrator`, `canary`: the server's state of it,
    "" when it does not know it. `networks`: models of the snapshot but the orchestrator that answer requests; None
    without a server. `created`: when it was exported, ISO 8601. `log_position`: of the item log, what it
    contains."""

    version: int
    disk: str
    orchestrator: str
    canary: str
    networks: int | None
    created: str | None
    log_position: int | None


def status(repository: str | Path, admin: Admin | None = None) -> list[SnapshotStatus]:
    """Every version that the repository or the server has, ascending; without `admin` what the disk says."""
    repository = Path(repository)
    disk: dict[int, str] = {}
    for version in retired_versions(repository, ORCHESTRATOR):
        if any((repository / ORCHESTRATOR / RETIRED / str(version)).iterdir()):
            disk[version] = "retired"
    for snapshot in snapshots(repository):
        if snapshot.candidate:
            disk[snapshot.version] = "candidate"
        elif snapshot.rolled_back:
            disk[snapshot.version] = "rolled back"
        else:
            disk[snapshot.version] = "complete" if snapshot.complete else "unfinished"
    states: dict[str, dict[int, str]] = {}
    if admin is not None:
        for model in {*repository_models(repository), CANARY}:
            network = model not in (ORCHESTRATOR, CANARY)
            states[model] = {
                version: state
                for version, state in admin.states(model).items()
                if state == READY or (not network and state != "UNAVAILABLE")
            }
            for version in states[model]:
                disk.setdefault(version, "gone")
    networks = [model for model in states if model not in (ORCHESTRATOR, CANARY)]
    rows = []
    for version in sorted(disk):
        manifest = _manifest(repository, version)
        rows.append(
            SnapshotStatus(
                version,
                disk[version],
                states.get(ORCHESTRATOR, {}).get(version, ""),
                states.get(CANARY, {}).get(version, ""),
                None if admin is None else sum(states[m].get(version) == READY for m in networks),
                manifest.get("created"),
                manifest.get("log_position"),
            )
        )
    return rows


def _manifest(repository: Path, version: int) -> dict[str, Any]:
    """What can be read of it; nothing of a damaged one, whose status is wanted all the same."""
    retired = repository / ORCHESTRATOR / RETIRED / str(version)
    for directory in (orchestrator_directory(repository, version), retired):
        try:
            value = json.loads((directory / MANIFEST).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(value, dict):
            return value
    return {}
