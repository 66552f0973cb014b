"""Small file systems that only this process and its children see, so that one can be full without harm to others."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hsnn_core.errors import ServerError

_LIBC = ctypes.CDLL(None, use_errno=True)
# <sched.h> and <sys/mount.h>
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 1 << 14, 1 << 18
_BLOCK = 1 << 16


def own_mounts() -> bool:
    """From here on, what this thread and what it starts mounts is theirs alone. False where the system does not allow
    it: it takes root, or CAP_SYS_ADMIN."""
    return (
        _LIBC.unshare(_CLONE_NEWNS) == 0
        and _LIBC.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0
    )


def mount_small(path: Path, mib: int) -> None:
    """A tmpfs of so many MiB over the directory ``path``. Call after `own_mounts`."""
    if _LIBC.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, f"size={mib}m".encode()) != 0:
        raise ServerError(f"{path}: can't mount a tmpfs there ({os.strerror(ctypes.get_errno())})")


@contextmanager
def full(path: Path) -> Iterator[int]:
    """The file system of the directory ``path`` has no room left within the block; gives the bytes that it took.

    ServerError for one of more than 1 GiB: filling it could harm others."""
    size = os.statvfs(path)
    if size.f_blocks * size.f_frsize > 1 << 30:
        raise ServerError(f"{path}: its file system has more than 1 GiB, expected a small one to fill")
    filler = path / "hsnn-filler"
    try:
        with filler.open("wb", buffering=0) as file:
            taken = 0
            for block in (_BLOCK, os.sysconf("SC_PAGE_SIZE")):
                try:
                    while written := file.write(b"\1" * block):
                        taken += written
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
        yield taken
    finally:
        filler.unlink(missing_ok=True)
