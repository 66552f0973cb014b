"""What the orchestrator counts and times, and how far it says to be behind the item log; without a server."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_pb_utils
import pytest
from tiny_snapshot import ORCHESTRATOR

from hsnn_core.errors import LogError
from hsnn_server.processes import wait_until

NAMES = ("serving_metrics", "items", "item_follower")


@pytest.fixture
def pb_utils(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = fake_pb_utils.make(lambda request: fake_pb_utils.InferenceResponse())
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    monkeypatch.setattr(sys, "path", [str(ORCHESTRATOR), *sys.path])
    yield module
    for name in NAMES:
        sys.modules.pop(name, None)


def started(behind: int = 0) -> Any:
    module = importlib.import_module("serving_metrics")
    view = SimpleNamespace(live_items=3, added_ids=[], items=3)
    items = SimpleNamespace(state=SimpleNamespace(view=view), behind=behind)
    return module.ServingMetrics(module.Snapshot(7, 1, 0.0, 2, []), items, {})


def test_times_are_of_answers_and_of_passed_deadlines(pb_utils: ModuleType) -> None:
    """Wrong requests and failures, which may take no time, would make p99 look better than it is."""
    metrics = started()
    seconds = {"ok": 0.5, "deadline": 2.0, "invalid": 0.001, "error": 4.0, "overload": 0.0, "unmeetable": 0.0}
    for outcome, taken in seconds.items():
        metrics.started()
        metrics.finished(outcome, taken)
    metrics.close()
    made = pb_utils.MetricFamily.made
    assert made["hsnn_request_seconds"][0].observed == [0.5, 2.0]
    assert {m.labels["outcome"]: m.value for m in made["hsnn_requests_total"]} == dict.fromkeys(seconds, 1)
    assert made["hsnn_under_way_seconds_total"][0].value == pytest.approx(6.501)


def test_times_are_a_sample_and_the_seconds_under_way_are_not(
    pb_utils: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("serving_metrics")
    monkeypatch.setattr(module, "PERIOD", 60.0)
    metrics, timed = started(), module.TIMED
    for _ in range(timed + 100):
        metrics.started()
        metrics.finished("ok", 0.25)
    metrics.close()
    made = pb_utils.MetricFamily.made
    assert len(made["hsnn_request_seconds"][0].observed) == timed
    assert made["hsnn_under_way_seconds_total"][0].value == (timed + 100) * 0.25


@pytest.mark.parametrize("behind", [0, 1234, -1])
def test_the_lag_is_what_the_items_say(pb_utils: ModuleType, behind: int) -> None:
    started(behind).close()
    assert pb_utils.MetricFamily.made["hsnn_item_log_behind"][0].value == behind


def test_a_follower_knows_how_far_it_is_behind(
    pb_utils: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Behind, then unknown while the log cannot be read, then up to it again."""
    module = importlib.import_module("item_follower")
    behind_now: list[int] = []

    def behind() -> int:
        if not behind_now:
            raise LogError("the log is gone")
        return behind_now[0]

    follower = SimpleNamespace(catch_up=lambda: 0, unusable=[], behind=behind, follow=lambda: 0)
    monkeypatch.setattr(module, "LogReader", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(module, "LogFollower", lambda *_: follower)
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.01)
    bundle = SimpleNamespace(schema=SimpleNamespace(hash=""), path=tmp_path)
    items = module.ItemFollower(bundle, tmp_path / "log.db", 7)
    for known, shown in (([17], 17), ([], -1), ([0], 0)):
        behind_now[:] = known
        assert wait_until(partial(lambda expected: items.behind == expected, shown), 20.0)
    items.close()
    assert any("not followed for now" in line and "the log is gone" in line for line in pb_utils.Logger.lines)
