"""What a server may have left on this machine."""

from __future__ import annotations

import os
import time


def regions(prefix: str) -> list[str]:
    """The shared memory of the server with this ``region_prefix``; others may come and go meanwhile."""
    return [name for name in os.listdir("/dev/shm") if name.startswith(prefix)]


def ended(pid: int) -> bool:
    """Whether process ``pid`` and the group it led are gone; the system takes a moment to forget the dead."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False
