"""The search for the most that a server takes while a latency percentile holds.

A single measurement is noise: the p99 of a thousand requests is the tenth slowest, and other programs use the machine,
too. So a level has about a thousand arrivals, it holds when two of three measurements do, and one that is slower than
its load explains is measured again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .perf_analyzer import Level

CLOSED_LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
LONGEST = 120.0  # seconds of a level that needs them for its arrivals
VOTES = 3
PRECISION = 1.05  # the search ends when the least rate that fails is this much above the greatest that holds
_SLOWEST = 1.0  # requests a second: below it there is no percentile to speak of
_BRACKET = 1.4
_CONFIRMATIONS, _DOWN, _UP = 6, 0.9, 1.1
_GROWN, _FLAT = 1.03, 2  # throughput that grows by less at two numbers under way in a row has come to its end
_BUSY = 1.2  # times the median latency of other rates

Measure = Callable[[str, float, float, int], Level]


@dataclass(frozen=True)
class Closed:
    """The closed loop. ``load``: the number under way of most throughput within the limit, ``throughput`` at it, and
    the ``requests`` that say so (all 0: the limit holds at none); ``saturation``: the most throughput at all."""

    load: float
    throughput: float
    requests: int
    saturation: float


class CapacitySearch:
    """Measures levels by ``measure`` (kind, load, seconds, seed) until it knows at which ``percentile`` ("p99") stays
    within ``latency_ms``; keeps all ``levels`` in their order.

    ``seconds``: the least that a level lasts; longer ones have ``arrivals`` requests, or last `LONGEST`. ``alone``: the
    requests a second that one client gets answered one after another.
    """

    def __init__(
        self,
        measure: Measure,
        percentile: str,
        latency_ms: float,
        *,
        seconds: float,
        arrivals: int,
        alone: float,
        say: Callable[[str], None],
    ) -> None:
        self._measure, self._percentile, self._latency_ms = measure, percentile, latency_ms
        self._seconds, self._arrivals, self._alone, self._say = seconds, arrivals, alone, say
        self._slow_by_load = np.inf  # the least rate whose latency is high because of the rate
        self.levels: list[Level] = []

    def closed(self) -> Closed:
        """More and more requests under way until throughput has stopped to grow; three of each number until the limit
        no longer holds."""
        best, saturation, flat, holds = Closed(0, 0.0, 0, 0.0), 0.0, 0, True
        expected = self._alone
        for load in CLOSED_LADDER:
            levels = (
                self._vote("closed", load, expected) if holds else [self._level("closed", load, expected)]
            )
            throughput = float(np.median([level.throughput for level in levels]))
            if holds := holds and self._held(levels):
                within = [level for level in levels if self._within(level)]
                got = float(np.median([level.throughput for level in within]))
                if got > best.throughput:
                    best = Closed(load, got, sum(level.requests for level in within), 0.0)
            flat = 0 if throughput > _GROWN * saturation else flat + 1
            saturation = max(saturation, throughput)
            expected = throughput or expected
            if flat == _FLAT or levels[-1].failure is not None:
                break
        return replace(best, saturation=saturation)

    def open(self, start: float) -> float | None:
        """The greatest rate of Poisson arrivals at which the limit holds, searched from ``start`` on; None when it
        holds at none. It is bisected, measured once more (a rate that then fails gives way to a lower one), and raised
        by a tenth as long as that holds."""
        rate, low, high = max(_SLOWEST, start), 0.0, 0.0
        while not (low and high):
            if self._holds(rate):
                low, rate = rate, rate * _BRACKET
            else:
                high, rate = rate, rate / _BRACKET
            if rate < _SLOWEST:
                return None
        while high / low > PRECISION:
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self._holds(middle) else (low, middle)
        for _ in range(_CONFIRMATIONS):
            if self._holds(low):
                break
            low *= _DOWN
        else:
            return None
        for _ in range(_CONFIRMATIONS):
            if not self._holds(_UP * low):
                break
            low *= _UP
        return low

    def at(self, rate: float) -> list[Level]:
        """`VOTES` levels of Poisson arrivals."""
        return [self._level("open", rate, rate) for _ in range(VOTES)]

    def requests(self, rate: float) -> int:
        """How many were answered in all open levels of that rate which count."""
        return sum(level.requests for level in self._counted() if level.load == rate)

    def _holds(self, rate: float) -> bool:
        return self._held(self._vote("open", rate, rate))

    def _held(self, levels: list[Level]) -> bool:
        return sum(map(self._within, levels)) * 2 > len(levels)

    def _within(self, level: Level) -> bool:
        return level.within(self._percentile, self._latency_ms)

    def _vote(self, kind: str, load: float, expected: float) -> list[Level]:
        """Levels until most of three agree."""
        levels: list[Level] = []
        while len(levels) < VOTES and not (
            len(levels) == 2 and self._within(levels[0]) == self._within(levels[1])
        ):
            level = self._level(kind, load, expected)
            if kind == "open" and self._disturbed(level):
                self.levels[-1] = replace(level, disturbed=True)
                self._say("       that is slower than its neighbours: the machine is busy, once more")
                level = self._level(kind, load, expected)
                if self._slower(level, [other for other in self._counted() if other.load < load]):
                    self._slow_by_load = min(self._slow_by_load, load)
            levels.append(level)
        return levels

    def _disturbed(self, level: Level) -> bool:
        """Slower at the median than others of lower rates, or of higher ones: the first may be its load, which a second
        measurement then shows."""
        if level.load >= self._slow_by_load:
            return False
        lower = [other for other in self._counted() if other.load < level.load]
        higher = [other for other in self._counted() if other.load > level.load]
        return self._slower(level, lower) or self._slower(level, higher)

    @staticmethod
    def _slower(level: Level, others: list[Level]) -> bool:
        medians = [other.latency_ms["p50"] for other in others]
        slow = (
            level.failure is None and bool(medians) and level.latency_ms["p50"] > _BUSY * np.median(medians)
        )
        return bool(slow)

    def _counted(self) -> list[Level]:
        """The open levels that say something of latency."""
        return [
            level
            for level in self.levels
            if level.kind == "open" and level.failure is None and not level.disturbed
        ]

    def _level(self, kind: str, load: float, expected: float) -> Level:
        seconds = max(self._seconds, min(LONGEST, self._arrivals / expected))
        level = self._measure(kind, load, seconds, len(self.levels))
        self.levels.append(level)
        what = f"{load:g} under way" if kind == "closed" else f"{load:.1f} arrivals/s"
        if level.failure is not None:
            self._say(f"{kind:6} {what}: refused: {level.failure}")
        else:
            self._say(
                f"{kind:6} {what}: {level.throughput:.1f}/s, p50 {level.latency_ms['p50']:.1f} ms, {self._percentile} "
                f"{level.latency_ms[self._percentile]:.1f} ms, {level.requests:,} requests, sent late "
                f"{100 * level.delayed:.1f}%"
            )
        return level
