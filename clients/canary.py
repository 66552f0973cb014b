"""Giving a part of the traffic to the canary, or copies of it, without anyone noticing when there is none.

The canary is the Triton model `hsnn_canary` of the same server: the orchestrator of a candidate snapshot. The operator
starts and ends it (`hsnn rollout canary`), and sets the share that clients follow; no client needs to be told.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

from hsnn_core.errors import HsnnError, Overloaded, RequestError, ServerError

from .comparison import Comparison
from .wire import Results, ServedModel

MODEL = "hsnn_canary"
_UNDER_WAY = 8  # copies at once; more are skipped
_PART = 0.5  # of a request's time that the canary may take, so that the stable model can still answer


@dataclass(frozen=True)
class Canary:
    """What a client does with the canary.

    ``share``: of its requests that go there, 0 to 1; ``shadow``: whether they are copies, which nobody waits for, of
    requests that the stable model answers. None, for either: what the operator set. ``look_every``: seconds between
    two looks at whether a canary runs, and with which settings.
    """

    share: float | None = None
    shadow: bool | None = None
    look_every: float = 5.0

    def __post_init__(self) -> None:
        if self.share is not None and not 0 <= self.share <= 1:
            raise RequestError(f"share: got {self.share!r}, expected a number from 0 to 1")


class Switch:
    """Which requests take part; may be shared between threads.

    ``asked``: requests that the canary was to answer; ``fell_back``: those that the stable model answered in its
    place. ``comparison``: of the copies."""

    def __init__(self, canary: Canary, clock: Callable[[], float] = time.monotonic) -> None:
        self._canary, self._clock = canary, clock
        self._lock = Lock()
        self._next_look = 0.0
        self._share, self.shadow = 0.0, False
        self._under_way = 0
        self.asked = self.fell_back = 0
        self.comparison = Comparison()

    def look_due(self) -> bool:
        """Whether to look now; true once per period."""
        with self._lock:
            due = self._clock() >= self._next_look
            if due:
                self._next_look = self._clock() + self._canary.look_every
            return due

    def found(self, model: ServedModel | None) -> None:
        """What a look found; None: no canary runs."""
        own = self._canary
        with self._lock:
            if model is None:
                self._share = 0.0
                return
            self._share = model.canary_share if own.share is None else own.share
            self.shadow = model.canary_shadow if own.shadow is None else own.shadow

    def chosen(self) -> bool:
        """Whether the next request takes part."""
        return self._share > 0 and random.random() < self._share

    def gave_up(self, error: HsnnError) -> None:
        """The canary did not answer. Unless it only refused, nothing more is sent to it until the next look."""
        with self._lock:
            self.fell_back += 1
            if isinstance(error, ServerError) and not isinstance(error, Overloaded):
                self._share = 0.0

    def begin_copy(self) -> bool:
        """Whether a copy may be sent; `end_copy` must follow."""
        with self._lock:
            free = self._under_way < _UNDER_WAY
            self._under_way += free
        if not free:
            self.comparison.skipped()
        return free

    def end_copy(self) -> None:
        with self._lock:
            self._under_way -= 1


class _Client(Protocol):
    def refresh(self) -> ServedModel: ...

    def close(self) -> None: ...


class Split:
    """The canary beside a synchronous client: ``client`` asks the canary."""

    def __init__(self, canary: Canary, client: _Client) -> None:
        self.switch = Switch(canary)
        self._client = client
        self._background = ThreadPoolExecutor(2, thread_name_prefix="hsnn-canary")

    def answer(
        self, stable: Callable[[float], Results], canary: Callable[[float], Results], timeout: float
    ) -> Results:
        """One request, asked of one model or of both; both take the seconds that are left."""
        switch, began = self.switch, time.monotonic()
        if switch.look_due():
            self._background.submit(self._look)
        if not switch.chosen():
            return stable(timeout)
        if switch.shadow:
            results = stable(timeout)
            if switch.begin_copy():
                seconds = time.monotonic() - began
                self._background.submit(self._copy, results, seconds, lambda: canary(timeout))
            return results
        switch.asked += 1
        try:
            return canary(_PART * timeout)
        except HsnnError as error:
            switch.gave_up(error)
        return stable(timeout - (time.monotonic() - began))

    def close(self) -> None:
        self._background.shutdown(cancel_futures=True)
        self._client.close()

    def _look(self) -> None:
        try:
            self.switch.found(self._client.refresh())
        except HsnnError:
            self.switch.found(None)

    def _copy(self, results: Results, seconds: float, ask: Callable[[], Results]) -> None:
        began = time.monotonic()
        try:
            answer = ask()
            self.switch.comparison.add(results, seconds, answer, time.monotonic() - began)
        except HsnnError:
            self.switch.comparison.failed()
        finally:
            self.switch.end_copy()


class _AsyncClient(Protocol):
    async def refresh(self) -> ServedModel: ...

    async def close(self) -> None: ...


class AsyncSplit:
    """The canary beside an asyncio client; as `Split`."""

    def __init__(self, canary: Canary, client: _AsyncClient) -> None:
        self.switch = Switch(canary)
        self._client = client
        self._background: set[asyncio.Task[None]] = set()

    async def answer(
        self,
        stable: Callable[[float], Awaitable[Results]],
        canary: Callable[[float], Awaitable[Results]],
        timeout: float,
    ) -> Results:
        """As `Split.answer`."""
        switch, began = self.switch, time.monotonic()
        if switch.look_due():
            self._start(self._look())
        if not switch.chosen():
            return await stable(timeout)
        if switch.shadow:
            results = await stable(timeout)
            if switch.begin_copy():
                seconds = time.monotonic() - began
                self._start(self._copy(results, seconds, lambda: canary(timeout)))
            return results
        switch.asked += 1
        try:
            return await canary(_PART * timeout)
        except HsnnError as error:
            switch.gave_up(error)
        return await stable(timeout - (time.monotonic() - began))

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._client.close()

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _look(self) -> None:
        try:
            self.switch.found(await self._client.refresh())
        except HsnnError:
            self.switch.found(None)

    async def _copy(self, results: Results, seconds: float, ask: Callable[[], Awaitable[Results]]) -> None:
        began = time.monotonic()
        try:
            answer = await ask()
            self.switch.comparison.add(results, seconds, answer, time.monotonic() - began)
        except HsnnError:
            self.switch.comparison.failed()
        finally:
            self.switch.end_copy()
