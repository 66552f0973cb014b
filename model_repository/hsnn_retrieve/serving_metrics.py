"""The orchestrator's own metrics, beside Triton's.

Triton's duration metrics stop when ``execute`` returns, which here is when the request was only handed over,
so the latency that a client sees is measured in here. One operation on a metric is a round trip of about 50
microseconds to the server process; a reporter thread makes them, off the request path
and together for all requests of a period where the metric allows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Event, Lock, Thread
from typing import Any

import triton_python_backend_utils as pb_utils
from items import Items

# Refused are "overload" (the queue was full) and "unmeetable" (its deadline could not be met).
OUTCOMES = ("ok", "invalid", "deadline", "overload", "unmeetable", "error")
# Those whose times say what a client waited for an answer: refusals and failures would make it look fast.
_WAITED = ("ok", "deadline")
PERIOD = 0.25  # seconds between reports
TIMED = 500  # answers per period whose times are reported, the first: more would keep the reporter busy
SECONDS = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
_PATIENCE = 3.0  # seconds that an unload waits for the last report
SHARES = [0.0, 0.0001, 0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 0.9, 1.0]


@dataclass(frozen=True)
class LayerUse:
    """One layer of one request: seconds taken and nodes scored, over all users of the request."""

    seconds: float
    candidates: int


@dataclass(frozen=True)
class Answered:
    """One answered request: its layers, how many users it had and how many of them got no item, and for each user the
    share of all items that matched its context (none when nothing was filtered)."""

    layers: Sequence[LayerUse]
    users: int
    empty: int
    eligible: Sequence[float]


_NOTHING = Answered((), 0, 0, ())


@dataclass(frozen=True)
class Snapshot:
    """What does not change while a version serves: ``created``, unix time; ``workers``: requests that run at once;
    ``networks``: names of the models that are called through Triton."""

    version: int
    layers: int
    created: float
    workers: int
    networks: Sequence[str] = ()


class _Period:
    """What happened since the last report; its size does not depend on the number of requests."""

    def __init__(self, layers: int) -> None:
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.candidates = [0] * layers
        self.users = self.empty = 0
        self.under_way = 0.0
        self.timed: list[tuple[float, Sequence[LayerUse]]] = []
        self.eligible: list[float] = []


class ServingMetrics:
    """hsnn_requests_total{outcome}, hsnn_request_seconds, hsnn_under_way_seconds_total, hsnn_layer_seconds{layer},
    hsnn_candidates_total{layer}, hsnn_users_total, hsnn_empty_results_total, hsnn_eligible_share,
    hsnn_bls_failures_total{model}, hsnn_requests_in_flight, hsnn_workers, hsnn_items, hsnn_items_changed,
    hsnn_item_log_behind, hsnn_snapshot_created_seconds; each also labelled with the model's version.

    All requests are counted, and the seconds that they were under way summed up, whatever became of them. The
    histograms of times hold those that were answered or whose deadline passed, of at most TIMED a period; shares are of
    at most TIMED users. ``bls_failures``: calls that failed so far, by model, read at every report.
    """

    def __init__(self, snapshot: Snapshot, items: Items, bls_failures: Mapping[str, int]) -> None:
        labels = {"version": str(snapshot.version)}
        by_layer = [labels | {"layer": str(layer)} for layer in range(1, snapshot.layers + 1)]
        # The families are kept: a metric goes when its family is collected.
        self._families: list[Any] = []
        counter, gauge, histogram = (
            getattr(pb_utils.MetricFamily, kind) for kind in ("COUNTER", "GAUGE", "HISTOGRAM")
        )
        family = self._family
        requests = family("hsnn_requests_total", "Requests by outcome", counter)
        self._requests = {o: requests.Metric(labels=labels | {"outcome": o}) for o in OUTCOMES}
        seconds = family(
            "hsnn_request_seconds", "Seconds from arrival to answer, or to the deadline's end", histogram
        )
        self._seconds = seconds.Metric(labels=labels, buckets=SECONDS)
        self._under_way = family(
            "hsnn_under_way_seconds_total",
            "Seconds from arrival to answer or refusal, of all requests",
            counter,
        ).Metric(labels=labels)
        layers = family("hsnn_layer_seconds", "Seconds in one layer of the search, by request", histogram)
        self._layer_seconds = [layers.Metric(labels=label, buckets=SECONDS) for label in by_layer]
        candidates = family("hsnn_candidates_total", "Nodes scored, by layer", counter)
        self._candidates = [candidates.Metric(labels=label) for label in by_layer]
        self._users = family("hsnn_users_total", "Users answered", counter).Metric(labels=labels)
        self._empty = family("hsnn_empty_results_total", "Users answered without any item", counter).Metric(
            labels=labels
        )
        share = family("hsnn_eligible_share", "Share of all items that match a user's context", histogram)
        self._eligible = share.Metric(labels=labels, buckets=SHARES)
        failures = family("hsnn_bls_failures_total", "Failed calls of a network through Triton", counter)
        self._failures = {
            name: failures.Metric(labels=labels | {"model": name}) for name in snapshot.networks
        }
        self._gauges = {
            name: family(name, description, gauge).Metric(labels=labels)
            for name, description in (
                ("hsnn_requests_in_flight", "Requests accepted and not answered"),
                ("hsnn_workers", "Requests that can run at once"),
                ("hsnn_items", "Items that can be found"),
                ("hsnn_items_changed", "Items added since the snapshot, and items that are gone since"),
                ("hsnn_item_log_behind", "Positions of the item log that are not followed yet"),
                ("hsnn_snapshot_created_seconds", "When the snapshot was exported, unix time"),
            )
        }
        self._gauges["hsnn_workers"].set(snapshot.workers)
        self._gauges["hsnn_snapshot_created_seconds"].set(snapshot.created)
        self._items, self._bls_failures = items, bls_failures
        self._reported_failures = dict.fromkeys(snapshot.networks, 0)
        self._lock = Lock()
        self._running = 0
        self._layers = snapshot.layers
        self._period = _Period(self._layers)
        self._closing = Event()
        self._reporter = Thread(target=self._report, name="hsnn-metrics", daemon=True)
        self._reporter.start()

    def started(self) -> None:
        """A request arrived."""
        with self._lock:
            self._running += 1

    def finished(self, outcome: str, seconds: float, answered: Answered = _NOTHING) -> None:
        """A request was answered; ``outcome`` is one of OUTCOMES."""
        with self._lock:
            self._running -= 1
            period = self._period
            period.outcomes[outcome] += 1
            period.users += answered.users
            period.empty += answered.empty
            for number, layer in enumerate(answered.layers):
                period.candidates[number] += layer.candidates
            period.under_way += seconds
            if outcome in _WAITED and len(period.timed) < TIMED:
                period.timed.append((seconds, answered.layers))
            if len(period.eligible) < TIMED:
                period.eligible.extend(answered.eligible)

    def close(self) -> None:
        """Report what is left and stop; a server that takes no reports is not waited for."""
        self._closing.set()
        self._reporter.join(_PATIENCE)

    def _family(self, name: str, description: str, kind: Any) -> Any:
        family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
        self._families.append(family)
        return family

    def _report(self) -> None:
        last = False
        while not last:
            last = self._closing.wait(PERIOD)
            with self._lock:
                period, self._period = self._period, _Period(self._layers)
            try:
                self._apply(period)
            except Exception as error:  # metrics must never take the requests down with them
                pb_utils.Logger.log_warn(f"hsnn_retrieve: metrics were not reported: {error}")

    def _apply(self, period: _Period) -> None:
        view = self._items.state.view
        found, added = view.live_items, len(view.added_ids)
        self._gauges["hsnn_requests_in_flight"].set(self._running)
        self._gauges["hsnn_items"].set(found)
        self._gauges["hsnn_items_changed"].set(added + view.items - found)
        self._gauges["hsnn_item_log_behind"].set(self._items.behind)
        counts: list[tuple[Any, float]] = [
            *((self._requests[outcome], count) for outcome, count in period.outcomes.items()),
            *zip(self._candidates, period.candidates),
            (self._under_way, period.under_way),
            (self._users, period.users),
            (self._empty, period.empty),
            *((self._failures[model], self._new_failures(model)) for model in self._failures),
        ]
        for metric, count in counts:
            if count:
                metric.increment(count)
        for seconds, layers in period.timed:
            self._seconds.observe(seconds)
            for metric, layer in zip(self._layer_seconds, layers):
                metric.observe(layer.seconds)
        for share in period.eligible:
            self._eligible.observe(share)

    def _new_failures(self, model: str) -> int:
        """Failed calls of the model since the last report."""
        so_far = self._bls_failures.get(model, 0)
        new, self._reported_failures[model] = so_far - self._reported_failures[model], so_far
        return new
