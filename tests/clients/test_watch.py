"""Watching: both are asked in turns, until a threshold breaks, somebody else acts, or the time is over."""

from __future__ import annotations

import time
from typing import Any

import pytest

from clients.comparison import Figures, Thresholds
from clients.metrics import requests_of
from clients.watch import Answer, watch
from clients.wire import Hit, Results
from hsnn_core.errors import FeatureError, HsnnError, RequestError, ServerError


class Asked:
    def __init__(self, error: HsnnError | None = None, seconds: float = 0.001, score: float = 0.1) -> None:
        self.error, self.seconds, self.score = error, seconds, score
        self.numbers: list[int] = []

    def __call__(self, number: int) -> Answer:
        self.numbers.append(number)
        if self.error is not None:
            raise self.error
        return Answer(Results([[Hit(1, {"click": self.score}, self.score)]], "1", None), self.seconds)


def run(stable: Asked, canary: Asked, **options: Any) -> tuple[Figures, str | None]:
    settings: dict[str, Any] = {
        "seconds": 0.3,
        "rate": 100.0,
        "thresholds": Thresholds(max_score_shift=0.2),
        "count": lambda: (0, 0),
        "runs": lambda: True,
        "say": lambda figures: None,
    }
    return watch(stable, canary, 3, **settings | options)


def test_a_good_canary_is_asked_what_the_stable_one_is() -> None:
    stable, canary = Asked(), Asked()
    figures, broken = run(stable, canary)
    assert broken is None
    assert 5 < figures.requests <= 31
    assert stable.numbers == canary.numbers == [n % 3 for n in range(figures.requests)]


def test_broken_thresholds_end_it_early() -> None:
    began = time.monotonic()
    figures, broken = run(Asked(), Asked(ServerError("gone")), seconds=30, rate=1000)
    assert broken is not None and f"of {figures.requests} requests of the watch failed" in broken
    assert time.monotonic() - began < 5
    _, broken = run(Asked(), Asked(score=0.2))
    assert broken == "its scores moved by 1.000 of their mean, allowed are 0.2"
    counts = iter([(10, 0), *[(60, 40)] * 99])
    _, broken = run(Asked(), Asked(), count=lambda: next(counts))
    assert broken == "40 of 50 requests that the server counted failed, allowed is a share of 0.01"


def test_somebody_else_ended_it() -> None:
    with pytest.raises(ServerError, match="not loaded any more; somebody else ended it"):
        run(Asked(), Asked(), seconds=5, runs=lambda: False)


def test_what_the_stable_one_fails_says_nothing_and_bad_requests_do() -> None:
    figures, broken = run(Asked(ServerError("busy")), Asked())
    assert (figures.requests, broken) == (0, None)
    with pytest.raises(FeatureError, match="no such feature"):
        run(Asked(FeatureError("no such feature")), Asked(FeatureError("no such feature")))
    with pytest.raises(RequestError, match="rate: got 0, expected a number > 0"):
        run(Asked(), Asked(), rate=0)


def test_the_servers_count_is_by_version() -> None:
    metrics = {
        'hsnn_requests_total{outcome="ok",version="3"}': 7.0,
        'hsnn_requests_total{outcome="error",version="3"}': 2.0,
        'hsnn_requests_total{outcome="error",version="33"}': 5.0,
        'hsnn_candidates_total{layer="1",version="3"}': 99.0,
    }
    assert requests_of(metrics, 3) == (9, 2)
    assert requests_of({}, 3) == (0, 0)
