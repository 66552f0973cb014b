"""Bounded concurrency: a fixed number of workers, a queue that refuses rather than grows, and no work on requests whose
time will be over before their answer."""

from __future__ import annotations

import math
import time
import traceback
from collections import deque
from collections.abc import Callable
from threading import Condition, Lock, Thread

from admission import Admission, Job

from hsnn_core.errors import HsnnError

_SOONEST_LOOK = 0.001  # seconds


class WorkerPool:
    """``workers`` requests run, ``queue`` more wait in the order of their arrival.

    Refused is what `Admission` says, at once where it can: a request that finds no place (QueueFull) or cannot meet its
    deadline by the service time measured so far and what waits before it (DeadlineUnmeetable). One that waits and loses
    its chance is refused at that moment, by a thread that waits for it.

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
        self._clock, self._report = clock, report
        self._admission = Admission(workers, queue, clock)
        self._times = self._admission.times
        self._busy = 0
        self._waiting: deque[Job] = deque()
        lock = Lock()
        self._changed, self._look_sooner = Condition(lock), Condition(lock)
        self._closing = self._drained = False
        self._next_look = math.inf
        self._reaper = Thread(target=self._reap, name="hsnn-retrieve-reaper", daemon=True)
        self._reaper.start()
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
            refusal = self._admission.refusal(job, self._waiting, self._busy)
            if refusal is None:
                self._waiting.append(job)
                self._changed.notify()
                last = len(self._waiting) - 1
                if self._clock() + self._admission.chance(job, last, self._busy) < self._next_look:
                    self._look_sooner.notify()
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
        with self._look_sooner:
            self._drained = True
            self._look_sooner.notify()
        self._reaper.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                lost = self._lost()
                job = self._waiting.popleft() if self._waiting else None
                if job is not None:
                    self._busy += 1
                    self._admission.began(job)
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
                self._admission.ended(job)
                if seconds is not None:
                    self._times.add(busy, job.users, seconds)

    def _reap(self) -> None:
        """Refuse whatever loses its chance by waiting, although nothing arrives and no worker is free."""
        while True:
            with self._look_sooner:
                if self._drained:
                    return
                lost = self._lost()
                if not lost:
                    soon = self._admission.next_loss(self._waiting, self._busy)
                    self._next_look = self._clock() + soon
                    self._look_sooner.wait(None if soon == math.inf else max(soon, _SOONEST_LOOK))
            self._refuse(lost)

    def _lost(self) -> list[tuple[Job, HsnnError]]:
        """Take the requests out of the queue that cannot be answered in time any more. Call with the lock."""
        return self._admission.lost(self._waiting, self._busy)

    def _refuse(self, lost: list[tuple[Job, HsnnError]]) -> None:
        for job, error in lost:
            try:
                job.refuse(error)
            except Exception as unexpected:  # the others are to be told, too
                self._report(unexpected)
