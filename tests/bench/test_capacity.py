"""Capacity: how perf_analyzer is found and read, how the rate is searched for, what an overload comes to."""

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clients.load import EXPIRED, FAILED, OK, REFUSED, Fates
from hsnn_bench import capacity, perf_analyzer
from hsnn_bench.capacity import (
    Asked,
    Served,
    difference,
    medians,
    outcomes,
    overload,
    real_requests,
    run_capacity,
    scrape,
    steady,
    summary,
)
from hsnn_bench.capacity_report import write_report
from hsnn_bench.capacity_search import CapacitySearch, Closed
from hsnn_bench.perf_analyzer import Level, find, read_level, request_texts
from hsnn_core.errors import RequestError, ServerError

HEADER = "Request Rate,Inferences/Second,Client Send,p50 latency,p90 latency,p95 latency,p99 latency,response wait\n"
SAID = """Request Rate: 40 inference requests per seconds
  Client:
    Request count: 300
    [WARNING] Perf Analyzer was not able to keep up with the desired request rate. 4.50% of the requests were delayed.
"""


def test_a_level_is_read():
    level = read_level(HEADER + "40,29.995,18,24195,118823,153649,172495,407\n", SAID, "open", 40.0, 5.0)
    assert (level.kind, level.load, level.requests, level.throughput) == ("open", 40.0, 300, 29.995)
    assert level.latency_ms == {"p50": 24.195, "p90": 118.823, "p95": 153.649, "p99": 172.495}
    assert level.delayed == 0.045
    on_time = read_level(HEADER + "40,29.995,18,24195,118823,153649,172495,407\n", "", "open", 40.0, 5.0)
    assert on_time.delayed == 0 and on_time.within("p50", 24.2) and not on_time.within("p99", 172)


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
    target = perf_analyzer.Target("h:1", "m", ["{}"], 10, "abc")
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


def recorder(folder: Path) -> perf_analyzer.Tool:
    """A perf_analyzer that keeps what it was given to read and reports a level."""
    table = HEADER.strip() + "\\n40,40.0,18,24195,118823,153649,172495,407"
    script = """for word; do
case $word in *requests.json) cp $word %s/;; *gaps) cp $word %s/;; *level.csv) table=$word;; esac
done
[ "$1" = --version ] || { printf '%s\\n' > $table; echo 'Request count: 7'; }
"""
    return find(program(folder / "recorder", script % (folder, folder, table)))


def test_every_level_has_its_own_order_of_requests_and_the_exact_rate(tmp_path: Path):
    users = [
        {"age": np.array([[row]], np.float32), "ids": np.array([[row, -1]], np.int64)} for row in range(40)
    ]
    target = perf_analyzer.Target("h:1", "m", request_texts(users), 10, "abc")
    tool, sent, gaps = recorder(tmp_path), [], []
    for seed in (1, 2):
        level = perf_analyzer.measure(tool, target, "open", 50.0, 4.0, seed=seed)
        assert (level.requests, level.seconds) == (7, 4.0)
        sent.append(json.loads((tmp_path / "requests.json").read_text())["data"])
        gaps.append(np.array((tmp_path / "gaps").read_text().split(), np.int64))
    first = [[request["age"]["content"][0] for request in level] for level in sent]
    assert first[0] != first[1] and sorted(first[0]) == sorted(first[1]) == list(range(40))
    assert {"age": {"content": [4.0], "shape": [1]}, "ids": {"content": [4, -1], "shape": [2]}} in sent[0]
    assert not np.array_equal(*gaps)
    for given in gaps:
        assert len(given) == 200 and given.sum() == pytest.approx(4e6, rel=1e-4), "50 a second, exactly"


def test_a_client_that_sends_late_measures_nothing():
    latency = dict.fromkeys(("p50", "p90", "p95", "p99"), 5.0)
    assert Level("open", 9, 100, 9.0, latency, 0.01, None).within("p99", 20)
    assert not Level("open", 9, 100, 9.0, latency, 0.011, None).within("p99", 20)


def level_of(kind: str, load: float, p50: float, p99: float, throughput: float | None = None) -> Level:
    latency = dict.fromkeys(("p50", "p90", "p95"), p50) | {"p99": p99}
    return Level(kind, load, 100, load if throughput is None else throughput, latency, 0.0, None)


def server_of(rate: float):
    """A measure() of a server whose p99 passes 20 ms at this many requests a second."""

    def measure(kind, load, seconds, seed):
        slow = load >= rate if kind == "open" else load > 4
        return level_of(
            kind, load, 5.0, 40.0 if slow else 10.0, None if kind == "open" else min(load, 4) * rate / 4
        )

    return measure


def search_of(measure, said=str, **changes) -> CapacitySearch:
    asked = {"seconds": 1.0, "arrivals": 1000, "alone": 100.0, "say": said} | changes
    return CapacitySearch(measure, "p99", 20.0, **asked)


@pytest.mark.parametrize("rate", [13.0, 150.0, 2000.0])
def test_the_search_finds_the_rate(rate: float):
    said: list[str] = []
    search = search_of(server_of(rate), said.append)
    closed = search.closed()
    # Until the limit fails twice of two, and throughput has not grown twice.
    assert [level.load for level in search.levels] == [1, 1, 2, 2, 3, 3, 4, 4, 6, 6, 8]
    assert (closed.load, closed.saturation, closed.requests) == (4, rate, 200)
    found = search.open(closed.saturation / 2)
    assert found is not None and rate / 1.1 < found < rate
    assert search.requests(found) >= 400, "found, and confirmed by two more"
    assert len(said) == len(search.levels)


def test_a_limit_that_no_rate_meets():
    search = search_of(server_of(0.5))
    assert search.closed().saturation == 0.5
    assert search.open(0.25) is None and search.levels


def test_saturation_is_beyond_the_limit():
    """Two under way pass the limit, eight get the most through: the ladder does not end where the percentile fails."""

    def measure(kind, load, seconds, seed):
        return level_of(kind, load, 5.0, 10.0 * load, 100.0 * min(load, 8))

    closed = search_of(measure).closed()
    assert (closed.load, closed.throughput, closed.saturation) == (2, 200.0, 800.0)
    refused = search_of(lambda kind, load, *_: Level(kind, load, 0, 0.0, {}, 0.0, "QueueFull"))
    assert refused.closed() == Closed(0, 0.0, 0, 0.0)
    assert [level.load for level in refused.levels] == [1, 1], (
        "nothing more is learnt of a server that is full"
    )


def test_a_level_has_a_thousand_arrivals_or_two_minutes():
    asked: dict[float, float] = {}

    def measure(kind, load, seconds, seed):
        asked[load] = seconds
        return level_of(kind, load, 5.0, 10.0 if load < 200 else 40.0)

    search = search_of(measure, seconds=6.0)
    for rate, seconds in ((400.0, 6.0), (50.0, 20.0), (2.0, 120.0)):
        search.at(rate)
        assert asked[rate] == pytest.approx(seconds)


@pytest.mark.parametrize("unlucky", [{0}, {1}, {0, 4}, {3, 8}])
def test_noise_neither_lowers_nor_raises_the_rate(unlucky: set[int]):
    """One measurement in some fails, or holds, by chance; they were final when one was enough."""
    honest = server_of(100.0)
    for lucky in (False, True):
        count = iter(range(10**6))

        def measure(kind, load, seconds, seed, lucky=lucky, count=count):
            level = honest(kind, load, seconds, seed)
            if next(count) in unlucky and 60 < load < 140:
                return level_of(kind, load, 5.0, 10.0 if lucky else 40.0)
            return level

        found = search_of(measure).open(80.0)
        assert found is not None and 90 < found < 100, (lucky, found)


def test_a_rate_that_failed_by_bad_luck_is_tried_again():
    """Two of three measurements at a rate that holds fail: the search ends below it, and climbs back."""
    honest, seen = server_of(100.0), []

    def measure(kind, load, seconds, seed):
        if 80 <= load < 100 and len(seen) < 4:
            seen.append(load)
            return level_of(kind, load, 5.0, 40.0)
        return honest(kind, load, seconds, seed)

    found = search_of(measure).open(60.0)
    assert seen and found is not None and 85 < found < 100


def test_a_busy_machine_is_measured_again():
    """The third level is twice as slow as at other rates, once; at overload latency stays high, and that counts."""
    count = iter(range(10**6))

    def measure(kind, load, seconds, seed):
        number = next(count)
        if load >= 100:
            return level_of(kind, load, 30.0, 90.0)
        return level_of(kind, load, 10.0, 40.0) if number == 2 else level_of(kind, load, 5.0, 10.0)

    search = search_of(measure)
    found = search.open(50.0)
    assert found is not None and 90 < found < 100
    marked = [level for level in search.levels if level.disturbed]
    assert [level.load for level in marked if level.load < 100] == [search.levels[2].load]
    loads = [level.load for level in marked]
    assert len(set(loads)) == len(loads), "a rate that is slow twice is slow by its load"
    assert max(loads) == max(level.load for level in search.levels)
    assert search.requests(search.levels[2].load) == 200, "what is disturbed does not count"


def test_a_refused_level_is_as_unsteady_as_can_be(tmp_path: Path):
    levels = iter([level_of("open", 7, 4.0, 8.0), Level("open", 7, 0, 0.0, {}, 0.0, "QueueFull"),
                   level_of("open", 7, 4.0, 12.0)])  # fmt: skip
    told = steady(search_of(lambda *_: next(levels)), 10.0)
    assert told["ratios"] == [2.0, float("inf"), 3.0] and told["p99_over_p50"] == 3.0
    page = write_report(report_of(steady=told), tmp_path)[2].read_text()
    assert "| p99 / p50 at 70% of the capacity | 3.00 (12.00 / 4.00 ms; 2.00, refused, 3.00) | 200 |" in page


def test_an_overload_in_figures():
    #       in time   late    refused in time, late   expired in time  failed
    outcome = [OK, OK, OK, REFUSED, REFUSED, EXPIRED, FAILED]
    latency = [0.01, 0.02, 0.03, 0.001, 0.05, 0.019, 0.001]
    fates = Fates(0.1, np.zeros(7), np.array(latency), np.array(outcome, np.int8), 0.02, ("INTERNAL: oh",))
    told = summary(fates, capacity=25.0)
    assert (told["sent"], told["answered"], told["answered_in_time"], told["answered_late"]) == (7, 3, 2, 1)
    assert (told["refused"], told["refused_in_time"], told["expired"], told["failed"]) == (2, 1, 1, 1)
    assert told["answered_in_time_over_capacity"] == pytest.approx(2 / 2.5)
    assert told["answered_in_time_over_sent"] == pytest.approx(2 / 7)
    assert told["refused_in_time_over_refused"] == pytest.approx(1 / 2)
    assert told["others_refused_in_time"] == pytest.approx(1 / 5), "late, expired and failed ones were not"
    assert told["rate"] == pytest.approx(70)
    others = [summary(fates, capacity) for capacity in (50.0, 12.5)]
    assert medians([told, *others])["answered_in_time_over_capacity"] == pytest.approx(0.8)


def test_an_overload_has_three_seeds_and_a_thousand_requests(monkeypatch: pytest.MonkeyPatch):
    asked = Asked(
        {"age": np.zeros((2, 1), np.float32)}, 5, latency_ms=20.0, percentile=99, seconds=6.0, arrivals=1000
    )
    served = Served("h:1", None, SimpleNamespace())
    sent = []

    def load(url, messages, rate, seconds, deadline, *, seed, tls):
        sent.append((rate, seconds, deadline, seed))
        in_time = {1: 700, 2: 200, 3: 500}[seed]
        outcome = np.array([OK] * in_time + [REFUSED] * (1000 - in_time), np.int8)
        return Fates(seconds, np.zeros(1000), np.full(1000, 0.01), outcome, deadline, ())

    monkeypatch.setattr(capacity, "serialise", lambda *_, **__: [b""])
    monkeypatch.setattr(capacity, "poisson_load", load)
    monkeypatch.setattr(capacity, "_REPORTED", 0)
    told = overload(served, asked, 10.0, 5.0, str)
    assert sent == [(30.0, pytest.approx(1000 / 30), 0.02, seed) for seed in (1, 2, 3)]
    assert told["base"] == 10 and len(told["runs"]) == 3
    assert told["median"]["answered_in_time"] == 500
    assert told["median"]["answered_in_time_over_capacity"] == pytest.approx(500 / (1000 / 30) / 5)
    overload(served, asked, 100.0, 5.0, str)
    assert sent[3][1] == 6.0, "as long as asked for, where that is more"


def test_requests_are_not_in_the_order_of_the_log():
    dataset = SimpleNamespace(test=range(100), raw_users=lambda split, rows: {"row": rows})
    rows = real_requests(dataset, 20)["row"]
    assert len(set(rows.tolist())) == 20 and (np.diff(rows) < 0).any()
    np.testing.assert_array_equal(rows, real_requests(dataset, 20)["row"])


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
    level = Level("open", 10.0, 100, 9.9, {"p50": 3.0, "p90": 5.0, "p95": 6.0, "p99": 9.0}, 0.01, None, 10.0)
    closed = Level("closed", 2, 100, 20.0, {"p50": 3.0, "p90": 5.0, "p95": 6.0, "p99": 9.0}, 0.0, None, 10.0)
    refused = Level("open", 99.0, 0, 0.0, {}, 0.0, "QueueFull: all are running", 10.0)
    fates = Fates(1.0, np.zeros(4), np.array([0.01, 0.01, 0.03, 0.01]),
                  np.array([OK, REFUSED, OK, REFUSED], np.int8), 0.02, ())  # fmt: skip
    told = summary(fates, 10.0)
    over = {"median": medians([told]), "runs": [told], "outcomes": {"ok": 1}}
    return {
        "recipe": "shop", "simulated": True, "command": "hsnn bench capacity x", "commit": "abc", "machine": "m",
        "date": "2026-01-01", "items": 200, "k": 20, "mode": "bls", "widths": [4], "latency_ms": 20.0,
        "percentile": 99, "requests": 7, "seconds": 1.0, "arrivals": 1000, "metrics": {},
        "levels": [vars(closed), vars(level), vars(refused), vars(replace(level, disturbed=True))],
        "bare": None, "closed": asdict(Closed(2, 20.0, 300, 25.0)), "capacity": 10.0, "capacity_requests": 4012,
        "steady": {"rate": 7.0, "p99_over_p50": 2.0, "ratios": [2.0], "p50_ms": 3.0, "p99_ms": 6.0, "delayed": 0.0,
                   "requests": 300},
        "overload": [over | {"base": 10.0}, over | {"base": 25.0}], **changes,
    }  # fmt: skip


def test_the_report(tmp_path: Path):
    paths = write_report(report_of(), tmp_path)
    assert [path.name for path in paths] == [
        f"capacity-shop-200-bls.{end}" for end in ("json", "csv", "md", "png")
    ]
    rows = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert [(row["kind"], row["load"], row["p99"], row["disturbed"]) for row in rows] == [
        ("closed", "2", "9.0", "False"), ("open", "10.0", "9.0", "False"), ("open", "99.0", "", "False"),
        ("open", "10.0", "9.0", "True"),
    ]  # fmt: skip
    assert "QueueFull" in rows[2]["failure"]
    page = paths[2].read_text()
    for line in (
        "| closed loop, p99 ≤ 20 ms | 20.0 requests/s with 2 under way | 300 |",
        "| open loop (Poisson), p99 ≤ 20 ms: the capacity | 10.0 requests/s | 4,012 |",
        "| figure | target | 3 × capacity | 3 × saturation |",
        "| answered in time / capacity | ≥ 0.9 | 0.100 | 0.100 |",
        "| answered in time / what it is three times of |  | 0.100 | 0.040 |",
        "| answered in time / sent |  | 0.250 | 0.250 |",
        "| every other request refused within its deadline | 100% | 66.67% | 66.67% |",
        "| – refused in time / refused |  | 100.00% of 2 | 100.00% of 2 |",
        "| – answered late; expired; failed |  | 1; 0; 0 | 1; 0; 0 |",
    ):
        assert line in page.splitlines(), f"{line} in\n{page}"
    assert "simulated" in page and "1 of 4 were measured again" in page
    assert "bare" not in page
    beside = {"loops": 2, "widths": [4], "alone": {"requests_per_second": 40.0, "cpu_ms": 25.0},
              "at_once": {"requests_per_second": 50.0, "cpu_ms": 39.0}}  # fmt: skip
    page = write_report(report_of(bare=beside), tmp_path)[2].read_text()
    for line in (
        "| one bare loop without a server | 40.0 requests/s, 25.00 ms of CPU each | |",
        "| 2 bare loops at once | 50.0 requests/s, 39.00 ms of CPU each | |",
        "| saturation × the one loop's CPU per request / cores (target ≥ 0.8) | 0.31; of the loops at once themselves "
        "0.62 | |",
        "| saturation / 2 bare loops at once | 0.50 | |",
    ):
        assert line in page.splitlines(), f"{line} in\n{page}"
    nothing = report_of(
        capacity=None, capacity_requests=0, steady=None, overload=[], closed=asdict(Closed(0, 0.0, 0, 2.0))
    )
    page = write_report(nothing, tmp_path)[2].read_text()
    assert "| open loop (Poisson), p99 ≤ 20 ms: the capacity | no rate | 0 |" in page
    assert "| no number under way |" in page and "Overload" not in page


def test_a_percentile_that_is_not_reported_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match=r"--percentile: got 98, expected one of \[50, 90, 95, 99\]"):
        run_capacity(
            tmp_path, SimpleNamespace, None, k=1, latency_ms=1.0, percentile=98, requests=1, seconds=1.0, arrivals=1,
            command="",
        )  # fmt: skip
