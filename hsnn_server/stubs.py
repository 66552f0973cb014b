"""The Python stubs of a server: which version each runs, which have died, and how to bring one back."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from clients.admin import ModelVersion
from hsnn_core.errors import ServerError


def model_of(pid: int) -> tuple[str, int] | None:
    """The model and version that a Python stub runs: <repository>/<model>/<version>/<file> is its first argument. None
    for a process that is none, or is gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        _, model, version, _ = words[1].decode().rsplit("/", 3)
        return model, int(version)
    except (OSError, ValueError, IndexError):
        return None


class Dead(NamedTuple):
    """A version of a model one of whose stubs has died, or, while it was ``unloading``, all of them."""

    model: str
    version: int
    unloading: bool = False


def dead(
    index: Callable[[], Iterable[ModelVersion]],
    living: Callable[[], Iterable[int]],
    instances: Callable[[str, int], int],
) -> list[Dead]:
    """The versions that Triton calls ready (``index``) and that fewer of the ``living`` processes run than they have
    ``instances``, and those that it calls unloading and that none runs.

    A rollout may go on meanwhile. What is ready before the look at the processes had its stubs by then, and what was
    unloaded during it is not ready after it. What is unloading may just have ended: only time tells."""
    before = _versions(index())
    running = Counter(model_of(pid) for pid in living())
    missing = [
        one
        for one in before
        if running[one[:2]] < (1 if one.unloading else instances(one.model, one.version))
    ]
    after = _versions(index()) if missing else []
    return [one for one in missing if one in after]


def _versions(entries: Iterable[ModelVersion]) -> list[Dead]:
    return [
        Dead(entry.model, entry.version, entry.state == "UNLOADING")
        for entry in entries
        if entry.state in ("READY", "UNLOADING") and entry.version
    ]


def make_newer(directory: Path) -> None:
    """Set the time of a version's model file, so that Triton's next load takes the version for a changed one: it does
    not load again what it has, dead or not. ServerError where there is none, or the repository can't be written."""
    files = sorted(directory.glob("model.*"))
    if not files:
        raise ServerError(f"{directory}: no model file there to load again")
    try:
        os.utime(files[0])
    except OSError as error:
        raise ServerError(
            f"{files[0]}: its time can't be set ({error.strerror}), and Triton loads nothing older again"
        ) from error
