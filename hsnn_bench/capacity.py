"""How much load a served run takes: the most at which a latency percentile holds, what is left of it at three times as
much, and how steady it is at 70%.

perf_analyzer measures closed loop (n requests are always under way) and open loop (Poisson arrivals). It ends at the
first refusal, so what becomes of each request at overload is measured by `clients.load`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from itertools import islice
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
from hsnn_core.errors import DataError, RequestError
from hsnn_server.triton import TritonServer
from hsnn_train.checkpoint import Run, load_run
from hsnn_train.data.dataset import Dataset

from .bare_loops import bare_loops
from .capacity_search import CapacitySearch
from .perf_analyzer import Level, Target, Tool, measure, request_texts

PERCENTILES = (50, 90, 95, 99)  # those that perf_analyzer's table has
OVERLOAD, STEADY = 3.0, 0.7  # times the capacity
SEEDS = (1, 2, 3)  # of an overload's arrivals
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
    ``percentile`` of them within ``latency_ms``; a level lasts ``seconds``, and longer for ``arrivals`` requests."""

    wire: Mapping[str, np.ndarray]
    k: int
    latency_ms: float
    percentile: int
    seconds: float
    arrivals: int


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
    """Wire tensors of at most ``count`` test impressions in random order, each a request as it was made: its user,
    then."""
    rows = np.random.default_rng(seed).permutation(len(dataset.test))[:count]
    if not len(rows):
        raise DataError("the split leaves no impressions for test, so there are no requests to send")
    return dataset.raw_users("test", rows)


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
    arrivals: int,
    command: str,
    beside_bare: bool = False,
    say: Callable[[str], None] = print,
    tls: Tls | None = None,
) -> dict[str, Any]:
    """Measure a server; returns the report (see `capacity_report.write_report`).

    ``server``: a context manager that gives the addresses of gRPC and metrics (None: not collected). ``beside_bare``:
    before it starts, measure what this machine does without one (`bare_loops`), of the run's own export. Raises
    RequestError for a percentile that perf_analyzer does not report, ServerError when it or the server fails.
    """
    if percentile not in PERCENTILES:
        raise RequestError(f"--percentile: got {percentile}, expected one of {list(PERCENTILES)}")
    made_at = commit()  # not what the checkout has become when all is measured
    run = load_run(run_dir)
    dataset = load_data(run.recipe)
    wire = real_requests(dataset, requests)
    k = min(k, run.recipe.search.max_k, len(run.item_ids))
    asked = Asked(wire, k, latency_ms, percentile, seconds, arrivals)
    bare = bare_loops(run_dir, wire, k, seconds) if beside_bare else None
    if bare is not None:
        alone, at_once = bare["alone"], bare["at_once"]
        say(
            f"without a server: one loop {alone['requests_per_second']:.1f} requests/s, {bare['loops']} at once "
            f"{at_once['requests_per_second']:.1f}"
        )
    with server() as (url, metrics):
        served = connect(run, url, metrics, tls)
        target = Target(url, served.model.name, request_texts(each_user(wire)), k, run.schema.hash, tls)
        distinct = len(set(serialise(served.model, each_user(wire), k=k)))
        say(f"{distinct:,} distinct requests of {run_dir}, k {k}, to {served.model.name} at {url}")
        search = CapacitySearch(
            partial(measure, tool, target), f"p{percentile}", latency_ms,
            seconds=seconds, arrivals=arrivals, alone=warm_up(served, wire, k), say=say,
        )  # fmt: skip
        before = scrape(metrics)
        closed = search.closed()
        capacity = search.open(closed.saturation / 2)  # arrivals that queue cannot reach all of it
        report = {
            "recipe": run.recipe.name, "simulated": dataset.simulated, "command": command, "commit": made_at,
            "machine": machine(), "date": date.today().isoformat(), "items": len(run.item_ids), "k": k,
            "mode": served.model.mode, "widths": list(served.model.widths), "latency_ms": latency_ms,
            "percentile": percentile, "requests": distinct, "seconds": seconds, "arrivals": arrivals,
            "bare": bare, "closed": asdict(closed), "capacity": capacity,
            "capacity_requests": 0 if capacity is None else search.requests(capacity),
            "steady": None if capacity is None else steady(search, capacity),
            "overload": [] if capacity is None else [
                overload(served, asked, base, capacity, say)
                for base in sorted({capacity, max(capacity, closed.saturation)})
            ],
            "levels": [asdict(level) for level in search.levels],
        }  # fmt: skip
        report["metrics"] = difference(before, scrape(metrics))
    return report


def steady(search: CapacitySearch, capacity: float) -> dict[str, Any]:
    """p99 over p50 at `STEADY` of the capacity, the median of three; infinite for one that was refused requests."""
    levels = search.at(STEADY * capacity)
    ratios = [_percentile(level, "p99") / _percentile(level, "p50", 1.0) for level in levels]
    return {
        "rate": STEADY * capacity, "p99_over_p50": float(np.median(ratios)), "ratios": ratios,
        "p50_ms": float(np.median([_percentile(level, "p50") for level in levels])),
        "p99_ms": float(np.median([_percentile(level, "p99") for level in levels])),
        "delayed": float(np.median([level.delayed for level in levels])),
        "requests": sum(level.requests for level in levels),
    }  # fmt: skip


def _percentile(level: Level, name: str, refused: float = math.inf) -> float:
    return refused if level.failure is not None else level.latency_ms[name]


def overload(
    served: Served, asked: Asked, base: float, capacity: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """What becomes of the requests at `OVERLOAD` times ``base`` requests a second, each told its deadline: the latency
    limit. `SEEDS` runs of at least ``asked.arrivals`` requests each, and the medians of their figures."""
    deadline, rate = asked.latency_ms / 1000, OVERLOAD * base
    messages = serialise(served.model, each_user(asked.wire), k=asked.k, deadline=deadline)
    seconds = max(asked.seconds, asked.arrivals / rate)
    before = scrape(served.metrics)
    runs = []
    for seed in SEEDS:
        fates = poisson_load(served.url, messages, rate, seconds, deadline, seed=seed, tls=served.tls)
        runs.append(summary(fates, capacity))
        say(
            f"overload {runs[-1]['rate']:.1f}/s, {len(fates):,} requests: answered in time / capacity "
            f"{runs[-1]['answered_in_time_over_capacity']:.3f}, the others refused in time "
            f"{runs[-1]['others_refused_in_time']:.4f}"
        )
    time.sleep(_REPORTED)
    return {
        "base": base, "median": medians(runs), "runs": runs,
        "outcomes": outcomes(difference(before, scrape(served.metrics))),
    }  # fmt: skip


def summary(fates: Fates, capacity: float) -> dict[str, Any]:
    """An overload in figures; rates are per second. What is 'in time' counts from the sending, as the deadline does."""
    counts = fates.counts()
    return {
        "rate": len(fates) / fates.seconds, "deadline_ms": 1000 * fates.deadline, "sent": len(fates),
        **counts, "answered_in_time": fates.answered_in_time, "answered_late": fates.answered_late,
        "refused_in_time": fates.refused_in_time,
        "answered_in_time_over_capacity": fates.answered_in_time / (fates.seconds * capacity),
        "answered_in_time_over_sent": fates.answered_in_time / max(1, len(fates)),
        "refused_in_time_over_refused": fates.refused_in_time / counts["refused"] if counts["refused"] else 1.0,
        # Who is answered too late or given up when the time is over was not refused either.
        "others_refused_in_time": fates.refused_in_time / max(1, len(fates) - fates.answered_in_time),
        "slip_ms": {f"p{q}": float(1000 * np.percentile(fates.slip, q)) for q in (50, 99)},
        "failures": list(fates.failures),
    }  # fmt: skip


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of every number of `summary` over runs."""
    found: dict[str, Any] = {
        name: float(np.median([run[name] for run in runs]))
        for name, value in runs[0].items()
        if isinstance(value, int | float)
    }
    slips = [run["slip_ms"] for run in runs]
    return found | {"slip_ms": {q: float(np.median([slip[q] for slip in slips])) for q in slips[0]}}


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


def warm_up(served: Served, wire: Mapping[str, np.ndarray], k: int) -> float:
    """Ask some requests that are not counted, one after another; returns how many a second the later half were."""
    users = list(islice(each_user(wire), _WARM_UP))
    with RetrievalClient(served.url, timeout=60.0, model=served.model.name, tls=served.tls) as client:
        took = []
        for user in users:
            began = time.perf_counter()
            client.retrieve(WireUsers(user), k=k)
            took.append(time.perf_counter() - began)
    return 1 / float(np.mean(took[len(took) // 2 :]))
