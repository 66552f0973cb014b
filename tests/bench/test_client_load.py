"""Load through the real client: a call's time counts from when it was due, not from when the client got to it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hsnn_bench import client_load
from hsnn_bench.client_load import OK, Calls

TOOK, COUNT = 0.02, 10


def test_a_client_that_falls_behind_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten calls that are due at once, of a client that blocks for 20 ms in each: the last waits for all others."""
    stop, calls = tmp_path / "stop", 0

    class Blocking:
        def __init__(self, url: str, timeout: float) -> None: ...

        async def __aenter__(self) -> Blocking:
            return self

        async def __aexit__(self, *_: object) -> None: ...

        async def retrieve(self, users: Any, k: int) -> None:
            nonlocal calls
            calls += 1
            time.sleep(TOOK)
            if calls == COUNT:
                stop.touch()

    monkeypatch.setattr(client_load, "AsyncRetrievalClient", Blocking)
    users = {"age": np.zeros((3, 1), np.float32)}
    asyncio.run(client_load._arrivals(stop, tmp_path / "calls", "", users, 5, 1e5, 1.0))
    ended = Calls(tmp_path / "calls").new()
    assert len(ended) >= COUNT and {call.status for call in ended} == {OK}
    assert ended[0].seconds >= TOOK
    assert ended[COUNT - 1].seconds >= 0.9 * COUNT * TOOK
    assert ended[COUNT - 1].sent - ended[0].sent < TOOK, "when it was due"
