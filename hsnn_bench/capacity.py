"""How much load a served run takes: the most at which a latency percentile holds, what is left of it at three times as
much, and how steady it is at 70%.

perf_analyzer measures closed loop (n requests are always under way) and open loop (Poisson arrivals). It ends at the
first refusal, so what becomes of each request at overload is measured by `clients.load`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from clients.load import Fates, each_user, poisson_load, serialise
from clients.metrics import scrape
from clients.retrieval import RetrievalClient, WireUsers
from clients.tls import Tls
from clients.wire import ServedModel
from export.rollout import promote
from hsnn_cli.commands_training import load_data
from hsnn_cli.provenance import commit, machine
from hsnn_core.errors import DataError, RequestError, ServerError
from hsnn_server.triton import TritonServer
from hsnn_train.checkpoint import Run, load_run
from hsnn_train.data.dataset import Dataset

from .perf_analyzer import Level, Target, Tool, measure, write_inputs

PERCENTILES = (50, 90, 95, 99)  # those that perf_analyzer's table has
CLOSED_LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
OVERLOAD, STEADY = 3.0, 0.7  # times the capacity
REPEATS = 3
_SLOWEST = 1.0  # a second: below it there is no percentile to speak of
_PRECISION = 1.05  # the search ends when the least rate that fails is this much above the greatest that holds
_CONFIRMATIONS, _STEP_BACK = 6, 0.9  # how often a rate that is not confirmed gives way to a lower one
_WARM_UP = 50
_REPORTED = 0.6  # seconds after which the orchestrator's counts are in Triton's metrics


@dataclass(frozen=True)
class Served:
    """A running Triton that serves the run: ``model``'s facts, its ``url`` and, where known, ``metrics``' address."""

    url: str
    metrics: str | None
    model: ServedModel
    tls: Tls | None = None


@dataclass(frozen=True)
class Asked:
    """What is asked of it: ``wire`` tensors (R, ...) of distinct requests, ``k`` items each, answered by
    ``percentile`` of them within ``latency_ms``; ``seconds``: how long a level is measured."""

    wire: Mapping[str, np.ndarray]
    k: int
    latency_ms: float
    percentile: int
    seconds: float

    @property
    def name(self) -> str:
        return f"p{self.percentile}"


@contextmanager
def own_server(repository: Path) -> Iterator[tuple[str, str]]:
    """Serve the newest snapshot of a repository; gives the addresses of gRPC and metrics."""
    with TritonServer(repository) as server:
        promote(repository, server.admin)
        yield server.urls.grpc, server.urls.metrics


def connect(run: Run, url: str, metrics: str | None, tls: Tls | None = None) -> Served:
    """The server at ``url``; SchemaMismatch when it serves another schema than the run's."""
    with RetrievalClient(url, timeout=10.0, expected_schema=run.schema, tls=tls) as client:
        return Served(url, metrics, client.connect(), tls)


def real_requests(dataset: Dataset, count: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Wire tensors of at most ``count`` test impressions, each a request as it was made: its user, then."""
    rows = np.random.default_rng(seed).permutation(len(dataset.test))[:count]
    if not len(rows):
        raise DataError("the split leaves no impressions for test, so there are no requests to send")
    return dataset.raw_users("test", np.sort(rows))


def run_capacity(
    run_dir: Path,
    server: Callable[[], Any],
    tool: Tool,
    *,
    k: int,
    latency_ms: float,
    percentile: int,
    requests: int,
    seconds: float,
    command: str,
    say: Callable[[str], None] = print,
    tls: Tls | None = None,
) -> dict[str, Any]:
    """Measure a server; returns the report (see `capacity_report.write_report`).

    ``server``: a context manager that gives the addresses of gRPC and metrics (None: not collected). Raises
    RequestError for a percentile that perf_analyzer does not report, ServerError when it or the server fails.
    """
    if percentile not in PERCENTILES:
        raise RequestError(f"--percentile: got {percentile}, expected one of {list(PERCENTILES)}")
    made_at = commit()  # not what the checkout has become when all is measured
    run = load_run(run_dir)
    dataset = load_data(run.recipe)
    wire = real_requests(dataset, requests)
    k = min(k, run.recipe.search.max_k, len(run.item_ids))
    asked = Asked(wire, k, latency_ms, percentile, seconds)
    with server() as (url, metrics), tempfile.TemporaryDirectory(prefix="hsnn-capacity-") as folder:
        served = connect(run, url, metrics, tls)
        inputs = Path(folder) / "requests.json"
        write_inputs(inputs, each_user(wire))
        target = Target(url, served.model.name, inputs, k, run.schema.hash, tls)
        distinct = len(set(serialise(served.model, each_user(wire), k=k)))
        say(f"{distinct:,} distinct requests of {run_dir}, k {k}, to {served.model.name} at {url}")
        warm_up(served, wire, k)
        before = scrape(metrics)
        closed = search_closed(tool, target, asked, say)
        open_levels, capacity = search_open(tool, target, asked, closed, say)
        report = {
            "recipe": run.recipe.name, "simulated": dataset.simulated, "command": command, "commit": made_at,
            "machine": machine(), "date": date.today().isoformat(), "items": len(run.item_ids), "k": k,
            "mode": served.model.mode, "widths": list(served.model.widths), "latency_ms": latency_ms,
            "percentile": percentile, "requests": distinct, "seconds": seconds,
            "levels": [asdict(level) for level in (*closed, *open_levels)],
            "closed": _best(closed, asked), "capacity": capacity,
            "steady": None if capacity is None else steady(tool, target, asked, capacity, say),
            "overload": None if capacity is None else overload(served, asked, capacity, say),
        }  # fmt: skip
        report["metrics"] = difference(before, scrape(metrics))
    return report


def search_closed(tool: Tool, target: Target, asked: Asked, say: Callable[[str], None]) -> list[Level]:
    """Levels of more and more requests under way, until the percentile fails."""
    levels: list[Level] = []
    for concurrency in CLOSED_LADDER:
        level = measure(tool, target, "closed", concurrency, asked.seconds, seed=0)
        levels.append(_say(say, asked, level))
        if not levels[-1].within(asked.name, asked.latency_ms):
            break
    return levels


def search_open(
    tool: Tool, target: Target, asked: Asked, closed: list[Level], say: Callable[[str], None]
) -> tuple[list[Level], float | None]:
    """Levels of Poisson arrivals, and the greatest rate that holds: bisected between one that does and one that does
    not, then confirmed by the median of `REPEATS` more; None when none holds.

    It starts from half of the greatest closed-loop throughput, which arrivals that queue cannot reach."""
    levels: list[Level] = []

    def holds(rate: float) -> bool:
        level = measure(tool, target, "open", rate, asked.seconds, seed=len(levels))
        levels.append(_say(say, asked, level))
        return levels[-1].within(asked.name, asked.latency_ms)

    rate = max(_SLOWEST, max(level.throughput for level in closed) / 2)
    low, high = 0.0, 0.0
    while not (low and high):
        if holds(rate):
            low = rate
            rate *= 1.4
        else:
            high = rate
            rate /= 1.4
        if rate < _SLOWEST:
            return levels, None
    while high / low > _PRECISION:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    for _ in range(_CONFIRMATIONS):
        if sum(holds(low) for _ in range(REPEATS)) * 2 > REPEATS:
            return levels, low
        low *= _STEP_BACK
    return levels, None


def steady(
    tool: Tool, target: Target, asked: Asked, capacity: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """p99 over p50 at `STEADY` of the capacity, the median of `REPEATS`."""
    rate = STEADY * capacity
    measured = [measure(tool, target, "open", rate, asked.seconds, seed=number) for number in range(REPEATS)]
    levels = [level for level in measured if _say(say, asked, level).failure is None]
    if not levels:
        raise ServerError(f"all {REPEATS} measurements at {rate:.1f} requests a second were refused requests")
    ratios = [level.latency_ms["p99"] / level.latency_ms["p50"] for level in levels]
    return {
        "rate": rate, "p99_over_p50": float(np.median(ratios)), "ratios": ratios,
        "p50_ms": float(np.median([level.latency_ms["p50"] for level in levels])),
        "p99_ms": float(np.median([level.latency_ms["p99"] for level in levels])),
        "delayed": float(np.median([level.delayed for level in levels])),
    }  # fmt: skip


def overload(served: Served, asked: Asked, capacity: float, say: Callable[[str], None]) -> dict[str, Any]:
    """What becomes of the requests at `OVERLOAD` times the capacity, each told its deadline: the latency limit."""
    deadline = asked.latency_ms / 1000
    messages = serialise(served.model, each_user(asked.wire), k=asked.k, deadline=deadline)
    before = scrape(served.metrics)
    fates = poisson_load(served.url, messages, OVERLOAD * capacity, asked.seconds, deadline, tls=served.tls)
    time.sleep(_REPORTED)
    told = summary(fates, capacity) | {"outcomes": outcomes(difference(before, scrape(served.metrics)))}
    say(
        f"overload: {told['rate']:.1f}/s for {asked.seconds:g} s: answered in time / capacity "
        f"{told['answered_in_time_over_capacity']:.3f}, others refused in time {told['others_refused_in_time']:.4f}"
    )
    return told


def summary(fates: Fates, capacity: float) -> dict[str, Any]:
    """An overload in figures; rates are per second."""
    others = len(fates) - fates.counts()["answered"]
    late = fates.counts()["answered"] - fates.answered_in_time
    return {
        "rate": len(fates) / fates.seconds, "deadline_ms": 1000 * fates.deadline, "sent": len(fates),
        **fates.counts(), "answered_in_time": fates.answered_in_time, "refused_in_time": fates.refused_in_time,
        "answered_in_time_over_capacity": fates.answered_in_time / (fates.seconds * capacity),
        # Who was answered too late was not refused either.
        "others_refused_in_time": fates.refused_in_time / max(1, others + late),
        "slip_ms": {f"p{q}": float(1000 * np.percentile(fates.slip, q)) for q in (50, 99)},
        "failures": list(fates.failures),
    }  # fmt: skip


def difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What changed, but for the buckets of histograms."""
    return {
        name: after[name] - before.get(name, 0.0)
        for name in sorted(after)
        if after[name] != before.get(name, 0.0) and "_bucket{" not in name
    }


def outcomes(changes: Mapping[str, float]) -> dict[str, int]:
    """The server's own count of requests by outcome, out of a `difference`."""
    found: dict[str, int] = {}
    for name, value in changes.items():
        if name.startswith("hsnn_requests_total{"):
            outcome = name.split('outcome="')[1].split('"')[0]
            found[outcome] = found.get(outcome, 0) + int(value)
    return found


def _best(closed: list[Level], asked: Asked) -> dict[str, Any]:
    """The closed-loop level of most throughput within the limit (None), and of most at all (saturation)."""
    good = [level for level in closed if level.within(asked.name, asked.latency_ms)]
    best = max(good, key=lambda level: level.throughput, default=None)
    return {
        "within": None if best is None else asdict(best),
        "saturation": max(level.throughput for level in closed),
    }


def warm_up(served: Served, wire: Mapping[str, np.ndarray], k: int) -> None:
    """Ask some requests that are not counted."""
    with RetrievalClient(served.url, timeout=60.0, model=served.model.name, tls=served.tls) as client:
        for number, user in enumerate(each_user(wire)):
            if number == _WARM_UP:
                return
            client.retrieve(WireUsers(user), k=k)


def _say(say: Callable[[str], None], asked: Asked, level: Level) -> Level:
    what = f"{level.load:g} under way" if level.kind == "closed" else f"{level.load:.1f} arrivals/s"
    if level.failure is not None:
        say(f"{level.kind:6} {what}: refused: {level.failure}")
    else:
        say(
            f"{level.kind:6} {what}: {level.throughput:.1f}/s, p50 {level.latency_ms['p50']:.1f} ms, "
            f"{asked.name} {level.latency_ms[asked.name]:.1f} ms, sent late {100 * level.delayed:.1f}%"
        )
    return level
