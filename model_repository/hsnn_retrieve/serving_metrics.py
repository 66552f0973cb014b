"""The orchestrator's own metrics, beside Triton's.

Triton's duration metrics stop when ``execute`` returns, which here is when the request was only handed over,
so the latency that a client sees is measured in here. One operation on a metric is a round trip of about 50
microseconds to the server process; a reporter thread makes them, off the request path
and together for all requests of a period where the metric allows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event, Lock, Thread
from typing import Any

import triton_python_backend_utils as pb_utils
from items import Items

# Refused are "overload" (the queue was full) and "unmeetable" (its deadline could not be met).
OUTCOMES = ("ok", "invalid", "deadline", "overload", "unmeetable", "error")
PERIOD = 0.25  # seconds between reports
TIMED = 500  # answers per period whose times are reported, the first: more would keep the reporter busy
SECONDS = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]


@dataclass(frozen=True)
class LayerUse:
    """One layer of one request: seconds taken and nodes scored, over all users of the request."""

    seconds: float
    candidates: int


@dataclass(frozen=True)
class _Timed:
    seconds: float
    layers: Sequence[LayerUse]


class _Period:
    """What happened since the last report; its size does not depend on the number of requests."""

    def __init__(self, layers: int) -> None:
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.candidates = [0] * layers
        self.timed: list[_Timed] = []


class ServingMetrics:
    """hsnn_requests_total{outcome}, hsnn_request_seconds, hsnn_layer_seconds{layer},
    hsnn_candidates_total{layer}, hsnn_requests_in_flight, hsnn_items, hsnn_items_changed, hsnn_item_log_behind; each
    also labelled with the model's version.

    All requests are counted. Times are those of answers that were searched for (not of refusals, which take none),
    of at most TIMED a period."""

    def __init__(self, version: int, layers: int, items: Items) -> None:
        labels = {"version": str(version)}
        by_layer = [labels | {"layer": str(layer)} for layer in range(1, layers + 1)]
        family = pb_utils.MetricFamily
        # The families are kept: a metric goes when its family is collected.
        self._families = {
            "requests": family(
                name="hsnn_requests_total", description="Requests by outcome", kind=family.COUNTER
            ),
            "seconds": family(
                name="hsnn_request_seconds",
                description="Seconds from arrival to answer, by request",
                kind=family.HISTOGRAM,
            ),
            "layer_seconds": family(
                name="hsnn_layer_seconds",
                description="Seconds in one layer of the search, by request",
                kind=family.HISTOGRAM,
            ),
            "candidates": family(
                name="hsnn_candidates_total", description="Nodes scored, by layer", kind=family.COUNTER
            ),
            "in_flight": family(
                name="hsnn_requests_in_flight",
                description="Requests accepted and not answered",
                kind=family.GAUGE,
            ),
        }
        self._items = items
        self._item_gauges = {
            name: self._gauge(name, description).Metric(labels=labels)
            for name, description in (
                ("hsnn_items", "Items that can be found"),
                ("hsnn_items_changed", "Items added since the snapshot, and items that are gone since"),
                ("hsnn_item_log_behind", "Positions of the item log that are not followed yet"),
            )
        }
        self._requests = {
            outcome: self._metric("requests", labels | {"outcome": outcome}) for outcome in OUTCOMES
        }
        self._seconds = self._metric("seconds", labels, buckets=SECONDS)
        self._layer_seconds = [self._metric("layer_seconds", label, buckets=SECONDS) for label in by_layer]
        self._candidates = [self._metric("candidates", label) for label in by_layer]
        self._in_flight = self._metric("in_flight", labels)
        self._lock = Lock()
        self._running = 0
        self._layers = layers
        self._period = _Period(layers)
        self._closing = Event()
        self._reporter = Thread(target=self._report, name="hsnn-metrics", daemon=True)
        self._reporter.start()

    def started(self) -> None:
        """A request arrived."""
        with self._lock:
            self._running += 1

    def finished(self, outcome: str, seconds: float, layers: Sequence[LayerUse] = ()) -> None:
        """A request was answered; ``outcome`` is one of OUTCOMES."""
        with self._lock:
            self._running -= 1
            self._period.outcomes[outcome] += 1
            for number, layer in enumerate(layers):
                self._period.candidates[number] += layer.candidates
            if outcome not in ("overload", "unmeetable") and len(self._period.timed) < TIMED:
                self._period.timed.append(_Timed(seconds, layers))

    def close(self) -> None:
        """Report what is left and stop."""
        self._closing.set()
        self._reporter.join()

    def _metric(self, family: str, labels: dict[str, str], **options: Any) -> Any:
        return self._families[family].Metric(labels=labels, **options)

    def _gauge(self, name: str, description: str) -> Any:
        family = pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.GAUGE)
        self._families[name] = family
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
        self._in_flight.set(self._running)
        view = self._items.state.view
        found, added = view.live_items, len(view.added_ids)
        self._item_gauges["hsnn_items"].set(found)
        self._item_gauges["hsnn_items_changed"].set(added + view.items - found)
        self._item_gauges["hsnn_item_log_behind"].set(self._items.behind)
        for outcome, count in period.outcomes.items():
            if count:
                self._requests[outcome].increment(count)
        for number, count in enumerate(period.candidates):
            if count:
                self._candidates[number].increment(count)
        for timed in period.timed:
            self._seconds.observe(timed.seconds)
            for metric, layer in zip(self._layer_seconds, timed.layers):
                metric.observe(layer.seconds)
