"""Bounded concurrency and admission: a fixed number of workers, a queue that refuses rather than grows, and no
work on requests whose time will be over before their answer."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition, Thread

from request_decoding import Deadline
from service_time import ServiceTime

from hsnn_core.errors import HsnnError, Overloaded

# Mean deviations of the service time that must fit in as well: into the time of a request that arrives, and of
# one that has waited. The second is less, so that what was let in is seldom dropped.
_ON_ARRIVAL, _AFTER_WAITING = 4.0, 1.0
# What Triton takes to hand the request over and to return the answer, which is not measured in here.
_WAY_SECONDS = 0.001


class QueueFull(Overloaded):
    """All workers are busy and the queue is full: the request is refused at once."""


class DeadlineUnmeetable(Overloaded):
    """The request's time would be over before its answer: it is refused while there is time to ask elsewhere."""


@dataclass(frozen=True)
class Job:
    """One request.

    ``run`` answers it and returns the seconds of worker time that it took, None when they say nothing of others
    (an invalid request); ``refuse`` answers it with an error. What one of them raises is reported, and ends nothing.
    """

    users: int
    deadline: Deadline
    run: Callable[[], float | None]
    refuse: Callable[[HsnnError], None]


class WorkerPool:
    """``workers`` requests run, ``queue`` more wait in the order of their arrival.

    Refused at once is a request that finds no place (QueueFull), and one that, by the service time measured so
    far and what waits before it, cannot meet its deadline (DeadlineUnmeetable). One that waits and has lost its
    chance is refused when the next one arrives or a worker is free, whichever is first.

    Triton sees a request as executed as soon as it is handed over, so its own queue never fills: this is the
    only place where load is held back.
    """

    def __init__(
        self,
        workers: int,
        queue: int,
        clock: Callable[[], float] = time.perf_counter,
        report: Callable[[Exception], None] = traceback.print_exception,
    ) -> None:
        self._workers, self._room, self._clock, self._report = workers, queue, clock, report
        self._times = ServiceTime(workers)
        self._busy = 0
        self._waiting: deque[Job] = deque()
        self._changed = Condition()
        self._closing = False
        self._threads = [
            Thread(target=self._work, name=f"hsnn-retrieve-{n}", daemon=True) for n in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Run ``job`` on a worker as soon as one is free; QueueFull, DeadlineUnmeetable or DeadlineExceeded when
        it is refused."""
        with self._changed:
            lost = self._lost()
            refusal = self._refusal(job)
            if refusal is None:
                self._waiting.append(job)
                self._changed.notify()
        self._refuse(lost)
        if refusal is not None:
            raise refusal

    def drain(self, patience: float = 10.0) -> None:
        """Finish everything that was accepted, then stop the workers; one that takes longer than ``patience`` seconds
        is left to itself."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        until = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                lost = self._lost()
                job = self._waiting.popleft() if self._waiting else None
                self._busy += job is not None
                busy = self._busy
            self._refuse(lost)
            if job is not None:
                self._run(job, busy)
            del job, lost  # an idle worker keeps no request's inputs

    def _run(self, job: Job, busy: int) -> None:
        seconds = None
        try:
            seconds = job.run()
        except Exception as error:  # a worker lives on
            self._report(error)
        finally:
            with self._changed:
                self._busy -= 1
                if seconds is not None:
                    self._times.add(busy, job.users, seconds)

    def _refusal(self, job: Job) -> HsnnError | None:
        """Why ``job`` cannot be taken in; None when it can. Call with the lock."""
        if self._busy + len(self._waiting) >= self._workers + self._room:
            running, waiting = self._counts()
            return QueueFull(
                f"{running} requests are running and {waiting} are waiting, which is all this server takes; send "
                "fewer at a time or add servers (config parameters workers, queue)"
            )
        if (left := job.deadline.seconds_left()) <= 0:
            return job.deadline.exceeded()
        free = self._workers - self._busy - len(self._waiting)
        wait = 0.0
        if free <= 0:
            # Of the workers, all at work, one is done every (service time / workers).
            users = sum(waiting.users for waiting in self._waiting)
            places = 1 + len(self._waiting) - (self._workers - self._busy)
            mean = users / len(self._waiting) if self._waiting else 1.0
            wait = self._times.seconds(self._workers, 1) * mean * places / self._workers
        busy = min(self._workers, self._busy + len(self._waiting) + 1)
        needed = wait + self._times.seconds(busy, job.users, _ON_ARRIVAL) + _WAY_SECONDS
        if needed <= left:
            return None
        if free > 0:
            self._times.doubt(busy)
        return self._unmeetable(left, needed)

    def _lost(self) -> list[tuple[Job, HsnnError]]:
        """Take the requests out of the queue that cannot be answered in time any more, each with what to tell it.
        Call with the lock."""
        lost: list[tuple[Job, HsnnError]] = []
        kept: deque[Job] = deque()
        for job in self._waiting:
            left = job.deadline.seconds_left()
            busy = min(self._workers, self._busy + 1)
            needed = self._times.seconds(busy, job.users, _AFTER_WAITING) + _WAY_SECONDS
            if needed <= left:
                kept.append(job)
            else:
                late = left <= 0
                lost.append((job, job.deadline.exceeded() if late else self._unmeetable(left, needed)))
        self._waiting = kept
        return lost

    def _unmeetable(self, left: float, needed: float) -> DeadlineUnmeetable:
        running, waiting = self._counts()
        return DeadlineUnmeetable(
            f"the request has {left * 1000:.1f} ms left, but with {running} running and {waiting} waiting it would "
            f"need about {needed * 1000:.1f} ms; ask another server, allow a longer timeout, or send fewer at a time"
        )

    def _counts(self) -> tuple[int, int]:
        """Requests running and waiting; one that a free worker is about to take is running."""
        taken = self._busy + len(self._waiting)
        running = min(self._workers, taken)
        return running, taken - running

    def _refuse(self, lost: list[tuple[Job, HsnnError]]) -> None:
        for job, error in lost:
            try:
                job.refuse(error)
            except Exception as unexpected:  # the others are to be told, too
                self._report(unexpected)
