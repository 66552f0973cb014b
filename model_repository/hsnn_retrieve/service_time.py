"""How long a search takes on this server at present: what admission reckons with."""

from __future__ import annotations

# The gains of TCP's round-trip estimate (RFC 6298), which follows a changing time just as well.
_GAIN, _DEVIATION_GAIN = 1 / 8, 1 / 4
_FORGOTTEN = 0.01  # of the estimate, by a refusal that rests on it alone
_FIRST = 4  # measurements of which the least counts


class ServiceTime:
    """Seconds that a worker takes per user of a request: smoothed mean and mean deviation.

    Kept by the number of workers at work when the search began, because workers share cores: four searches at
    once may each take twice as long as one alone. A level without a measurement counts as the next lower one
    that has, and without any an estimate is 0: a server that knows nothing refuses nothing. Of the first measurements
    the least counts: a snapshot that just took over is slower than it is going to be, and would refuse for it.
    Requests of many users take less per user than those of one, so among others they are rated too long. Not
    locked: its pool is.
    """

    def __init__(self, workers: int) -> None:
        self._mean = [0.0] * (workers + 1)
        self._deviation = [0.0] * (workers + 1)
        self._count = [0] * (workers + 1)

    def add(self, busy: int, users: int, seconds: float) -> None:
        """A search of ``users`` took ``seconds``; it began as one of ``busy`` (1..workers) at work."""
        took = seconds / users
        self._count[busy] += 1
        if self._count[busy] <= _FIRST:
            self._mean[busy] = min(took, self._mean[busy] or took)
            self._deviation[busy] = self._mean[busy] / 2
            return
        error = took - self._mean[busy]
        self._deviation[busy] += _DEVIATION_GAIN * (abs(error) - self._deviation[busy])
        self._mean[busy] += _GAIN * error

    def seconds(self, busy: int, users: int, deviations: float = 0.0) -> float:
        """What a search of ``users`` is going to take as one of ``busy``: the mean and so many mean deviations."""
        level = next((level for level in range(busy, 0, -1) if self._mean[level]), busy)
        return users * (self._mean[level] + deviations * self._deviation[level])

    def doubt(self, busy: int) -> None:
        """A request was refused although a worker was free. Nothing is measured while everything is refused, so an
        estimate that was too high once would stay: it shrinks until a request is tried."""
        level = next((level for level in range(busy, 0, -1) if self._mean[level]), busy)
        self._mean[level] *= 1 - _FORGOTTEN
        self._deviation[level] *= 1 - _FORGOTTEN
