"""Who is let in: no more than there is room for, and nobody whose time will be over before the answer."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from request_decoding import Deadline
from service_time import ServiceTime

from hsnn_core.errors import HsnnError, Overloaded

# The share of searches that are done in the time which a request must still have. Nobody else wants a worker that is
# free; where others wait for it, it is better given to one of them who is surer to make it. On simulated arrivals
# (tests/server/test_admission.py) both at 0.9 answer as many and nearly twice as many of them late.
_FREE, _WAITING = 0.9, 0.95
# What Triton takes to hand the request over and to return the answer, which is not measured in here.
_WAY_SECONDS = 0.001


class QueueFull(Overloaded):
    """All workers are busy and the queue is full: the request is refused at once."""


class DeadlineUnmeetable(Overloaded):
    """The request's time would be over before its answer: it is refused while there is time to ask elsewhere."""


@dataclass(frozen=True, eq=False)
class Job:
    """One request.

    ``run`` answers it and returns the seconds of worker time that it took, None when they say nothing of others
    (an invalid request); ``refuse`` answers it with an error. What one of them raises is reported, and ends nothing.
    """

    users: int
    deadline: Deadline
    run: Callable[[], float | None]
    refuse: Callable[[HsnnError], None]


class Admission:
    """Decides for ``workers`` of which ``busy`` are at work, and at most ``room`` requests that wait in the order of
    their arrival. It keeps ``times``, and when those at work began. Not locked: its pool is."""

    def __init__(self, workers: int, room: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._workers, self._room, self._clock = workers, room, clock
        self.times = ServiceTime(workers)
        self._began: dict[Job, float] = {}

    def began(self, job: Job) -> None:
        """A worker is at work on ``job``."""
        self._began[job] = self._clock()

    def ended(self, job: Job) -> None:
        """It no longer is."""
        del self._began[job]

    def refusal(self, job: Job, waiting: Sequence[Job], busy: int) -> HsnnError | None:
        """Why ``job`` cannot be taken in; None when it can."""
        if busy + len(waiting) >= self._workers + self._room:
            running, queued = self._counts(waiting, busy)
            return QueueFull(
                f"{running} requests are running and {queued} are waiting, which is all this server takes; send "
                "fewer at a time or add servers (config parameters workers, queue)"
            )
        if (left := job.deadline.seconds_left()) <= 0:
            return job.deadline.exceeded()
        free = self._workers - busy - len(waiting)
        at_work = min(self._workers, busy + len(waiting) + 1)
        if free > 0:
            needed = self._needed(at_work, job, _FREE)
        else:
            needed = self._wait(waiting, busy) + self._needed(at_work, job, _WAITING)
        if needed <= left:
            return None
        if free > 0:
            self.times.doubt(at_work)
        return self._unmeetable(left, needed, waiting, busy)

    def lost(self, waiting: deque[Job], busy: int) -> list[tuple[Job, HsnnError]]:
        """Take the requests out of ``waiting`` that cannot be answered in time any more, each with what to tell it."""
        lost: list[tuple[Job, HsnnError]] = []
        kept: list[Job] = []
        for job in waiting:
            left, needed = job.deadline.seconds_left(), self._needed_in_queue(job, len(kept), busy)
            if needed <= left:
                kept.append(job)
            else:
                late = left <= 0
                why = job.deadline.exceeded() if late else self._unmeetable(left, needed, waiting, busy)
                lost.append((job, why))
        if lost:
            waiting.clear()
            waiting.extend(kept)
        return lost

    def chance(self, job: Job, place: int, busy: int) -> float:
        """Seconds until ``job``, at ``place`` (from 0) of those that wait, is `lost`, by what is known now; infinite
        for one that a free worker is about to take."""
        if place < self._workers - busy:
            return math.inf
        return job.deadline.seconds_left() - self._needed_in_queue(job, place, busy)

    def next_loss(self, waiting: Sequence[Job], busy: int) -> float:
        """Seconds until the first of ``waiting`` is `lost`; infinite when none will be."""
        return min((self.chance(job, place, busy) for place, job in enumerate(waiting)), default=math.inf)

    def _needed_in_queue(self, job: Job, place: int, busy: int) -> float:
        """What the job at ``place`` of those that wait needs from the moment that it is taken."""
        share = _FREE if place < self._workers - busy else _WAITING  # a free worker is about to take it
        return self._needed(min(self._workers, busy + 1), job, share)

    def _needed(self, at_work: int, job: Job, share: float) -> float:
        return self.times.within(at_work, job.users, share) + _WAY_SECONDS

    def _wait(self, waiting: Sequence[Job], busy: int) -> float:
        """Seconds until a worker is free for one more: what the one at work that is nearest to its end still takes,
        and then one is done every (service time / workers)."""
        now = self._clock()
        rests = [self.times.mean(self._workers, job.users) - (now - at) for job, at in self._began.items()]
        first = max(0.0, min(rests, default=self.times.mean(self._workers, 1)))
        before = busy + len(waiting) - self._workers
        users = sum(job.users for job in waiting) / len(waiting) if waiting else 1.0
        return first + before * users * self.times.mean(self._workers, 1) / self._workers

    def _unmeetable(
        self, left: float, needed: float, waiting: Sequence[Job], busy: int
    ) -> DeadlineUnmeetable:
        running, queued = self._counts(waiting, busy)
        return DeadlineUnmeetable(
            f"the request has {left * 1000:.1f} ms left, but with {running} running and {queued} waiting it would "
            f"need about {needed * 1000:.1f} ms; ask another server, allow a longer timeout, or send fewer at a time"
        )

    def _counts(self, waiting: Sequence[Job], busy: int) -> tuple[int, int]:
        """Requests running and waiting; one that a free worker is about to take is running."""
        taken = busy + len(waiting)
        running = min(self._workers, taken)
        return running, taken - running
