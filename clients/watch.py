"""Watching a snapshot answer the requests that another one answers: until a threshold breaks, or the time is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hsnn_core.errors import FeatureError, HsnnError, RequestError, SchemaMismatch, ServerError

from .comparison import Comparison, Figures, Thresholds
from .encode import WireUsers
from .retrieval import Results, RetrievalClient

Users = Sequence[Mapping[str, Any]] | WireUsers
_LOOK = 1.0  # seconds between two looks at the thresholds and at the server
_SAY = 10.0


@dataclass(frozen=True)
class Answer:
    """What a request got, and how many seconds the client waited."""

    results: Results
    seconds: float


class Live:
    """Answers of a running model to requests 0, 1, ... of a list, each B users."""

    def __init__(self, client: RetrievalClient, requests: Sequence[Users], k: int | None) -> None:
        self._client, self._requests, self._k = client, requests, k

    def __call__(self, number: int) -> Answer:
        began = time.perf_counter()
        results = self._client.retrieve(self._requests[number], k=self._k)
        return Answer(results, time.perf_counter() - began)


def watch(
    stable: Callable[[int], Answer],
    canary: Callable[[int], Answer],
    requests: int,
    *,
    seconds: float,
    rate: float,
    thresholds: Thresholds,
    count: Callable[[], tuple[int, int]],
    runs: Callable[[], bool],
    say: Callable[[Figures], None],
) -> tuple[Figures, str | None]:
    """Ask both, in turns, for the given number of ``requests`` again and again; return what was found and the threshold
    that was broken, None when none was.

    ``stable``, ``canary``: answer request number n; the first failing says nothing of the canary, and that request is
    left out. ``rate``: pairs a second at most; ``count``: the server's requests and errors of the canary so far;
    ``runs``: whether the canary is still there: ServerError when somebody ended it; ``say``: told every ten seconds.
    Raises RequestError, FeatureError or SchemaMismatch for a request that both refuse.
    """
    for name, value in (("requests", requests), ("seconds", seconds), ("rate", rate)):
        if not value > 0:
            raise RequestError(f"{name}: got {value!r}, expected a number > 0")
    comparison = Comparison()
    before = count()

    def figures() -> Figures:
        now = count()
        asked, errors = (max(0, after - at) for after, at in zip(now, before))
        return replace(comparison.figures(), server_requests=asked, server_errors=errors)

    began = looked = said = time.monotonic()
    number = 0
    while (now := time.monotonic()) < began + seconds:
        _pair(stable, canary, number % requests, number % 2 == 1, comparison)
        number += 1
        if now - looked >= _LOOK:
            looked = now
            if not runs():
                raise ServerError(
                    "the snapshot that was watched is not loaded any more; somebody else ended it"
                )
            found = figures()
            if (broken := thresholds.broken(found)) is not None:
                return found, broken
            if now - said >= _SAY:
                said = now
                say(found)
        time.sleep(max(0.0, min(began + number / rate, began + seconds) - time.monotonic()))
    found = figures()
    return found, thresholds.broken(found, least=1)


def _pair(
    stable: Callable[[int], Answer],
    canary: Callable[[int], Answer],
    number: int,
    canary_first: bool,
    comparison: Comparison,
) -> None:
    """One request to both; who is first alternates, since the second may find caches warm."""
    answers: dict[bool, Answer | HsnnError] = {}
    for is_canary in (canary_first, not canary_first):
        try:
            answers[is_canary] = (canary if is_canary else stable)(number)
        except HsnnError as error:
            answers[is_canary] = error
    ours, theirs = answers[False], answers[True]
    if isinstance(ours, RequestError | FeatureError | SchemaMismatch):
        raise ours
    if isinstance(ours, HsnnError):
        return
    if isinstance(theirs, HsnnError):
        comparison.failed()
    else:
        comparison.add(ours.results, ours.seconds, theirs.results, theirs.seconds)
