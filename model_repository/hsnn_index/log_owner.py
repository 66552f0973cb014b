"""One server writes to a log. Its processes (a stub per version of hsnn_index) may write side by side; those of
another server, which would follow another log by its own rules of who is newest, are refused while it lives.

Every writing process holds a shared lock on the file of the owner's name, which only a process that holds it alone may
write. The system drops the locks of the dead, so a killed server leaves nothing to clean up.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from hsnn_core.errors import LogError

_ATTEMPTS, _PAUSE = 5, 0.05  # another process may hold the lock for the moment in which it looks


def this_server() -> dict[str, Any]:
    """What tells the parent of this process, the Triton server, from every other process on every host."""
    pid = os.getppid()
    # Field 22; those from the third on follow the name in brackets, which may hold anything.
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return {
        "host": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "namespace": os.readlink("/proc/self/ns/pid"),
        "server": pid,
        "started": int(started),
    }


class LogOwner:
    """The right to write to a log, from `claim` until `release` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        """Use `claim`."""
        self._descriptor = descriptor

    @classmethod
    def claim(cls, log: Path, server: dict[str, Any]) -> LogOwner:
        """LogError when another server's process holds the right, naming it, or the folder cannot be written."""
        path = log.with_name(f"{log.name}.owner")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise LogError(
                f"{path}: cannot be written ({error.strerror}); give the log a folder that can, with "
                "hsnn publish --item-log"
            ) from error
        holder = None
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE)
            try:
                if _locked(descriptor, fcntl.LOCK_EX):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(server).encode(), 0)
                # From an exclusive lock this is not one step: the name may be another's after it.
                if _locked(descriptor, fcntl.LOCK_SH):
                    holder = _holder(descriptor)
                    if holder == server:
                        return cls(descriptor)
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
            except OSError as error:
                os.close(descriptor)
                raise LogError(f"{path}: cannot be written or locked ({error.strerror})") from error
        os.close(descriptor)
        who = f"process {holder['server']} on {holder['host']}" if holder else "a process that gave no name"
        raise LogError(
            f"{log}: another server, {who}, writes to this log; stop it, or give each server a log of its own with "
            "hsnn publish --item-log"
        )

    def release(self) -> None:
        """Let another server have it, once no other process of this one holds it."""
        os.close(self._descriptor)


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(descriptor: int) -> dict[str, Any] | None:
    try:
        return dict(json.loads(os.pread(descriptor, 4096, 0)))
    except ValueError:
        return None
