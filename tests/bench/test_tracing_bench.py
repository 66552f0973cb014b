"""What `hsnn bench tracing` writes, and what `hsnn bench dashboard` draws and sends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from clients.wire import ServedModel
from hsnn_bench.dashboard import Panel, Query, draw
from hsnn_bench.dashboard_run import _messages
from hsnn_bench.orchestrator import Answer, Ask
from hsnn_bench.prometheus import Series
from hsnn_bench.tracing import COSTS, NOT_THIS, OFF, TRACED, compare, measure, report, summary
from hsnn_core.errors import RequestError
from hsnn_core.schema import Schema


def _times(server: float, traced: float) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Of one pair: requests that differ, a tracing process slower by ``server``, a trace that costs ``traced``."""
    request = np.array([900.0, 1000.0, 5000.0])
    ways = {OFF: request, NOT_THIS: request + server, TRACED: request + server + traced}
    return {(way, base): (ways[way], ways[base]) for way, base in COSTS}


def test_neither_way_finds_its_server_more_used_than_the_other_does() -> None:
    last: list[str] = []

    def ask(name: str) -> Ask:
        def way(wire: Mapping[str, np.ndarray]) -> Answer:
            took = 80.0 if last[-1:] == [name] else 100.0  # faster right after a request of its own
            last.append(name)
            return Answer(np.array([]), took, [])

        return way

    first, second = compare((ask("a"), ask("b")), [{}] * 4, rounds=20)
    assert len(first) == len(second) == 80 and last[:2] == ["b", "a"]
    assert np.median(first - second) == 0 and abs(np.mean(first - second)) <= 20 / 80


def test_processes_that_differ_widen_the_interval_and_are_no_cost(tmp_path: Path) -> None:
    found = summary([_times(-300, 50), _times(300, 50), _times(-200, 50), _times(200, 50)])
    not_this, traced, within = found["costs"]
    assert (within["of"], within["against"]) == (TRACED, NOT_THIS)
    assert (within["mean"], within["low"], within["high"]) == pytest.approx((50, 50, 50))
    assert not_this["mean"] == pytest.approx(0) and not_this["pairs"] == [-300, 300, -200, 200]
    # t(0.975, 3) = 3.182, the pairs' standard deviation sqrt(260000 / 3), over sqrt(4)
    assert not_this["high"] == -not_this["low"] == pytest.approx(3.182 * 294.39 / 2, rel=1e-3)
    assert (traced["low"] + traced["high"]) / 2 == pytest.approx(50)
    path = report([{"mode": "bls", "requests": 3, **found}], "hsnn bench tracing x", "x", tmp_path)
    text = path.read_text()
    assert "## bls: 4 pairs of servers, 3 requests a pair and line" in text
    assert "-468 to +468" in text and "-300 to +300" in text and "46.8%" in text
    assert json.loads(path.with_suffix(".json").read_text())["modes"][0]["costs"][2]["mean"] == 50


def test_one_pair_of_servers_has_no_spread(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--pairs: got 1, expected at least 2"):
        measure(tmp_path, "bls", pairs=1, rounds=1)


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.25, 0.5], []])
def test_panels_are_drawn_whatever_their_values(tmp_path: Path, values: list[float]) -> None:
    series = [Series({"layer": "1"}, list(range(len(values))), values)] if values else []
    place, query = (0, 0, 8, 8), (Query("x", "layer {{layer}}"),)
    shown = [
        Panel("Time", "timeseries", "s", place, (0.0, None), query),
        Panel("Now", "stat", "percentunit", (8, 0, 4, 4), (0.0, 1.0), query),
    ]
    draw(lambda expression: series, shown, tmp_path / "p.png", "a caption")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_of_ten_requests_two_exclude_items_and_one_is_malformed() -> None:
    schema = Schema.from_dict(
        {
            "name": "s",
            "keys": {"user": "u", "item": "i"},
            "tasks": [{"name": "click"}],
            "features": {"user": {"age": {"kind": "dense"}}, "item": {"price": {"kind": "dense"}}},
        }
    )
    model = ServedModel("hsnn_retrieve", schema, 10, (), 8, "bls")
    users = {"age": np.zeros((4, 1), np.float32)}
    sent = [service_pb2.ModelInferRequest.FromString(m) for m in _messages(model, users, np.arange(50))]
    assert len(sent) == 50
    assert sum(any(one.name == "exclude_items" for one in message.inputs) for message in sent) == 10
    assert sum("k" in message.parameters for message in sent) == 5
