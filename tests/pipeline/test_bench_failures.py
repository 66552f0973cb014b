"""hsnn bench endurance and failures: short ones on a real Triton, and the arithmetic of their reports."""

from __future__ import annotations

import csv
import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hsnn_bench import endurance, failures
from hsnn_bench.client_load import Call, Calls, by_status
from hsnn_bench.endurance import Incident, paths
from hsnn_bench.endurance_report import BLOCKS, Trend, summary, write_report
from hsnn_bench.failures_report import render
from hsnn_bench.small_disks import full
from hsnn_cli.main import main
from hsnn_core.errors import ServerError
from hsnn_server.supervisor import Patience


def test_a_trend_is_told_from_noise():
    minutes = np.arange(0, 60, 0.1)
    noise = np.random.default_rng(0).normal(0, 3, len(minutes))
    start = np.where(minutes < 9, -50.0, 0.0)  # the first sixth does not count
    flat = Trend.of(minutes, 100 + noise + start)
    assert not flat.grows and abs(flat.slope) < 5 and flat.mean == pytest.approx(100, abs=1)
    rising = Trend.of(minutes, 100 + noise + start + minutes / 6)  # 10 an hour
    assert rising.grows and rising.slope == pytest.approx(10, abs=rising.uncertainty + 1)
    assert not Trend.of(minutes, 100 + 1e-3 * minutes).grows, "certain, but too little to act on"
    with_gaps = np.where(np.arange(len(minutes)) % 7 == 0, np.nan, 100.0)
    assert Trend.of(minutes, with_gaps).mean == 100
    assert Trend.of(minutes[: 2 * BLOCKS], noise[: 2 * BLOCKS]) is None


def test_failed_calls_belong_to_the_kill_before_them():
    samples = {name: np.arange(3.0) for name in ("minutes", "answered", "refused", "failed", "outlived", "updates",
               "updates_failed", "resident_mib", "own_mib", "shared_mib", "p99_ms")}  # fmt: skip
    call = "UNAVAILABLE ServerError after 0.10 s: gone"
    found = summary(samples, [
        Incident(1.0, "killed", "a stub"), Incident(1.1, "failed call", call), Incident(1.3, "failed call", call),
        Incident(2.0, "rollout", "version 2 after 3 s"), Incident(2.5, "rollout", "failed after 1 s: no"),
    ])  # fmt: skip
    assert (found["failed_after_kills"], found["failed_otherwise"]) == (1, 1)
    assert (found["kills"], found["rollouts"], found["rollouts_failed"]) == (1, 2, 1)
    assert found["by_status"] == {"UNAVAILABLE ServerError": 2}


def test_a_rollout_that_fails_is_not_in_the_way_of_the_next(tmp_path, monkeypatch):
    waiting, outcomes = [1], ["gone", "gone", None]  # what an earlier one left while the server was away

    def publish_and_promote(*_):
        assert not waiting, "candidate waits there"
        if (failure := outcomes.pop(0)) is not None:
            raise ServerError(failure)
        return 1

    names = {
        "publish_and_promote": publish_and_promote, "withdraw": lambda *_: waiting.clear(),
        "candidate": lambda _: next(iter(waiting), None), "retire": lambda *_: [],
    }  # fmt: skip
    for name, fake in names.items():
        monkeypatch.setattr(endurance, name, fake)
    served = SimpleNamespace(run_dir=tmp_path, repository=tmp_path, server=SimpleNamespace(admin=None))
    seen = [endurance._rollout(served).split(" after")[0] for _ in range(3)]
    assert seen == ["failed", "failed", "version 1"]


def test_calls_are_read_as_they_are_written(tmp_path):
    spool = tmp_path / "calls.jsonl"
    calls = Calls(spool)
    assert calls.new() == []
    spool.write_text('[1.0, 0.5, "OK", "", ""]\n[2.0, 0.5, "INTERNAL", "Server')
    assert calls.new() == [Call(1.0, 0.5, "OK")]
    with spool.open("a") as file:
        file.write('Error", "gone"]\n')
    assert calls.new() == [Call(2.0, 0.5, "INTERNAL", "ServerError", "gone")] and calls.new() == []
    assert by_status([Call(0, 0, "OK"), *[Call(0, 0, "X", "Y")] * 2]) == {"X Y": 2, "OK": 1}


def test_a_large_disk_is_never_filled(tmp_path, monkeypatch):
    class Size:
        f_blocks, f_frsize = 1 << 20, 4096

    monkeypatch.setattr("os.statvfs", lambda path: Size)
    with pytest.raises(ServerError, match="more than 1 GiB, expected a small one"), full(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_full_disk_that_nobody_noticed_is_no_result():
    told = "INTERNAL ServerError: Error: No space left on device"
    full = failures.Failure("/dev/shm full", 5.0, lambda _: nullcontext(), "No space left")
    served = SimpleNamespace(lines=[(0.0, "supervisor: of another failure")])
    changes = SimpleNamespace(failures={})

    def outcome(failure, lines, calls=(), recovered=0.0):
        served.lines[1:] = [(1.0, line) for line in lines]
        return asdict(failures._outcome(failure, recovered, 5.0, list(calls), 1.0, served, 1, {}, changes))

    idle, noticed = outcome(full, ["a request: answered"]), outcome(full, [f"a request: {told}"])
    by_a_client = outcome(full, [], [Call(1.0, 0.1, "INTERNAL", "ServerError", told)], recovered=7.5)
    assert [o["exercised"] for o in (idle, noticed, by_a_client)] == [False, True, True]
    killed = outcome(failures.Failure("killed", 0.0, full.strike), [], recovered=6.0)
    assert killed["exercised"]
    page = _page([idle, noticed, by_a_client, killed])
    assert (
        "| /dev/shm full (**nothing needed the room** in 1 of 3 rounds) | 0.00 (7.50) | 0.00 (2.50) |" in page
    )
    assert "| killed | 6.00 (6.00) | – |" in page
    assert "| /dev/shm full (**nothing needed the room**) | 0.00 (0.00) |" in _page([idle])


def _page(outcomes):
    facts = dict.fromkeys(("recipe", "command", "commit", "machine", "date", "mode"), "x")
    facts |= dict.fromkeys(("items", "k", "capacity", "load", "timeout", "rounds"), 1)
    facts |= {"simulated": False, "left_out": []}
    return render({**facts, "outcomes": outcomes})


@pytest.mark.triton
def test_a_short_endurance_run_and_its_report_alone(shop, tmp_path, capsys):
    command = ["bench", "endurance", str(shop / "run"), "--results", str(tmp_path)]
    options = ["--minutes", "0.08", "--rollout-every", "0.04", "--kill-every", "0.04", "--updates", "20", "--k", "20",
               "--capacity", "10", "--timeout-ms", "2000", "--work", str(tmp_path / "work")]  # fmt: skip
    assert main([*command, *options]) == 0
    table, incidents, facts, page, plot = paths(tmp_path / f"endurance-{shop.name}")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) >= 4 and sum(int(row["answered"]) for row in rows) > 0
    assert sum(int(row["updates"]) for row in rows) > 0 and float(rows[-1]["resident_mib"]) > 1
    kinds = {row["kind"] for row in csv.DictReader(incidents.read_text().splitlines())}
    assert {"killed", "rollout", "supervisor"} <= kinds
    assert json.loads(facts.read_text())["capacity"] == 10
    assert "too short to say" in page.read_text() and "of a closed-loop throughput of" in page.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    page.unlink()
    table.write_text("\n".join(table.read_text().splitlines()[:4]) + "\n")  # as if it had been cut off
    assert main([*command, "--report-only"]) == 0
    assert page.exists() and "report: " in capsys.readouterr().out


@pytest.mark.triton
def test_a_killed_stub_in_the_failures_report(shop, tmp_path):
    report = failures.run_failures(
        shop / "run", rounds=1, load=1.0, capacity=10.0, mode="in_process", k=20, timeout=1.0, requests=50,
        work=tmp_path, command="hsnn bench failures", only="orchestrator's stub killed",
        patience=Patience(settled=0.2, probe=0.5),
    )  # fmt: skip
    [outcome] = report["outcomes"]
    assert outcome["answered"] > 0 and outcome["outlived"] == 0
    assert outcome["recovered"] is not None and outcome["exercised"]
    assert any("loaded again in" in line for line in outcome["supervisor"])
    page = render(report)
    assert "| orchestrator's stub killed |" in page and "`hsnn bench failures`" in page
    assert "at 1 of a closed-loop throughput of 10.0 requests/s" in page


def test_what_they_refuse(tmp_path, capsys):
    assert main(["bench", "endurance", str(tmp_path), "--kill-every", "0"]) == 1
    assert "--kill-every: got 0.0, expected a number > 0" in capsys.readouterr().err
    assert main(["bench", "endurance", str(tmp_path), "--report-only", "--results", str(tmp_path)]) == 1
    assert "so no endurance run was begun there; run it first" in capsys.readouterr().err
    assert main(["bench", "failures", str(tmp_path), "--rounds", "0"]) == 1
    assert "--rounds: got 0, expected at least 1" in capsys.readouterr().err
    assert main(["bench", "failures", str(tmp_path), "--only", "flood"]) == 1
    assert "no failure has this in its name; there are" in capsys.readouterr().err
    with pytest.raises(Exception, match="expected at least 2"):
        _one_sample(tmp_path)


def _one_sample(folder: Path) -> None:
    stem = folder / "endurance-x"
    table, _, facts, *_ = paths(stem)
    facts.write_text("{}")
    table.write_text("minutes\n1\n")
    write_report(stem)
