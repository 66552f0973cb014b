"""What `hsnn bench tracing` writes, and what `hsnn bench dashboard` draws and sends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from clients.wire import ServedModel
from hsnn_bench.dashboard import Panel, Query, draw
from hsnn_bench.dashboard_run import _messages
from hsnn_bench.prometheus import Series
from hsnn_bench.tracing import OFF, TRACED, report
from hsnn_core.schema import Schema


def test_the_report_says_what_tracing_adds(tmp_path: Path) -> None:
    spread = {"median": 1000.0, "p10": 900.0, "p90": 1300.0}
    ways = {
        OFF: {"microseconds": spread, "p99": 1500.0, "added": 0.0},
        TRACED: {"microseconds": spread | {"median": 1100.0}, "p99": 1800.0, "added": 95.4},
    }
    path = report({"mode": "bls", "requests": 40, "ways": ways}, "hsnn bench tracing x", "x", tmp_path)
    text = path.read_text()
    assert "Mode bls, 40 requests" in text
    assert "1,100 (900 to 1,300)  1,800" in text
    assert "+95" in text
    assert json.loads(path.with_suffix(".json").read_text())["ways"][TRACED]["added"] == 95.4


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
