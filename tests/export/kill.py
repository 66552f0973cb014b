"""Death by file operation: a process that ends, without any cleaning up, right after the n-th change to
the disk."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.publish import publish
from export.rollout import rollback

DIED = 99
CHANGES = ("rename", "replace", "mkdir", "rmdir", "unlink", "fsync", "write", "truncate", "link", "symlink")


def run_and_die(step: int, task: str, source: Path, repository: Path) -> None:
    """Exit with DIED after change number `step` (from 0), with 0 when the task ended before."""
    count = 0

    def counted(
        change: Callable[..., Any], when: Callable[..., bool] = lambda *_: True
    ) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            result = change(*args, **kwargs)
            if when(*args, *kwargs.values()):
                if count == step:
                    os._exit(DIED)
                count += 1
            return result

        return wrapper

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    # A file that was just created and is still empty.
    io.open = counted(io.open, lambda *args: any(isinstance(arg, str) and "w" in arg for arg in args[1:]))
    if task == "publish":
        publish(source, repository)
    else:
        rollback(repository)
    os._exit(0)
