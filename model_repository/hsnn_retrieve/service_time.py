"""How long a search takes on this server at present: what admission reckons with."""

from __future__ import annotations

from collections import deque

_KEPT = 64  # latest searches: few enough to follow a server that slows down, enough for their 95th percentile
_FIRST = 4  # measurements of which the least counts,
_ASSUMED = 8  # for as many as these, until there are more
_TRIED = 0.9  # a search that was let in by a doubted estimate and is faster than this quantile of it ends the doubt
_BELIEVED = 50  # refusals that may rest on an estimate alone; each further one shrinks it,
_FORGOTTEN = 0.01  # by this share, until a request is tried


class ServiceTime:
    """Seconds that a worker takes per user of a request: the mean and the quantiles of the latest searches.

    Quantiles, because a search in a hundred that takes five times as long moves a smoothed mean and deviation for the
    next ten, while of the 90th percentile it is what is allowed to be late.

    Kept by the number of workers at work when the search began, because workers share cores: four searches at
    once may each take twice as long as one alone. A level without a measurement counts as the next lower one
    that has, and without any an estimate is 0: a server that knows nothing refuses nothing. Of the first measurements
    the least counts: a snapshot that just took over is slower than it is going to be, and would refuse for it.
    Requests of many users take less per user than those of one, so among others they are rated too long. Not
    locked: its pool is.
    """

    def __init__(self, workers: int) -> None:
        self._levels = [_Level() for _ in range(workers + 1)]

    def add(self, busy: int, users: int, seconds: float) -> None:
        """A search of ``users`` took ``seconds``; it began as one of ``busy`` (1..workers) at work."""
        self._levels[busy].add(seconds / users)

    def mean(self, busy: int, users: int) -> float:
        """Seconds that a search of ``users`` takes as one of ``busy``."""
        return users * self._known(busy).mean

    def within(self, busy: int, users: int, share: float) -> float:
        """Seconds within which so large a ``share`` of such searches have ended."""
        return users * self._known(busy).quantile(share)

    def doubt(self, busy: int) -> None:
        """A request was refused although a worker was free. Nothing is measured while everything is refused, so an
        estimate that was too high once would stay: after some such refusals it shrinks until a request is tried."""
        self._known(busy).refusals += 1

    def _known(self, busy: int) -> _Level:
        return next((self._levels[n] for n in range(busy, 0, -1) if self._levels[n].mean), self._levels[busy])


class _Level:
    """The latest searches with one number of workers at work."""

    def __init__(self) -> None:
        self.mean = 0.0
        self.refusals = 0  # that rest on the estimate alone, since the last search
        self._count = 0
        self._latest: deque[float] = deque(maxlen=_KEPT)
        self._ordered: list[float] = []

    def add(self, seconds: float) -> None:
        self._count += 1
        if self._doubt() < 1 and seconds < self.quantile(_TRIED):  # what was known is no longer so
            self._keep([seconds] * _ASSUMED)
        elif self._count <= _FIRST:
            least = min(seconds, self.mean or seconds)
            self._keep([least] * _ASSUMED)
        else:
            self._keep([*self._latest, seconds])
        self.refusals = 0

    def quantile(self, share: float) -> float:
        if not self._ordered:
            return 0.0
        return self._doubt() * self._ordered[int(share * (len(self._ordered) - 1))]

    def _doubt(self) -> float:
        return float((1 - _FORGOTTEN) ** max(0, self.refusals - _BELIEVED))

    def _keep(self, seconds: list[float]) -> None:
        self._latest = deque(seconds, _KEPT)
        self._ordered = sorted(self._latest)
        self.mean = sum(self._latest) / len(self._latest) if self._latest else 0.0
