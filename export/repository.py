"""A model repository on disk: which snapshots it holds, and what a killed command left behind.

    <repository>/<model>/config.pbtxt             shared by all versions
    <repository>/<model>/<version>/...            served
    <repository>/hsnn_canary/<version>/...        the orchestrator of a candidate: published, not promoted
    <repository>/<model>/.staging-<version>/...   being written or removed, never served
    <repository>/<model>/.retired/<version>/...   rolled back, never served

A snapshot is one version number in all models. Its orchestrator version appears last: that rename is the
commit, so a number that the towers have and no orchestrator has is what a killed publish left, or, where the
orchestrator is retired, a killed rollback. Triton takes only directories named by an integer for versions;
staging inside the model's own directory keeps every rename on one file system wherever the repository is
mounted.

A candidate is a snapshot whose orchestrator lies under `hsnn_canary`: whatever reloads or restarts the
orchestrator cannot pick it up, and promoting it is one rename. There is at most one, for the networks keep one
version more than the orchestrator: another one would push those of the serving snapshot out.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from export.graphs import MODEL_PREFIX
from export.pbtxt import CONFIG_FILE, ORCHESTRATOR
from hsnn_core.errors import FormatError, PublishError
from hsnn_core.files import read_text, sync_directory
from hsnn_core.manifest import MANIFEST, check_models

STAGING = ".staging-"
RETIRED = ".retired"
LOCK_FILE = ".publish.lock"
CANARY = "hsnn_canary"
_VERSION = re.compile(r"[1-9][0-9]*")
# Seconds that a command with a server waits for another one, which may wait for the last requests of a version that was
# replaced (loading.DRAIN_SECONDS), for a canary to unload and for models to load.
LOCK_PATIENCE = 300.0
_LOCK_POLL = 0.1


@dataclass(frozen=True)
class SnapshotVersion:
    """One version number: the models that have it in place and those that lack it.

    `complete`: it can be served. `candidate`: its orchestrator is the canary's. `rolled_back`: its orchestrator
    is retired and its networks are not yet."""

    version: int
    models: tuple[str, ...]
    missing: tuple[str, ...]
    rolled_back: bool = False

    @property
    def candidate(self) -> bool:
        return CANARY in self.models

    @property
    def complete(self) -> bool:
        return not self.missing and not self.candidate


def snapshots(repository: Path) -> list[SnapshotVersion]:
    """Every version number in the repository, ascending, complete or not."""
    holders: dict[int, list[str]] = {}
    for model in repository_models(repository):
        for version in _numbers(repository / model):
            holders.setdefault(version, []).append(model)
    return [_snapshot(repository, version, holders[version]) for version in sorted(holders)]


def versions(repository: str | Path) -> list[int]:
    """The version numbers that can be served, ascending."""
    return [snapshot.version for snapshot in snapshots(Path(repository)) if snapshot.complete]


def candidate(repository: str | Path) -> int | None:
    """The version that was published and is not promoted yet; None when there is none."""
    found = [snapshot.version for snapshot in snapshots(Path(repository)) if snapshot.candidate]
    return found[-1] if found else None


def orchestrator_directory(repository: Path, version: int) -> Path:
    """Where the orchestrator of a snapshot lies: in service, or as the canary of a candidate."""
    served = repository / ORCHESTRATOR / str(version)
    return served if served.is_dir() else repository / CANARY / str(version)


def snapshot_models(repository: Path, version: int) -> list[str]:
    """The models of a snapshot in the order in which they are loaded: towers, scorers, the item log's writer (older
    snapshots have none), orchestrator. The last one is called so for a candidate, too."""
    path = orchestrator_directory(repository, version) / MANIFEST
    try:
        models = json.loads(read_text(path))["models"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{path}: not the manifest of a snapshot ({error!r}); publish it again") from error
    check_models(path, models)
    index = [models["index"]] if "index" in models else []
    return [models["user_tower"], models["item_tower"], *models["scorers"], *index, ORCHESTRATOR]


def model_versions(repository: Path, model: str) -> list[int]:
    """The versions of one model that a server could load, ascending, of complete snapshots or not."""
    return sorted(_numbers(repository / model))


def retired_versions(repository: Path, model: str) -> list[int]:
    """The versions of one model in `.retired`, ascending."""
    return sorted(_numbers(repository / model / RETIRED))


def next_version(repository: Path) -> int:
    """1 more than any version any model has, had, or was rolled back from: numbers are never used again."""
    numbers = [0]
    for model in repository_models(repository):
        numbers += [*_numbers(repository / model), *_numbers(repository / model / RETIRED)]
    return max(numbers) + 1


def recover(repository: Path) -> list[Path]:
    """Remove what a killed publish or retirement left: staging directories, files written aside, and versions
    without their orchestrator. Not touched are complete snapshots, a candidate, and what a killed rollback left:
    a server may still call those networks (`retire_rest`). Returns what was removed."""
    removed = []
    found = snapshots(repository)
    for snapshot in found:
        if not (ORCHESTRATOR in snapshot.models or snapshot.candidate or snapshot.rolled_back):
            for model in snapshot.models:
                orphan = repository / model / str(snapshot.version)
                # Out of Triton's sight in one step; taking the files away takes many.
                aside = repository / model / f"{STAGING}orphan-{snapshot.version}"
                os.rename(orphan, aside)
                removed.append(orphan)
    fresh = not any(snapshot.complete or snapshot.candidate for snapshot in found)
    for model in repository_models(repository):
        directory = repository / model
        for path in sorted(directory.iterdir()):
            if path.name.startswith(STAGING):
                shutil.rmtree(path)
                removed.append(path)
            elif path.name.startswith(".") and path.name.endswith(".tmp"):
                path.unlink()
                removed.append(path)
        # Nothing was ever published here: a first publish that failed leaves no models either. Nor is there a
        # canary without a candidate.
        if (fresh or model == CANARY) and {path.name for path in directory.iterdir()} <= {CONFIG_FILE}:
            shutil.rmtree(directory)
            removed.append(directory)
    return removed


def retire_snapshot(repository: Path, version: int) -> None:
    """Move a snapshot or a candidate to `.retired`, its orchestrator first."""
    *networks, orchestrator = snapshot_models(repository, version)
    if (repository / CANARY / str(version)).is_dir():
        retire_candidate(repository, version)
    else:
        move_version(repository, orchestrator, version, retire=True)
    for model in reversed(networks):
        move_version(repository, model, version, retire=True)


def retire_candidate(repository: Path, version: int) -> None:
    """Move a candidate's orchestrator to `.retired`; there is no canary then."""
    retired = repository / ORCHESTRATOR / RETIRED / str(version)
    retired.parent.mkdir(parents=True, exist_ok=True)
    os.rename(repository / CANARY / str(version), retired)
    sync_directory(retired.parent)
    remove_canary(repository)


def retire_rest(repository: Path, version: int) -> None:
    """Move to `.retired` what a killed rollback left of a snapshot in place."""
    for model in repository_models(repository):
        if (repository / model / str(version)).is_dir():
            move_version(repository, model, version, retire=True)


def remove_canary(repository: Path) -> None:
    """Take the canary model away, unless a candidate's orchestrator lies there."""
    directory = repository / CANARY
    if directory.is_dir() and not _numbers(directory):
        shutil.rmtree(directory)
        sync_directory(repository)


def remove_version(directory: Path, version: int) -> None:
    """Remove a version below a model's directory or its `.retired`; one rename takes it out of sight."""
    model = directory.parent if directory.name == RETIRED else directory
    aside = model / f"{STAGING}removed-{version}"
    os.rename(directory / str(version), aside)
    sync_directory(directory)
    shutil.rmtree(aside)


def move_version(repository: Path, model: str, version: int, retire: bool) -> None:
    """Take a version out of service (to .retired) or put it back; one rename."""
    directory = repository / model
    served, retired = directory / str(version), directory / RETIRED / str(version)
    retired.parent.mkdir(exist_ok=True)
    source, target = (served, retired) if retire else (retired, served)
    os.rename(source, target)
    sync_directory(directory)


@contextlib.contextmanager
def locked(repository: Path, patience: float = 0.0) -> Iterator[None]:
    """One command changes a repository at a time; a killed one leaves no lock behind.

    `patience`: seconds to wait for another one. PublishError when it is still at work then."""
    path = repository / LOCK_FILE
    try:
        # A server may have a mount that can only be read; that is enough for the lock.
        lock = path.open("w" if os.access(path if path.exists() else repository, os.W_OK) else "r")
    except OSError as error:
        raise PublishError(
            f"{repository}: {error.strerror or error}; expected a repository that can be written"
        ) from error
    with lock as file:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= until:
                    raise PublishError(
                        f"{repository}: another publish or rollback is at work there; wait for it to end"
                    ) from error
            time.sleep(_LOCK_POLL)
        yield


def _snapshot(repository: Path, version: int, models: list[str]) -> SnapshotVersion:
    if ORCHESTRATOR not in models and CANARY not in models:
        rolled_back = (repository / ORCHESTRATOR / RETIRED / str(version)).is_dir()
        return SnapshotVersion(version, tuple(models), (ORCHESTRATOR,), rolled_back)
    directory = orchestrator_directory(repository, version)
    if not (directory / "manifest.json").is_file():
        return SnapshotVersion(version, tuple(models), (f"{directory.parent.name}/{version}/manifest.json",))
    *networks, _ = snapshot_models(repository, version)
    missing = [
        model
        for model in (*networks, directory.parent.name)
        if model not in models or not (repository / model / CONFIG_FILE).is_file()
    ]
    return SnapshotVersion(version, tuple(models), tuple(missing))


def repository_models(repository: Path) -> list[str]:
    """Names of the models that are ours, by name."""
    if not repository.is_dir():
        return []
    return sorted(p.name for p in repository.iterdir() if p.is_dir() and p.name.startswith(MODEL_PREFIX))


def _numbers(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return [int(path.name) for path in directory.iterdir() if _VERSION.fullmatch(path.name)]
