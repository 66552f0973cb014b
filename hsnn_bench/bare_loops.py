"""What the cores give without a server: one bare loop, and as many at once as there are cores, each in its own process.

Searches that run at once share caches, memory bandwidth and whatever else the cores have in common, so n loops answer
fewer than n times what one does. A server cannot answer more than they do: its saturation is compared with that.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import numpy as np

from export.exported import open_export
from hsnn_core.bundle import Bundle

from .orchestrator import WARM_UP, BareLoop, Wire

ROUNDS = 3
_PATIENCE = 120.0  # seconds that a loop waits for the others, which may still load


@dataclass(frozen=True)
class Phase:
    """One loop's searches of a while, with what they took."""

    searches: int
    seconds: float
    cpu_seconds: float


def bare_loops(run: Path, wire: Mapping[str, np.ndarray], k: int, seconds: float) -> dict[str, Any]:
    """Search requests ``wire`` (R, ...) over the export of ``run``, ``k`` items each at its own widths, by one loop and
    then by one per core, `ROUNDS` times ``seconds`` each; medians over rounds.

    Returns {"loops", "widths", "alone", "at_once"}, the last two {"requests_per_second" of all loops together,
    "cpu_ms" per request}. Raises PublishError without an export.
    """
    loops = len(os.sched_getaffinity(0))
    widths = [int(width) for width in Bundle.open(open_export(run).bundle, verify=False).manifest["widths"]]
    context = multiprocessing.get_context("spawn")  # ONNX Runtime's threads do not survive a fork
    with context.Manager() as manager, ProcessPoolExecutor(loops, mp_context=context) as pool:
        gate = manager.Barrier(loops)
        started = [pool.submit(_loop, n, gate, run, dict(wire), k, widths, seconds) for n in range(loops)]
        failed = [error for loop in started if (error := loop.exception()) is not None]
        if failed:  # whoever waited in vain does not know why
            raise min(failed, key=lambda error: isinstance(error, BrokenBarrierError))
        taken = [loop.result() for loop in started]
    return {
        "loops": loops,
        "widths": widths,
        "alone": _together([phases[0::2] for phases in taken[:1]]),
        "at_once": _together([phases[1::2] for phases in taken]),
    }


def _loop(
    number: int, gate: Barrier, run: Path, wire: Wire, k: int, widths: Sequence[int], seconds: float
) -> list[Phase]:
    """In its own process: phases in turns, alone (only loop 0 works) and at once."""
    try:
        exported = open_export(run)
        bundle = Bundle.open(exported.bundle, verify=False)
        loop = BareLoop(exported, bundle, widths, min(k, bundle.index.items))
        rows = len(next(iter(wire.values())))
        order = np.random.default_rng(number).permutation(rows)  # loops do not ask the same at the same time
        requests = cycle([{name: value[row : row + 1] for name, value in wire.items()} for row in order])
        for _ in range(WARM_UP):
            loop.search(next(requests))
        phases = []
        for turn in range(2 * ROUNDS):
            gate.wait(_PATIENCE)
            at_work = number == 0 or turn % 2 == 1
            phases.append(_phase(loop, requests, seconds) if at_work else Phase(0, seconds, 0.0))
            gate.wait(_PATIENCE + seconds)
        return phases
    except BaseException:
        gate.abort()  # or the others would wait for this one
        raise


def _phase(loop: BareLoop, requests: Any, seconds: float) -> Phase:
    began, cpu, searches = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        loop.search(next(requests))
        searches += 1
    return Phase(searches, time.perf_counter() - began, time.process_time() - cpu)


def _together(taken: Sequence[Sequence[Phase]]) -> dict[str, float]:
    """Medians over rounds of what the loops did in each."""
    rounds = list(zip(*taken))
    return {
        "requests_per_second": float(np.median([sum(p.searches / p.seconds for p in r) for r in rounds])),
        "cpu_ms": float(
            np.median([1000 * sum(p.cpu_seconds for p in r) / sum(p.searches for p in r) for r in rounds])
        ),
    }
