"""Death by file operation: processes that end, without any cleaning up, right after their n-th change to the
disk or, in tasks that talk to a server, to it.

Run as a program (`kill.py TASK SOURCE TEMPLATE OUT`), small enough to be forked often: OUT/<n> is a copy
of the repository TEMPLATE after a process doing TASK on it died at change n; the last one is that of a
process that lived.
"""

from __future__ import annotations

import io
import itertools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_triton import FakeTriton

from export import candidate, loading, vendor
from export.publish import publish
from export.retire import retire
from export.rollout import rollback

DIED = 99
_CODE_FILES = vendor.code_files
SERVER = "server.json"  # in a repository: what its FakeTriton holds
TASKS: dict[str, Callable[[Path, Path, FakeTriton], object]] = {
    "publish_candidate": lambda source, repository, server: candidate.publish_candidate(
        source, repository, server
    ),
    "start_canary": lambda source, repository, server: candidate.start_canary(repository, server, 0.1),
    "promote_candidate": lambda source, repository, server: candidate.promote_candidate(repository, server),
    "withdraw": lambda source, repository, server: candidate.withdraw(repository, server),
    "rollback_served": lambda source, repository, server: rollback(repository, server),
    "retire": lambda source, repository, server: retire(repository, server, keep=1),
}
CHANGES = ("rename", "replace", "mkdir", "rmdir", "unlink", "fsync", "write", "truncate", "link", "symlink")


def few_code_files(sources: Path = vendor.ORCHESTRATOR_SOURCES) -> dict[str, Path]:
    """Three of the files that a version's code consists of: dying at the copy of one is as at that of any other."""
    few = ("model.py", "hsnn_core/__init__.py", "hsnn_core/errors.py")
    return {name: path for name, path in _CODE_FILES(sources).items() if name in few}


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

    os.fsync = lambda descriptor: None  # the kernel lives on; only the order of changes matters here
    if task in TASKS:
        # What a killed publish leaves is seen by the task of that name, so here writing files is no change.
        for name in ("rename", "replace", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        loading.replay = lambda *_: None
        server = FakeTriton(repository, repository / SERVER, step=counted(lambda: None))
        TASKS[task](source, repository, server)
        os._exit(0)
    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    # A file that was just created and is still empty.
    io.open = counted(io.open, lambda *args: any(isinstance(arg, str) and "w" in arg for arg in args[1:]))
    if task == "publish":
        publish(source, repository)
    else:
        rollback(repository)
    os._exit(0)


def _copy(source: str, target: str) -> None:
    if source.endswith(SERVER):
        shutil.copy(source, target)
    else:
        os.link(source, target)


def main(task: str, source: Path, template: Path, out: Path) -> None:
    vendor.code_files = few_code_files
    for step in itertools.count():
        shutil.copytree(template, out / str(step), copy_function=_copy)
        child = os.fork()
        if child == 0:
            try:
                run_and_die(step, task, source, out / str(step))
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        if code != DIED:
            sys.exit(f"step {step}: the process ended with {code}")


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
