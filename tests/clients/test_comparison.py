"""What two snapshots' answers are compared by, and when an operator's threshold is broken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.comparison import KEPT, Comparison, Figures, Thresholds, score_shift
from clients.wire import Hit, Results
from hsnn_core.errors import RequestError


def results(items: list[int], score: float = 0.1) -> Results:
    hits = [Hit(item, {"click": score, "buy": score / 10}, score) for item in items]
    return Results([hits], "1", None)


def test_pairs_become_figures() -> None:
    comparison = Comparison()
    comparison.add(results([1, 2, 3, 4]), 0.010, results([1, 2, 3, 9]), 0.020)
    comparison.add(results([1, 2, 3, 4]), 0.010, results([1, 2, 8, 9], 0.15), 0.040)
    comparison.failed()
    comparison.skipped()
    figures = comparison.figures()
    assert (figures.requests, figures.failed, figures.skipped) == (3, 1, 1)
    assert figures.overlap == pytest.approx((0.75 + 0.5) / 2)
    assert figures.stable_ms is not None and figures.stable_ms[0] == pytest.approx(10)
    assert figures.latency_ratio == pytest.approx(3)
    assert figures.score_shift == pytest.approx(0.5)
    assert Comparison().figures() == Figures(0, 0, 0, None, None, None, None)


def test_only_the_last_pairs_are_kept_and_empty_answers_count() -> None:
    comparison = Comparison()
    for number in range(KEPT + 5):
        comparison.add(results([1]), 1.0 if number < 5 else 0.001, results([1]), 0.001)
    assert comparison.figures().requests == KEPT + 5
    assert comparison.figures().stable_ms == pytest.approx((1.0, 1.0))
    empty = Comparison()
    empty.add(results([]), 0.001, results([]), 0.001)
    assert (empty.figures().overlap, empty.figures().score_shift) == (1.0, None)


@given(st.floats(0.001, 0.5), st.floats(0.1, 1.9), st.integers(1, 50))
def test_a_scaled_distribution_moved_by_its_scale(scale: float, factor: float, count: int) -> None:
    scores = np.full((count, 2), scale)
    assert score_shift(scores, scores * factor) == pytest.approx(abs(factor - 1), abs=1e-9)
    assert score_shift(scores, scores) == 0


GOOD = Figures(100, 0, 0, 0.9, (10.0, 20.0), (11.0, 30.0), 0.05, 50, 0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, None),
        ({"failed": 1}, None),
        ({"failed": 2}, "2 of 100 requests of the watch failed, allowed is a share of 0.01"),
        ({"server_errors": 1}, "1 of 50 requests that the server counted failed"),
        (
            {"canary_ms": (21.0, 30.0)},
            "its median latency is 21.00 ms, the stable one's 10.00 ms: 2.10 times",
        ),
        ({"score_shift": 0.3}, "its scores moved by 0.300 of their mean, allowed are 0.2"),
        ({"overlap": 0.4}, "it returns 0.400 of the stable top k, expected at least 0.5"),
        ({"requests": 19, "overlap": 0.0, "score_shift": 9.0}, None),
        ({"overlap": None, "score_shift": None, "stable_ms": None, "canary_ms": None}, None),
    ],
)
def test_a_threshold_names_its_figures(change: dict, text: str | None) -> None:
    broken = Thresholds(max_score_shift=0.2, min_overlap=0.5).broken(replace(GOOD, **change))
    assert (broken is None) if text is None else (broken is not None and text in broken)


def test_thresholds_that_make_no_sense_are_refused() -> None:
    with pytest.raises(RequestError, match="min_overlap: got -0.1, expected a number >= 0"):
        Thresholds(min_overlap=-0.1)
    off = Thresholds(max_error_rate=None, max_latency_ratio=None)
    assert off.broken(replace(GOOD, failed=100, canary_ms=(1e3, 1e3))) is None
