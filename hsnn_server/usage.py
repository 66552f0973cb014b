"""What a server's processes use of the machine: CPU time, resident memory, shared memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable
from pathlib import Path

from .processes import SHARED_MEMORY

_LIBC = ctypes.CDLL(None, use_errno=True)


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time that these processes have used so far, all their threads, ended ones included; to the nanosecond,
    while /proc counts in ticks of 10 ms. A process that is gone counts as 0."""
    total = 0.0
    for pid in pids:
        clock = ctypes.c_int()
        if _LIBC.clock_getcpuclockid(pid, ctypes.byref(clock)) == 0:
            try:
                total += time.clock_gettime(clock.value)
            except OSError:  # it ended in between
                continue
    return total


def resident_bytes(pids: Iterable[int]) -> int:
    """Memory of these processes that is in RAM, pages that they share counted in parts (PSS)."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def shared_bytes(prefix: str, of: Iterable[int] | None = None) -> int:
    """Pages of the /dev/shm regions whose names begin with ``prefix`` that are in use; ``of``: only the regions of
    these processes, Python stubs: the others are those of stubs that died."""
    total = 0
    named = None if of is None else {word for pid in of for word in _words(pid)}
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        if named is not None and region.name not in named:
            continue
        try:
            total += region.stat().st_blocks * 512
        except OSError:
            continue
    return total


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []
