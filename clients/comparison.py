"""Answers of two snapshots to the same requests, compared: top k, scores, latency. And what an operator allows."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from threading import Lock

import numpy as np

from hsnn_core.errors import RequestError

from .wire import Results

KEPT = 1000  # pairs; older ones give way
COMPARED = 100  # hits of a user whose scores count for their distribution
LEAST = 20  # requests before a threshold can be broken
_DECILES = np.linspace(0.1, 0.9, 9)


@dataclass(frozen=True)
class Figures:
    """What a comparison found; None where there was nothing to compare.

    Attributes:
        requests: sent to the canary; failed: of them without an answer; skipped: copies that were not sent because too
            many were under way.
        overlap: share of the stable top k that the canary returned, the mean over requests.
        stable_ms, canary_ms: median and 99th percentile of the latency at the client.
        score_shift: how far the distribution of a task's probabilities moved, see `score_shift`.
        server_requests, server_errors: requests that the server counted for the canary's version in that time,
            everybody's, and those that it failed.
    """

    requests: int
    failed: int
    skipped: int
    overlap: float | None
    stable_ms: tuple[float, float] | None
    canary_ms: tuple[float, float] | None
    score_shift: float | None
    server_requests: int = 0
    server_errors: int = 0

    @property
    def latency_ratio(self) -> float | None:
        """The canary's median latency over the stable one's."""
        if self.stable_ms is None or self.canary_ms is None:
            return None
        return self.canary_ms[0] / max(self.stable_ms[0], 1e-9)


@dataclass(frozen=True)
class Thresholds:
    """Beyond which a canary is taken back; None: not looked at.

    ``max_error_rate``: failed requests over all, at the client and in the server's own count; ``max_latency_ratio``:
    `Figures.latency_ratio`; ``max_score_shift``, ``min_overlap``: of the scores and of the top k."""

    max_error_rate: float | None = 0.01
    max_latency_ratio: float | None = 2.0
    max_score_shift: float | None = None
    min_overlap: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_error_rate", "max_latency_ratio", "max_score_shift", "min_overlap"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise RequestError(f"{name}: got {value!r}, expected a number >= 0")

    def broken(self, figures: Figures, least: int = LEAST) -> str | None:
        """The first threshold that is broken, with its figures; None while fewer than ``least`` requests count."""
        for failed, requests, who in (
            (figures.failed, figures.requests, "requests of the watch"),
            (figures.server_errors, figures.server_requests, "requests that the server counted"),
        ):
            if (
                self.max_error_rate is not None
                and requests >= least
                and failed > self.max_error_rate * requests
            ):
                return f"{failed} of {requests} {who} failed, allowed is a share of {self.max_error_rate:g}"
        if figures.requests < least:
            return None
        ratio, shift, overlap = figures.latency_ratio, figures.score_shift, figures.overlap
        if self.max_latency_ratio is not None and ratio is not None and ratio > self.max_latency_ratio:
            assert figures.stable_ms is not None and figures.canary_ms is not None
            return (
                f"its median latency is {figures.canary_ms[0]:.2f} ms, the stable one's {figures.stable_ms[0]:.2f} "
                f"ms: {ratio:.2f} times, allowed are {self.max_latency_ratio:g}"
            )
        if self.max_score_shift is not None and shift is not None and shift > self.max_score_shift:
            return f"its scores moved by {shift:.3f} of their mean, allowed are {self.max_score_shift:g}"
        if self.min_overlap is not None and overlap is not None and overlap < self.min_overlap:
            return f"it returns {overlap:.3f} of the stable top k, expected at least {self.min_overlap:g}"
        return None


@dataclass(frozen=True)
class _Pair:
    overlap: float
    stable_seconds: float
    canary_seconds: float
    stable_scores: np.ndarray
    canary_scores: np.ndarray


class Comparison:
    """Collects pairs of answers, the last `KEPT` of them; may be shared between threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._pairs: deque[_Pair] = deque(maxlen=KEPT)
        self._requests = self._failed = self._skipped = 0

    def add(self, stable: Results, stable_seconds: float, canary: Results, canary_seconds: float) -> None:
        """Two answers to one request of B users, and how long the client waited for each."""
        shares = []
        for ours, theirs in zip(stable, canary):
            wanted = {hit.item_id for hit in ours}
            if wanted:
                shares.append(len(wanted & {hit.item_id for hit in theirs}) / len(wanted))
        pair = _Pair(
            float(np.mean(shares)) if shares else 1.0, stable_seconds, canary_seconds, _scores(stable), _scores(canary)
        )  # fmt: skip
        with self._lock:
            self._pairs.append(pair)
            self._requests += 1

    def failed(self) -> None:
        """The canary did not answer a request that the stable model answered."""
        with self._lock:
            self._requests += 1
            self._failed += 1

    def skipped(self) -> None:
        """A copy was not sent: too many are under way."""
        with self._lock:
            self._skipped += 1

    def figures(self) -> Figures:
        """What was found so far."""
        with self._lock:
            pairs, counts = list(self._pairs), (self._requests, self._failed, self._skipped)
        if not pairs:
            return Figures(*counts, None, None, None, None)
        stable, canary = (
            np.concatenate(scores)
            for scores in ([pair.stable_scores for pair in pairs], [pair.canary_scores for pair in pairs])
        )
        return Figures(
            *counts,
            float(np.mean([pair.overlap for pair in pairs])),
            _milliseconds([pair.stable_seconds for pair in pairs]),
            _milliseconds([pair.canary_seconds for pair in pairs]),
            score_shift(stable, canary),
        )


def score_shift(stable: np.ndarray, canary: np.ndarray) -> float | None:
    """stable (n, T), canary (m, T) probabilities -> the farthest that a decile of a task moved, over the mean of the
    stable ones: 0.2 says that what is shown looks 20% more or less likely somewhere in the distribution."""
    if not len(stable) or not len(canary):
        return None
    moved = np.abs(np.quantile(canary, _DECILES, axis=0) - np.quantile(stable, _DECILES, axis=0))  # (9, T)
    return float((moved.max(axis=0) / np.maximum(stable.mean(axis=0), 1e-12)).max())


def _scores(results: Results) -> np.ndarray:
    """(n, T) probabilities of the first hits of every user."""
    rows = [list(hit.scores.values()) for hits in results for hit in hits[:COMPARED]]
    return np.array(rows, np.float64).reshape(len(rows), -1 if rows else 0)


def _milliseconds(seconds: list[float]) -> tuple[float, float]:
    median, slow = np.percentile(seconds, (50, 99)) * 1000
    return float(median), float(slow)
