"""Runs jobs in worker processes: progress with an ETA, failures reported, Ctrl-C passed on.

Every worker gets one thread: two torch processes of two threads each on two cores wait at each other's barriers and
are twenty times slower.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .jobs import LOG, Job, expected_minutes

POLL_SECONDS = 0.2
REFRESH_SECONDS, REFRESH_SECONDS_OF_A_LOG = 1.0, 60.0
#: For a step, a checkpoint and the way out; then the worker is killed, and loses what came after its last checkpoint.
GRACE_SECONDS = 60.0
TAIL_LINES = 6
WORKER = (sys.executable, "-m", "hsnn_bench.worker")
ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Failure:
    """A job whose worker ended badly, with the last lines of its log."""

    job: Job
    status: int
    tail: str


@dataclass
class _Worker:
    job: Job
    process: subprocess.Popen[bytes]
    began: float


def run_jobs(jobs: Sequence[Job], parallel: int, progress: bool = True, device: str = "cpu") -> list[Failure]:
    """Run what is not done yet on ``device``, at most ``parallel`` at a time; returns the failures, the other jobs are
    done.

    Jobs with one folder are run once. The first seed's jobs come before the second's, so that an interrupted table has
    whole seeds, the longest first. Ctrl-C (and SIGTERM) interrupts the workers, waits for their checkpoints and
    raises KeyboardInterrupt.
    """
    unique = list({job.folder: job for job in jobs}.values())
    done = [(job, record["minutes"]) for job in unique if (record := job.record()) is not None]
    finished = {job.folder for job, _ in done}
    waiting = [job for job in unique if job.folder not in finished]
    waiting.sort(key=lambda job: (job.recipe.train.seed, -job.prior()))
    failures: list[Failure] = []
    running: list[_Worker] = []
    bar = tqdm(total=len(unique), initial=len(done), desc="bench", unit="job", disable=not progress,
               bar_format="{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}")  # fmt: skip
    every = REFRESH_SECONDS if sys.stderr.isatty() else REFRESH_SECONDS_OF_A_LOG
    shown = 0.0
    with bar, _sigterm_as_interrupt(), _stopping(running):
        while waiting or running:
            while waiting and len(running) < parallel:
                running.append(_start(waiting.pop(0), device))
            ended = [w for w in running if w.process.poll() is not None]
            for worker in ended:
                running.remove(worker)
                bar.update()
                record = worker.job.record()
                if worker.process.returncode == 0 and record is not None:
                    done.append((worker.job, record["minutes"]))
                else:
                    failures.append(_failure(worker))
                    tqdm.write(describe_failure(failures[-1]), file=sys.stderr)
            if ended or time.monotonic() - shown >= every:
                bar.set_postfix_str(_status(waiting, running, done, parallel))
                shown = time.monotonic()
            time.sleep(POLL_SECONDS)
    return failures


def describe_failure(failure: Failure) -> str:
    """What failed, how, and the end of its log."""
    where = failure.job.folder / LOG
    indented = "\n".join(f"    {line}" for line in failure.tail.splitlines())
    return (
        f"{failure.job.label}: the worker ended with status {failure.status}; the end of {where}:\n{indented}"
    )


def _start(job: Job, device: str) -> _Worker:
    job.prepare()
    with (job.folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [*WORKER, str(job.folder.resolve()), device],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD},
            start_new_session=True,  # a terminal's Ctrl-C reaches it once, through this process
        )
    return _Worker(job, process, time.monotonic())


def _failure(worker: _Worker) -> Failure:
    text = (worker.job.folder / LOG).read_text(errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    return Failure(worker.job, worker.process.returncode, "\n".join(lines[-TAIL_LINES:]))


def _status(
    waiting: Sequence[Job], running: Sequence[_Worker], done: Sequence[tuple[Job, float]], parallel: int
) -> str:
    """What runs now, and the time until all is done."""
    if not running and not waiting:
        return "done"
    names = ", ".join(w.job.label for w in running)
    expected = expected_minutes([*(w.job for w in running), *waiting], done)
    if expected is None:
        return f"ETA after the first job; now {names}"
    now = time.monotonic()
    spent = [(now - w.began) / 60 for w in running] + [0.0] * len(waiting)
    left = [max(0.0, whole - gone) for whole, gone in zip(expected, spent)]
    lanes = max(1, min(parallel, len(left)))
    minutes = max([sum(left) / lanes, *left])  # no job is shorter for having company
    return f"ETA {duration(minutes)}; now {names}"


def duration(minutes: float) -> str:
    """ "2 h 05 min", "12 min", "under a minute"."""
    if minutes < 1:
        return "under a minute"
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest:02d} min" if hours else f"{rest} min"


@contextmanager
def _stopping(running: list[_Worker]) -> Iterator[None]:
    """On the way out, whatever the reason, no worker is left behind."""
    try:
        yield
    finally:
        _stop([w.process for w in running])


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt, wait for checkpoints, kill what is left. A second Ctrl-C kills at once."""
    alive = [p for p in processes if p.poll() is None]
    try:
        for process in alive:
            process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + GRACE_SECONDS
        for process in alive:
            process.wait(max(0.1, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        for process in alive:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM (a container that is stopped) ends like Ctrl-C. Signals reach the main thread only."""

    def handle(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
