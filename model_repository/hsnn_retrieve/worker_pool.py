"""Bounded concurrency: a fixed number of workers and a queue that refuses rather than grows."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import BoundedSemaphore

from hsnn_core.errors import ServerError


class QueueFull(ServerError):
    """All workers are busy and the queue is full: the request is refused at once."""


class WorkerPool:
    """``workers`` requests run, ``queue`` more wait; the next is refused with QueueFull.

    Triton sees a request as executed as soon as it is handed over, so its own queue never fills: this is the
    only place where load is held back.
    """

    def __init__(self, workers: int, queue: int) -> None:
        self._workers, self._queue = workers, queue
        self._places = BoundedSemaphore(workers + queue)
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="hsnn-retrieve")

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job`` (which must not raise) on a worker; QueueFull when there is no place left."""
        if not self._places.acquire(blocking=False):
            raise QueueFull(
                f"{self._workers} requests are running and {self._queue} are waiting, which is all this "
                "server takes; send fewer at a time or add servers (config parameters workers, queue)"
            )
        self._executor.submit(self._run, job)

    def drain(self) -> None:
        """Finish everything that was accepted, then stop the workers."""
        self._executor.shutdown(wait=True)

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        finally:
            self._places.release()
