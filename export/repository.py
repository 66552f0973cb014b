"""A model repository on disk: which snapshots it holds, and what a killed publish left behind.

    <repository>/<model>/config.pbtxt             shared by all versions
    <repository>/<model>/<version>/...            served
    <repository>/<model>/.staging-<version>/...   being written, never served
    <repository>/<model>/.retired/<version>/...   rolled back, never served

A snapshot is one version number in all models. Its orchestrator version appears last: that rename is the
commit, so a number that the towers have and the orchestrator has not is what a killed publish left. Triton
takes only directories named by an integer for versions; staging inside the model's own directory keeps
every rename on one file system wherever the repository is mounted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from export.graphs import MODEL_PREFIX
from export.pbtxt import CONFIG_FILE, ORCHESTRATOR
from hsnn_core.errors import PublishError
from hsnn_core.files import sync_directory

STAGING = ".staging-"
RETIRED = ".retired"
LOCK_FILE = ".publish.lock"
_VERSION = re.compile(r"[1-9][0-9]*")


@dataclass(frozen=True)
class SnapshotVersion:
    """One version number: the models that have it and those that lack it. `complete`: it can be served."""

    version: int
    models: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return not self.missing


def snapshots(repository: Path) -> list[SnapshotVersion]:
    """Every version number in the repository, ascending, complete or not."""
    holders: dict[int, list[str]] = {}
    for model in _models(repository):
        for version in _numbers(repository / model):
            holders.setdefault(version, []).append(model)
    return [_snapshot(repository, version, holders[version]) for version in sorted(holders)]


def versions(repository: str | Path) -> list[int]:
    """The version numbers that can be served, ascending."""
    return [snapshot.version for snapshot in snapshots(Path(repository)) if snapshot.complete]


def snapshot_models(repository: Path, version: int) -> list[str]:
    """The models of a snapshot in the order in which they are loaded: towers, scorers, the item log's writer (older
    snapshots have none), orchestrator."""
    manifest = json.loads((repository / ORCHESTRATOR / str(version) / "manifest.json").read_text())
    models = manifest["models"]
    index = [models["index"]] if "index" in models else []
    return [models["user_tower"], models["item_tower"], *models["scorers"], *index, ORCHESTRATOR]


def next_version(repository: Path) -> int:
    """1 more than any version any model has, had, or was rolled back from: numbers are never used again."""
    numbers = [0]
    for model in _models(repository):
        numbers += [*_numbers(repository / model), *_numbers(repository / model / RETIRED)]
    return max(numbers) + 1


def recover(repository: Path) -> list[Path]:
    """Remove what a killed publish left: staging directories, files written aside, and versions without their
    orchestrator. Complete snapshots are not touched. Returns what was removed."""
    removed = []
    for snapshot in snapshots(repository):
        if ORCHESTRATOR not in snapshot.models:
            for model in snapshot.models:
                orphan = repository / model / str(snapshot.version)
                # Out of Triton's sight in one step; taking the files away takes many.
                aside = repository / model / f"{STAGING}orphan-{snapshot.version}"
                os.rename(orphan, aside)
                removed.append(orphan)
    fresh = not versions(repository)
    for model in _models(repository):
        directory = repository / model
        for path in sorted(directory.iterdir()):
            if path.name.startswith(STAGING):
                shutil.rmtree(path)
                removed.append(path)
            elif path.name.startswith(".") and path.name.endswith(".tmp"):
                path.unlink()
                removed.append(path)
        # Nothing was ever published here: a first publish that failed leaves no models either.
        if fresh and {path.name for path in directory.iterdir()} <= {CONFIG_FILE}:
            shutil.rmtree(directory)
            removed.append(directory)
    return removed


def move_version(repository: Path, model: str, version: int, retire: bool) -> None:
    """Take a version out of service (to .retired) or put it back; one rename."""
    directory = repository / model
    served, retired = directory / str(version), directory / RETIRED / str(version)
    retired.parent.mkdir(exist_ok=True)
    source, target = (served, retired) if retire else (retired, served)
    os.rename(source, target)
    sync_directory(directory)


@contextlib.contextmanager
def locked(repository: Path) -> Iterator[None]:
    """One publisher at a time; a killed one leaves no lock behind. PublishError when another is at work."""
    try:
        lock = (repository / LOCK_FILE).open("w")
    except OSError as error:
        raise PublishError(
            f"{repository}: {error.strerror or error}; expected a repository that can be written"
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PublishError(
                f"{repository}: another publish or rollback is at work there; wait for it to end"
            ) from error
        yield


def _snapshot(repository: Path, version: int, models: list[str]) -> SnapshotVersion:
    if ORCHESTRATOR not in models:
        return SnapshotVersion(version, tuple(models), (ORCHESTRATOR,))
    if not (repository / ORCHESTRATOR / str(version) / "manifest.json").is_file():
        return SnapshotVersion(version, tuple(models), (f"{ORCHESTRATOR}/{version}/manifest.json",))
    missing = [
        model
        for model in snapshot_models(repository, version)
        if model not in models or not (repository / model / CONFIG_FILE).is_file()
    ]
    return SnapshotVersion(version, tuple(models), tuple(missing))


def _models(repository: Path) -> list[str]:
    if not repository.is_dir():
        return []
    return sorted(p.name for p in repository.iterdir() if p.is_dir() and p.name.startswith(MODEL_PREFIX))


def _numbers(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return [int(path.name) for path in directory.iterdir() if _VERSION.fullmatch(path.name)]
