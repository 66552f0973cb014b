"""Capacity: how perf_analyzer is found and read, how the rate is searched for, what an overload comes to."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clients.load import EXPIRED, FAILED, OK, REFUSED, Fates
from hsnn_bench import capacity, perf_analyzer
from hsnn_bench.capacity import (
    Asked,
    difference,
    outcomes,
    run_capacity,
    scrape,
    search_closed,
    search_open,
    summary,
)
from hsnn_bench.capacity_report import write_report
from hsnn_bench.perf_analyzer import Level, find, read_level, write_inputs
from hsnn_core.errors import RequestError, ServerError

HEADER = "Request Rate,Inferences/Second,Client Send,p50 latency,p90 latency,p95 latency,p99 latency,response wait\n"
SAID = """Request Rate: 40 inference requests per seconds
  Client:
    Request count: 300
    [WARNING] Perf Analyzer was not able to keep up with the desired request rate. 4.50% of the requests were delayed.
"""


def test_a_level_is_read():
    level = read_level(HEADER + "40,29.995,18,24195,118823,153649,172495,407\n", SAID, "open", 40.0)
    assert (level.kind, level.load, level.requests, level.throughput) == ("open", 40.0, 300, 29.995)
    assert level.latency_ms == {"p50": 24.195, "p90": 118.823, "p95": 153.649, "p99": 172.495}
    assert level.delayed == 0.045
    assert level.within("p50", 24.2) and not level.within("p99", 172)
    on_time = read_level(HEADER + "40,29.995,18,24195,118823,153649,172495,407\n", "", "open", 40.0)
    assert on_time.delayed == 0


def test_a_refused_level_is_within_nothing():
    assert not Level("open", 9, 0, 0.0, {}, 0.0, "QueueFull: 2 requests are running").within("p99", 1e9)


def test_a_missing_perf_analyzer_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        ServerError, match=r"perf_analyzer: .*/none is not there; make perf_analyzer gets one"
    ):
        find(tmp_path / "none")
    monkeypatch.setattr(perf_analyzer, "INSTALLED", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerError, match="bin/perf_analyzer is not there"):
        find()


def program(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def test_a_missing_library_is_named_with_its_package(tmp_path: Path):
    broken = program(
        tmp_path / "pa", 'echo "pa: error while loading shared libraries: libb64.so.0d: none" >&2; exit 127'
    )
    with pytest.raises(ServerError, match="libb64.so.0d: none; libb64.so.0d is in .* package libb64-0d"):
        find(broken)
    (tmp_path / "text").write_text("not a program")
    with pytest.raises(ServerError, match="text does not run"):
        find(tmp_path / "text")


def test_its_own_failure_is_an_error_and_a_refusal_is_a_level(tmp_path: Path):
    target = perf_analyzer.Target("h:1", "m", tmp_path / "in.json", 10, "abc")
    failing = find(
        program(tmp_path / "failing", '[ "$1" = --version ] || { echo "no such host" >&2; exit 3; }')
    )
    with pytest.raises(ServerError, match="ended with 3 at open load 7: no such host"):
        perf_analyzer.measure(failing, target, "open", 7, 1.0, seed=1)
    full = find(
        program(tmp_path / "full", 'echo "Thread [0] had error: QueueFull: 1 are running" >&2; exit 99')
    )
    level = perf_analyzer.measure(full, target, "open", 7, 1.0, seed=1)
    assert level.failure == "QueueFull: 1 are running"
    assert level.load == 7


def test_inputs_are_one_entry_per_request(tmp_path: Path):
    users = [{"age": np.array([[row]], np.float32), "ids": np.array([[row, -1]], np.int64)} for row in (3, 4)]
    write_inputs(tmp_path / "in.json", users)
    assert json.loads((tmp_path / "in.json").read_text())["data"][1] == {
        "age": {"content": [4.0], "shape": [1]},
        "ids": {"content": [4, -1], "shape": [2]},
    }


ASKED = Asked({}, 10, latency_ms=20.0, percentile=99, seconds=1.0)


def server_of(rate: float):
    """A measure() of a server whose p99 passes 20 ms at this many requests a second."""

    def measure(tool, target, kind, load, seconds, seed):
        slow = load >= rate if kind == "open" else load > 4
        throughput = load if kind == "open" else min(load, 4) * rate / 4
        latency = dict.fromkeys(("p50", "p90", "p95"), 5.0) | {"p99": 40.0 if slow else 10.0}
        return Level(kind, load, 100, throughput, latency, 0.0, None)

    return measure


@pytest.mark.parametrize("rate", [13.0, 150.0, 2000.0])
def test_the_search_finds_the_rate(monkeypatch: pytest.MonkeyPatch, rate: float):
    monkeypatch.setattr(capacity, "measure", server_of(rate))
    said: list[str] = []
    closed = search_closed(None, None, ASKED, said.append)
    assert [level.load for level in closed] == [1, 2, 3, 4, 6]
    levels, found = search_open(None, None, ASKED, closed, said.append)
    assert found is not None and rate / 1.06 < found < rate
    assert sum(level.load == found for level in levels) >= 4, "found, and confirmed three times"
    assert len(said) == len(closed) + len(levels)


def test_a_limit_that_no_rate_meets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capacity, "measure", server_of(0.5))
    closed = search_closed(None, None, ASKED, str)
    levels, found = search_open(None, None, ASKED, closed, str)
    assert found is None and levels


def test_a_rate_that_held_once_by_luck_gives_way(monkeypatch: pytest.MonkeyPatch):
    honest, seen = server_of(100.0), []

    def lucky(tool, target, kind, load, seconds, seed):
        level = honest(tool, target, kind, load, seconds, seed)
        if kind == "open" and 100 <= load < 140 and not seen:
            seen.append(load)
            return Level(kind, load, 100, load, dict.fromkeys(("p50", "p90", "p95", "p99"), 5.0), 0.0, None)
        return level

    monkeypatch.setattr(capacity, "measure", lucky)
    _, found = search_open(None, None, ASKED, [honest(None, None, "closed", 4, 1.0, 0)], str)
    assert seen and found is not None and found < 100


def test_an_overload_in_figures():
    #       in time   late    refused in time, late   expired in time  failed
    outcome = [OK, OK, OK, REFUSED, REFUSED, EXPIRED, FAILED]
    latency = [0.01, 0.02, 0.03, 0.001, 0.05, 0.019, 0.001]
    fates = Fates(0.1, np.zeros(7), np.array(latency), np.array(outcome, np.int8), 0.02, ("INTERNAL: oh",))
    told = summary(fates, capacity=25.0)
    assert (told["sent"], told["answered"], told["answered_in_time"], told["refused_in_time"]) == (7, 3, 2, 2)
    assert told["answered_in_time_over_capacity"] == pytest.approx(2 / 2.5)
    assert told["others_refused_in_time"] == pytest.approx(2 / 5), (
        "one answered late is one not refused in time"
    )
    assert told["rate"] == pytest.approx(70)


def test_metrics_before_and_after():
    before = {'hsnn_requests_total{outcome="ok",version="1"}': 5.0, "same": 1.0}
    after = {
        'hsnn_requests_total{outcome="ok",version="1"}': 8.0,
        'hsnn_requests_total{outcome="ok",version="2"}': 1.0,
        'hsnn_requests_total{outcome="unmeetable",version="1"}': 2.0,
        'hsnn_request_seconds_bucket{version="1",le="0.5"}': 3.0,
        "same": 1.0,
    }
    changed = difference(before, after)
    assert outcomes(changed) == {"ok": 4, "unmeetable": 2}
    assert len(changed) == 3
    assert scrape(None) == {}
    with pytest.raises(ServerError, match="metrics at 127.0.0.1:9: .*; give the address of Triton's metrics"):
        scrape("127.0.0.1:9")


def report_of(**changes):
    level = Level("open", 10.0, 100, 9.9, {"p50": 3.0, "p90": 5.0, "p95": 6.0, "p99": 9.0}, 0.01, None)
    closed = Level("closed", 2, 100, 20.0, {"p50": 3.0, "p90": 5.0, "p95": 6.0, "p99": 9.0}, 0.0, None)
    refused = Level("open", 99.0, 0, 0.0, {}, 0.0, "QueueFull: all are running")
    fates = Fates(1.0, np.zeros(2), np.full(2, 0.01), np.array([OK, REFUSED], np.int8), 0.02, ())
    return {
        "recipe": "shop", "simulated": True, "command": "hsnn bench capacity x", "commit": "abc", "machine": "m",
        "date": "2026-01-01", "items": 200, "k": 20, "mode": "bls", "widths": [4], "latency_ms": 20.0,
        "percentile": 99, "requests": 7, "seconds": 1.0, "metrics": {},
        "levels": [vars(closed), vars(level), vars(refused)],
        "closed": {"within": vars(closed), "saturation": 20.0}, "capacity": 10.0,
        "steady": {"rate": 7.0, "p99_over_p50": 2.0, "ratios": [2.0], "p50_ms": 3.0, "p99_ms": 6.0, "delayed": 0.0},
        "overload": summary(fates, 10.0) | {"outcomes": {"ok": 1}}, **changes,
    }  # fmt: skip


def test_the_report(tmp_path: Path):
    paths = write_report(report_of(), tmp_path)
    assert [path.name for path in paths] == [
        f"capacity-shop-200-bls.{end}" for end in ("json", "csv", "md", "png")
    ]
    rows = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert [(row["kind"], row["load"], row["p99"]) for row in rows] == [
        ("closed", "2", "9.0"), ("open", "10.0", "9.0"), ("open", "99.0", "")
    ]  # fmt: skip
    assert "QueueFull" in rows[2]["failure"]
    page = paths[2].read_text()
    assert "| open loop (Poisson), p99 ≤ 20 ms | 10.0 requests/s |" in page
    assert "simulated" in page
    nothing = report_of(capacity=None, steady=None, overload=None, closed={"within": None, "saturation": 2.0})
    page = write_report(nothing, tmp_path)[2].read_text()
    assert "| open loop (Poisson), p99 ≤ 20 ms | no rate |" in page and "| no level |" in page


def test_a_percentile_that_is_not_reported_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match=r"--percentile: got 98, expected one of \[50, 90, 95, 99\]"):
        run_capacity(
            tmp_path, SimpleNamespace, None, k=1, latency_ms=1.0, percentile=98, requests=1, seconds=1.0, command=""
        )  # fmt: skip
