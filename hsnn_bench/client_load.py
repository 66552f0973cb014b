"""Load through the real client, from a process of its own: what each call came to, written down as it happens."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from clients.aio import AsyncRetrievalClient
from clients.encode import WireUsers
from clients.load import each_user
from hsnn_core.errors import HsnnError

OK = "OK"
NO_STATUS = "none"  # an error that no server and no channel gave
_FLUSH = 0.2  # seconds


@dataclass(frozen=True)
class Call:
    """What one call of a client came to.

    ``sent``: when it was due, by the system's monotonic clock, which its processes share; ``seconds``: from then until
    the client returned or raised, so that one that falls behind with its sending hides nothing; ``status``: OK, or the
    gRPC status of the error; ``kind``: its class; ``message``: its text."""

    sent: float
    seconds: float
    status: str
    kind: str = ""
    message: str = ""


class Calls:
    """The calls that a load has written down so far, read on by every `new`."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def new(self) -> list[Call]:
        """Those since the last time, in the order in which they ended."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._at)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._at += len(whole)
        return [Call(*json.loads(line)) for line in whole.splitlines()]


@contextmanager
def client_load(
    work: Path, url: str, users: Mapping[str, np.ndarray], k: int, rate: float, timeout: float
) -> Iterator[Calls]:
    """Poisson arrivals at ``rate`` a second while the block runs, each a call of one of the ``users`` (wire tensors
    (R, ...)) for ``k`` items within ``timeout`` seconds, by one client; gives what they came to."""
    stop, spool = work / "stop", work / "calls.jsonl"
    for path in (stop, spool):
        path.unlink(missing_ok=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        future: Future[None] = pool.submit(_load, stop, spool, url, dict(users), k, rate, timeout)
        try:
            calls = Calls(spool)
            while not spool.exists() and not future.done():
                time.sleep(0.05)
            yield calls
        finally:
            stop.touch()
            future.result()


def closed_loop(
    url: str, users: Mapping[str, np.ndarray], k: int, under_way: int, seconds: float, timeout: float
) -> float:
    """Answers a second with so many calls of one client always under way: what server and client together take."""

    async def run() -> float:
        requests = [WireUsers(user) for user in each_user(users)]
        async with AsyncRetrievalClient(url, timeout=timeout) as client:
            until = time.monotonic() + seconds

            async def ask(first: int) -> int:
                count = 0
                while time.monotonic() < until:
                    await client.retrieve(requests[(first + count * under_way) % len(requests)], k=k)
                    count += 1
                return count

            counts = await asyncio.gather(*(ask(first) for first in range(under_way)))
        return sum(counts) / seconds

    return asyncio.run(run())


def by_status(calls: Sequence[Call]) -> dict[str, int]:
    """How many came to each status and class of error."""
    found = Counter(f"{call.status} {call.kind}".strip() for call in calls)
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def _load(
    stop: Path, spool: Path, url: str, users: dict[str, np.ndarray], k: int, rate: float, timeout: float
) -> None:
    asyncio.run(_arrivals(stop, spool, url, users, k, rate, timeout))


async def _arrivals(
    stop: Path, spool: Path, url: str, users: dict[str, np.ndarray], k: int, rate: float, timeout: float
) -> None:
    requests = [WireUsers(user) for user in each_user(users)]
    rng = np.random.default_rng(1)
    tasks: set[asyncio.Task[None]] = set()
    ended: list[Call] = []
    async with AsyncRetrievalClient(url, timeout=timeout) as client:

        async def ask(number: int, due: float) -> None:
            try:
                await client.retrieve(requests[number % len(requests)], k=k)
                ended.append(Call(due, time.monotonic() - due, OK))
            except Exception as error:  # whatever it is, it is what a client saw
                status = error.status if isinstance(error, HsnnError) else None
                taken = time.monotonic() - due
                ended.append(Call(due, taken, status or NO_STATUS, type(error).__name__, str(error)))

        with spool.open("w") as file:

            def write() -> None:
                file.writelines(f"{json.dumps(list(vars(call).values()))}\n" for call in ended)
                file.flush()
                ended.clear()

            due = written = time.monotonic()
            number, parent = 0, os.getppid()
            while not stop.exists() and os.getppid() == parent:
                due += rng.exponential(1 / rate)
                # Yield even when late, or the answers of those under way would be seen late.
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                task = asyncio.create_task(ask(number, due))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                number += 1
                if time.monotonic() - written > _FLUSH:
                    write()
                    written = time.monotonic()
            if tasks:
                await asyncio.wait(tasks)
            write()
