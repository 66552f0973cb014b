"""What a server did between two looks at its metrics: rates, latencies and states, by snapshot version."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

REFUSALS = ("overload", "unmeetable", "deadline")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Layer:
    """One layer of the search: seconds per request, mean and p99, and nodes scored per user; None without requests."""

    mean: float | None
    p99: float | None
    candidates: float | None


@dataclass(frozen=True)
class Vitals:
    """One version on one server.

    ``rate``: requests a second, whatever became of them; ``refused``: a second, by reason; ``p50``, ``p99``: seconds,
    estimated within the histogram's buckets; ``empty``: share of users that got no item; ``eligible``: median share of
    items that matched a context; ``bls_failures``: a second. Shares and times are None where nothing was measured.
    ``changed``: items that are not as the snapshot has them; ``behind``: positions of the item log not followed yet, -1
    when unknown; ``created``: unix time of the snapshot's export.
    """

    version: str
    rate: float
    p50: float | None
    p99: float | None
    errors: float
    invalid: float
    refused: Mapping[str, float]
    in_flight: int
    workers: int
    empty: float | None
    eligible: float | None
    bls_failures: float
    layers: Mapping[str, Layer]
    items: int
    changed: int
    behind: int
    created: float


class _Difference:
    """Counters of one version between two scrapes; one that became smaller began anew."""

    def __init__(self, before: Mapping[str, float], after: Mapping[str, float], version: str) -> None:
        self._before, self._after = before, after
        self._version = version

    def rows(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        """Labels and increase of every series of that name."""
        for key, value in self._after.items():
            if key.partition("{")[0] != name:
                continue
            labels = dict(_LABEL.findall(key))
            if labels.get("version") == self._version:
                was = self._before.get(key, 0.0)
                yield labels, value - was if value >= was else value

    def total(self, name: str, **wanted: str) -> float:
        return sum(value for labels, value in self.rows(name) if wanted.items() <= labels.items())

    def quantile(self, name: str, share: float, **wanted: str) -> float | None:
        """Linear within the bucket, as Prometheus reckons; None without observations."""
        buckets = sorted(
            (float(labels["le"]), value)
            for labels, value in self.rows(f"{name}_bucket")
            if wanted.items() <= labels.items()
        )
        if not buckets or not buckets[-1][1]:
            return None
        rank, lower, below = share * buckets[-1][1], 0.0, 0.0
        for bound, count in buckets:
            if count >= rank and count > below:
                return (
                    lower
                    if bound == float("inf")
                    else lower + (bound - lower) * (rank - below) / (count - below)
                )
            lower, below = bound, count
        return lower


def vitals(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> list[Vitals]:
    """Of every version in the later of two scrapes (`clients.metrics.scrape`), ``seconds`` apart; newest first."""
    versions = {
        dict(_LABEL.findall(key)).get("version", "")
        for key in after
        if key.startswith("hsnn_requests_in_flight{")
    }
    return [
        _of_version(_Difference(before, after, version), after, version, seconds)
        for version in sorted(versions, key=lambda version: (len(version), version), reverse=True)
    ]


def _of_version(difference: _Difference, after: Mapping[str, float], version: str, seconds: float) -> Vitals:
    outcomes = {labels["outcome"]: value for labels, value in difference.rows("hsnn_requests_total")}
    users = difference.total("hsnn_users_total")
    layers = {}
    for labels, scored in difference.rows("hsnn_candidates_total"):
        layer = labels["layer"]
        count = difference.total("hsnn_layer_seconds_count", layer=layer)
        layers[layer] = Layer(
            difference.total("hsnn_layer_seconds_sum", layer=layer) / count if count else None,
            difference.quantile("hsnn_layer_seconds", 0.99, layer=layer),
            scored / users if users else None,
        )

    def now(name: str) -> float:
        return after.get(f'{name}{{version="{version}"}}', 0.0)

    return Vitals(
        version=version,
        rate=sum(outcomes.values()) / seconds,
        p50=difference.quantile("hsnn_request_seconds", 0.5),
        p99=difference.quantile("hsnn_request_seconds", 0.99),
        errors=outcomes.get("error", 0.0) / seconds,
        invalid=outcomes.get("invalid", 0.0) / seconds,
        refused={reason: outcomes.get(reason, 0.0) / seconds for reason in REFUSALS},
        in_flight=int(now("hsnn_requests_in_flight")),
        workers=int(now("hsnn_workers")),
        empty=difference.total("hsnn_empty_results_total") / users if users else None,
        eligible=difference.quantile("hsnn_eligible_share", 0.5),
        bls_failures=difference.total("hsnn_bls_failures_total") / seconds,
        layers=dict(sorted(layers.items(), key=lambda pair: int(pair[0]))),
        items=int(now("hsnn_items")),
        changed=int(now("hsnn_items_changed")),
        behind=int(now("hsnn_item_log_behind")),
        created=now("hsnn_snapshot_created_seconds"),
    )
