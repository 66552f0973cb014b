"""A table from the command line, on a small simulated world: trained by workers, written, and not trained again."""

import json
import sys

import pytest
import torch

from hsnn_bench import cost, widths, workers
from hsnn_cli.main import main

SMALL = [
    "--set", "data.options={users: 300, ads: 200, impressions: 3000, days: 14, seed: 7}",
    "--set", "train.max_steps=6", "--set", "train.batch_size=128", "--set", "train.refresh_steps=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def table2(tmp_path_factory):
    """The command's arguments and its folder, after it ran once."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["bench", "table2", "--data", "synthetic", "--rows", "lti", "--seeds", "1", "--requests", "20",
                 "--results", str(folder / "results"), "--work", str(folder / "work"), *SMALL]  # fmt: skip
    assert main(arguments) == 0
    return arguments, folder


def test_the_report_has_the_rows_asked_for(table2):
    _, folder = table2
    report = json.loads((folder / "results" / "table2-synthetic.json").read_text())
    assert [row["id"] for row in report["rows"]] == ["sil", "lti"]
    assert all(row["seeds"] == [1] for row in report["rows"])
    assert report["simulated"] and not report["missing"]
    assert set(report["rows"][1]["ne_change"]) == {"click", "conversion"}
    page = (folder / "results" / "table2-synthetic.md").read_text()
    assert "HSNN + JOIM w/ LTI" in page and "simulated" in page and str(folder) not in page
    assert (folder / "results" / "table2-synthetic.png").exists()


def test_nothing_is_trained_twice(table2, monkeypatch, capsys):
    arguments, _ = table2
    monkeypatch.setattr(workers, "WORKER", (sys.executable, "-c", "raise SystemExit(1)"))
    assert main(arguments) == 0
    assert "2 models, 2 of them are done" in capsys.readouterr().out


def test_a_failing_worker_fails_the_command_after_the_report(table2, monkeypatch, capsys):
    arguments, folder = table2
    monkeypatch.setattr(workers, "WORKER", (sys.executable, "-c", "raise SystemExit('no disk')"))
    em = [*arguments, "--rows", "sil,em"]
    assert main(em) == 1
    assert "1 workers failed (em s1)" in capsys.readouterr().err
    page = (folder / "results" / "table2-synthetic.md").read_text()
    assert "**Missing: HSNN + JOIM w/ EM, seed 1**: no disk" in page


def test_a_report_of_what_is_there_trains_nothing(table2, monkeypatch, tmp_path):
    arguments, _ = table2
    monkeypatch.setattr(workers, "WORKER", (sys.executable, "-c", "raise SystemExit('no worker may start')"))
    there = [*arguments, "--rows", "sil,em", "--report-only", "--results", str(tmp_path)]
    assert main(there) == 0
    page = (tmp_path / "table2-synthetic.md").read_text()
    assert "HSNN w/ SIL" in page and "**Missing: HSNN + JOIM w/ EM, seed 1**: not trained yet" in page


def test_cost_and_widths_of_trained_runs(table2):
    from hsnn_cli.commands_training import load_data
    from hsnn_train.checkpoint import load_run

    _, folder = table2
    runs = {
        path.name: path
        for path in sorted((folder / "work" / "synthetic").iterdir())
        if (path / "done.json").exists()
    }
    recipe = load_run(next(iter(runs.values()))).recipe
    dataset = load_data(recipe)
    costs = cost.measure(runs, dataset, 3, progress=False)
    assert set(costs) == set(runs)
    for measured in costs.values():
        assert measured.requests == 3
        assert measured.median_ms > 0
        assert len(measured.candidates) == 2
    run = next(iter(runs.values()))
    points = widths.sweep(run, dataset, 5, torch.device("cpu"), progress=False)
    shares = [point["scored_share"] for point in points]
    assert shares == sorted(shares)
    assert widths.sweep(run, dataset, 5, torch.device("cpu"), progress=False) == points
    assert json.loads((run / widths.SWEEP).read_text())["requests"] == 5


def test_options_that_name_nothing_known_are_refused(capsys):
    assert main(["bench", "table1", "--data", "nowhere"]) == 1
    assert "no shipped recipe (ads-scale, beauty," in capsys.readouterr().err
    assert main(["bench", "table1", "--data", "beauty", "--seeds", "0"]) == 1
    assert "--seeds: got 0" in capsys.readouterr().err
    assert main(["bench", "table2", "--data", "beauty", "--rows", "joint"]) == 1
    assert "known rows: sil, em, lti" in capsys.readouterr().err
    assert main(["bench", "table2", "--data", "beauty", "--jobs", "10000"]) == 1
    assert "--jobs: got 10000, expected 1 to" in capsys.readouterr().err
