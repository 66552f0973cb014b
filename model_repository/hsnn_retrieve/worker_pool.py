"""Bounded concurrency: a fixed number of workers, a queue that refuses rather than grows, and no work on requests whose
time will be over before their answer."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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

    def __init__(self, workers: int, queue: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
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
                self._waiting.append(replace(job, run=partial(self._watched, job)))
                self._changed.notify()
                last = len(self._waiting) - 1
                if self._clock() + self._admission.chance(job, last, self._busy) < self._next_look:
                    self._look_sooner.notify()
        self._refuse(lost)
        if refusal is not None:
            raise refusal

    def drain(self) -> None:
        """Finish everything that was accepted, then stop the workers."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        with self._look_sooner:
            self._drained = True
            self._look_sooner.notify()
        self._reaper.join()

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
            if job is None:
                continue
            seconds = job.run()
            with self._changed:
                self._busy -= 1
                if seconds is not None:
                    self._times.add(busy, job.users, seconds)

    def _watched(self, job: Job) -> float | None:
        """Answer ``job``, with its beginning known to admission."""
        with self._changed:
            self._admission.began(job)
        try:
            return job.run()
        finally:
            with self._changed:
                self._admission.ended(job)

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

    @staticmethod
    def _refuse(lost: list[tuple[Job, HsnnError]]) -> None:
        for job, error in lost:
            job.refuse(error)
