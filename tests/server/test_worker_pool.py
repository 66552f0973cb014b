"""Admission and the bounded queue by themselves, on a clock that tests set."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_snapshot import orchestrator_modules

from hsnn_core.errors import DeadlineExceeded, HsnnError, Overloaded

MODULES = ("request_decoding", "service_time", "admission", "worker_pool")


@pytest.fixture
def code() -> Iterator[SimpleNamespace]:
    with orchestrator_modules(*MODULES) as modules:
        yield modules


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Request:
    """A job that holds its worker until it is let go, and then says how long it took."""

    def __init__(self, code: SimpleNamespace, clock: Clock, allowed: float | None, users: int = 1) -> None:
        self.entered, self.go, self.done, self.seconds = Event(), Event(), Event(), 0.1
        self.refused: list[HsnnError] = []
        self.told = Event()
        deadline = code.request_decoding.Deadline(int((allowed or 0) * 1e6), clock)
        self.job = code.admission.Job(users, deadline, self._run, self._refuse)

    def _run(self) -> float | None:
        self.entered.set()
        assert self.go.wait(20)
        self.done.set()
        return self.seconds

    def _refuse(self, error: HsnnError) -> None:
        self.refused.append(error)
        self.told.set()

    def finish(self, seconds: float) -> None:
        self.seconds = seconds
        self.go.set()
        assert self.done.wait(20)


class World:
    """A pool whose service time is known: one search alone takes 0.1 s, two at once 0.2 s each."""

    def __init__(self, code: SimpleNamespace, workers: int, queue: int) -> None:
        self.code, self.clock = code, Clock()
        self.pool = code.worker_pool.WorkerPool(workers, queue, self.clock)
        for busy in range(1, workers + 1):
            for _ in range(60):
                self.pool._times.add(busy, 1, 0.1 * busy)
        self.asked: list[Request] = []

    def ask(self, allowed: float | None = None, users: int = 1) -> Request:
        request = Request(self.code, self.clock, allowed, users)
        self.asked.append(request)
        self.pool.submit(request.job)
        return request

    def run(self, count: int) -> list[Request]:
        """So many requests that are at work."""
        running = [self.ask() for _ in range(count)]
        assert all(request.entered.wait(20) for request in running)
        return running

    def close(self) -> None:
        for request in self.asked:
            request.go.set()
        self.pool.drain()


@pytest.fixture
def world(code: SimpleNamespace) -> Iterator[Any]:
    made: list[World] = []

    def make(workers: int, queue: int) -> World:
        made.append(World(code, workers, queue))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_full_queue_refuses(world: Any) -> None:
    full = world(1, 2)
    full.run(1)
    full.ask(), full.ask()
    with pytest.raises(Overloaded, match="1 requests are running and 2 are waiting, which is all"):
        full.ask()


def test_without_a_deadline_only_room_counts(world: Any) -> None:
    busy = world(1, 50)
    busy.run(1)
    assert not any(busy.ask().refused for _ in range(50))


@pytest.mark.parametrize(
    ("waiting", "allowed", "admitted"),
    [(0, 0.15, False), (0, 0.25, True), (2, 0.35, False), (2, 0.45, True)],
)
def test_the_queue_ahead_counts(world: Any, waiting: int, allowed: float, admitted: bool) -> None:
    """One worker at 0.1 s a search: a place is free after 0.1 s, and again 0.1 s later for each that waits."""
    busy = world(1, 50)
    busy.run(1)
    for _ in range(waiting):
        busy.ask()
    if admitted:
        busy.ask(allowed)
    else:
        with pytest.raises(
            Overloaded, match=f"with 1 running and {waiting} waiting it would need about {waiting + 2}01.0 ms"
        ):
            busy.ask(allowed)


def test_workers_that_share_cores_are_slower(world: Any) -> None:
    pair = world(2, 50)
    pair.run(1)
    with pytest.raises(Overloaded, match="it would need about 201.0 ms"):
        pair.ask(0.15)
    pair.ask(0.25)


def test_more_users_take_longer(world: Any) -> None:
    idle = world(1, 5)
    with pytest.raises(Overloaded, match="it would need about 401.0 ms"):
        idle.ask(0.3, users=4)
    idle.ask(0.5, users=4)


def test_who_lost_the_chance_by_waiting_is_refused_before_the_time_is_over(world: Any) -> None:
    busy = world(1, 50)
    (running,) = busy.run(1)
    late, patient = busy.ask(0.25), busy.ask(5.0)
    busy.clock.now += 0.2
    running.finish(0.1)
    assert patient.entered.wait(20) and late.told.wait(20)
    assert [type(error).__name__ for error in late.refused] == ["DeadlineUnmeetable"]
    assert not late.entered.is_set()


def test_the_next_arrival_refuses_them_too(world: Any) -> None:
    busy = world(1, 50)
    busy.run(1)
    late, over = busy.ask(0.3), busy.ask(0.37)
    busy.clock.now += 0.25
    busy.ask()
    assert late.told.wait(20)
    assert [type(error).__name__ for error in late.refused] == ["DeadlineUnmeetable"]
    assert not over.refused
    busy.clock.now += 1
    busy.ask()
    assert over.told.wait(20)
    assert [type(error) for error in over.refused] == [DeadlineExceeded]


def test_who_loses_the_chance_hears_so_although_nothing_happens(world: Any) -> None:
    """No arrival, and no worker is free: it is refused when what is left is less than a search takes."""
    busy = world(1, 50)
    busy.run(1)
    busy.clock.now += 0.1
    patient, late = busy.ask(5.0), busy.ask(0.221)
    busy.clock.now += 0.12
    assert late.told.wait(20)
    assert [type(error).__name__ for error in late.refused] == ["DeadlineUnmeetable"]
    assert not patient.refused and not patient.entered.is_set()


def test_a_drained_pool_leaves_no_thread(world: Any) -> None:
    busy = world(2, 5)
    busy.ask().go.set()
    busy.close()
    assert not [thread.name for thread in (busy.pool._reaper, *busy.pool._threads) if thread.is_alive()]


def test_an_estimate_that_refuses_everything_is_doubted(world: Any) -> None:
    """Nothing is measured while all are refused: one slow search must not close the server for good."""
    idle = world(1, 5)
    refused = 0
    while True:
        try:
            idle.ask(0.05)
        except Overloaded:
            refused += 1
            assert refused < 200
        else:
            break
    assert refused > 20


def test_a_server_that_knows_nothing_refuses_nothing(code: SimpleNamespace) -> None:
    times = code.service_time.ServiceTime(3)
    assert times.mean(3, 8) == times.within(3, 8, 0.95) == 0
    times.add(1, 2, 0.4)
    assert times.mean(1, 1) == times.mean(3, 1) == pytest.approx(0.2), (
        "a level without measurements: the one below"
    )
    assert times.within(2, 2, 0.9) == pytest.approx(0.4)
    for _ in range(100):
        times.add(2, 1, 0.5)
    assert times.mean(1, 1) == pytest.approx(0.2)
    assert times.mean(2, 1) == pytest.approx(0.5)


def test_a_slow_start_is_forgotten(code: SimpleNamespace) -> None:
    times = code.service_time.ServiceTime(1)
    for seconds in (0.300, 0.012, 0.200, 0.010):
        times.add(1, 1, seconds)
    assert times.within(1, 1, 0.95) == pytest.approx(0.010), "the first searches of a process are slow"
    times.add(1, 1, 0.4)
    assert times.within(1, 1, 0.95) == pytest.approx(0.010), "and the fifth may be"
    for _ in range(64):
        times.add(1, 1, 0.2)
    assert times.mean(1, 1) == pytest.approx(0.2, rel=0.01)


def test_the_estimate_follows_the_load(code: SimpleNamespace) -> None:
    times = code.service_time.ServiceTime(1)
    for _ in range(64):
        times.add(1, 1, 0.010)
    assert times.within(1, 1, 0.95) == pytest.approx(0.010, rel=0.01)
    for _ in range(8):
        times.add(1, 1, 0.020)
    assert times.within(1, 1, 0.9) == pytest.approx(0.020, rel=0.01), "a slower server is noticed at once"
    for _ in range(64):
        times.add(1, 1, 0.020)
    assert times.mean(1, 1) == pytest.approx(0.020, rel=0.01)
    for step in range(100):
        times.add(1, 1, 0.010 if step % 2 else 0.030)
    assert times.within(1, 1, 0.9) > times.mean(1, 1) * 1.3, "unsteady times need more room"


def test_a_worker_outlives_what_its_job_raises(code: SimpleNamespace) -> None:
    reported: list[Exception] = []
    pool = code.worker_pool.WorkerPool(1, 5, report=reported.append)
    deadline, done = code.request_decoding.Deadline(0), Event()

    def fails() -> float:
        raise RuntimeError("no answer could be built")

    def refuse(error: HsnnError) -> None:
        raise AssertionError(error)

    for run in (fails, fails, lambda: done.set()):
        pool.submit(code.admission.Job(1, deadline, run, refuse))
    assert done.wait(20), "the one worker goes on"
    pool.drain()
    assert [str(error) for error in reported] == ["no answer could be built"] * 2
    assert pool._busy == 0


def test_a_refusal_that_fails_keeps_nobody_from_theirs(code: SimpleNamespace) -> None:
    reported: list[Exception] = []
    clock, told = Clock(), []
    pool = code.worker_pool.WorkerPool(1, 5, clock, reported.append)
    running = Request(code, clock, None)
    pool.submit(running.job)
    assert running.entered.wait(20)

    def gone(error: HsnnError) -> None:
        raise RuntimeError("the client is gone")

    for refuse in (gone, told.append):
        deadline = code.request_decoding.Deadline(100_000, clock)
        pool.submit(code.admission.Job(1, deadline, lambda: None, refuse))
    clock.now += 1
    running.finish(0.1)
    pool.drain()
    assert [type(error) for error in told] == [DeadlineExceeded]
    assert [str(error) for error in reported] == ["the client is gone"]


def test_an_idle_worker_keeps_no_inputs(code: SimpleNamespace) -> None:
    class Inputs:
        def run(self) -> None:
            done.set()

        def refuse(self, error: HsnnError) -> None:
            raise AssertionError(error)

    done = Event()
    pool = code.worker_pool.WorkerPool(1, 5)
    inputs = Inputs()
    kept = weakref.ref(inputs)
    pool.submit(code.admission.Job(1, code.request_decoding.Deadline(0), inputs.run, inputs.refuse))
    del inputs
    assert done.wait(20)
    until = time.monotonic() + 5
    while kept() is not None and time.monotonic() < until:
        gc.collect()
        time.sleep(0.001)
    assert kept() is None
    pool.drain()


def test_a_worker_that_hangs_is_left_behind(code: SimpleNamespace) -> None:
    pool, clock = code.worker_pool.WorkerPool(2, 5), Clock()
    hanging = Request(code, clock, None)
    pool.submit(hanging.job)
    assert hanging.entered.wait(20)
    began = time.monotonic()
    pool.drain(patience=0.05)
    assert 0.04 < time.monotonic() - began < 5
    hanging.go.set()
    pool.drain()
    assert not any(thread.is_alive() for thread in pool._threads)
