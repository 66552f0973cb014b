"""Where figures were made: the run, the commit, the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def run_name(run: Path) -> str:
    """What a run directory is called in its reports and their files: the folder above for `demo/run`."""
    path = run.resolve()
    return path.parent.name if path.name == "run" else path.name


def commit() -> str:
    """Short hash of the project's checkout, with a + when tracked files differ from it; "none" outside one."""
    here = Path(__file__).parent
    asked = [
        ["git", "rev-parse", "--short", "HEAD"],
        ["git", "status", "--porcelain", "--untracked-files=no"],
    ]
    try:
        head, changed = (
            subprocess.run(command, cwd=here, check=True, capture_output=True, text=True).stdout.strip()
            for command in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return head + ("+" if changed else "")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> str:
    """Architecture and cores."""
    return f"{platform.machine()}, {cores()} cores, CPU"
