"""Reports: the page of hand-made figures as a golden file, what is missing, plots."""

import json
from pathlib import Path

import pytest
from halves_world import SCHEMA

from hsnn_bench import tables
from hsnn_bench.cost import Cost, interleave
from hsnn_bench.jobs import DONE, METRICS, Job, evaluation_key
from hsnn_bench.model_flops import ModelFlops
from hsnn_bench.ours import changed
from hsnn_bench.report import change, percent, render, si
from hsnn_bench.rows import Paper, Row
from hsnn_bench.widths import beams
from hsnn_bench.workers import Failure
from hsnn_core.search import LayerTrace, SearchResult
from hsnn_train.recipe import recipe_from_dict

GOLDEN = Path(__file__).parent / "golden"
FLAT = {"model.layers": ["two_tower_xs"], "model.codebooks": [], "search.widths": []}
ROWS = [
    Row("xs", "Two Tower (XS)", "ladder", "xs", Paper(0.25, 0.0, 1.0, "M_XS·V", 0.0), FLAT),
    Row("xl", "MoNN XL", "ladder", "xs", Paper(200_000, -2.2, 64, "M_XL·V", 12.0),
        FLAT | {"model.layers": ["small"]}),
    Row("ebr", "EBR (Two Tower)", "ladder", "xs", Paper(0.25, 0.03, 0.49, "M_XS·I₁", -0.1),
        {"model.layers": ["two_tower_xs", "two_tower_xs"]}),
    Row("recipe", "HSNN, default recipe (small, two_tower_xs)", "recipe", "xs"),
]  # fmt: skip
# seed -> NE, Recall@100, search recall, share scored; the recipe's second seed failed.
RUNS = {
    "xs": {1: (0.90, 0.40, 1.0, 1.0), 2: (0.92, 0.42, 1.0, 1.0)},
    "xl": {1: (0.88, 0.50, 1.0, 1.0), 2: (0.90, 0.52, 1.0, 1.0)},
    "ebr": {1: (0.90, 0.39, 0.95, 0.2), 2: (0.9201, 0.42, 0.97, 0.2)},
    "recipe": {1: (0.89, 0.49, 0.98, 0.1)},
}
COSTS = {
    "xs": Cost(200, 2.0, 1.8, 2.4, (1000.0,)),
    "xl": Cost(40, 100.0, 90.0, 120.0, (1000.0,)),
    "ebr": Cost(200, 1.0, 0.9, 1.2, (100.0, 200.0)),
    "recipe": Cost(200, 4.0, 3.5, 5.0, (100.0, 100.25)),
}


def metrics(ne, recall, search_recall, share):
    return {
        "pointwise": [{"layer": 1, "task": "visit", "ne": ne, "calibration": 1.0}],
        "index": [{"layer": 1, "codewords": 4, "occupancy": 1.0, "largest_share": 0.3}],
        "retrieval": {
            "requests": 300,
            "search": {"recall@10": recall / 4, "recall@100": recall, "ndcg@10": recall / 8},
            "search_recall": {"@100": search_recall},
            "scored_share": share,
        },
        "seconds": {"train": 60.0},
    }


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A report of ROWS as `run_table` makes it, of hand-made metrics, costs and FLOPs."""
    monkeypatch.setattr(
        tables, "model_flops", lambda r: ModelFlops(500, 1000 * len(r.model.layers) - 580, (40, 40))
    )
    monkeypatch.setattr(tables, "small_flops", lambda r: ModelFlops(500, 3420, (40, 40)))
    base = recipe_from_dict(
        {
            "schema": SCHEMA,
            "data": {},
            "model": {"layers": ["small", "two_tower_xs"], "codebooks": [4]},
            "search": {"widths": [2], "k": 5, "max_k": 24},
        },
        "halves",
        tmp_path,
    )
    jobs = {}
    for row in ROWS:
        for seed in (1, 2):
            recipe = changed(base, {**row.overrides, "train.seed": seed})
            job = jobs[row.id, seed] = Job(recipe, tmp_path / "work", f"{row.id} s{seed}")
            if seed in RUNS[row.id]:
                job.prepare()
                (job.folder / METRICS).write_text(json.dumps(metrics(*RUNS[row.id][seed])))
                done = {
                    "evaluated": evaluation_key(recipe, job.work),
                    "commit": "1234567",
                    "minutes": 1.0,
                    "device": "A GPU",
                }
                (job.folder / DONE).write_text(json.dumps(done))
    failure = Failure(jobs["recipe", 2], 1, "loading\nhsnn bench: training diverged at step 7")
    results, missing, trained_at, trained_on = tables.collect(ROWS, (1, 2), jobs, [failure])
    return {
        "table": "table1", "data": "halves", "command": "hsnn bench table1 --data halves --seeds 2",
        "simulated": True, "data_notes": ["made up"], "seeds": [1, 2], "requests": 300, "tasks": ["visit"],
        "columns": [["recall@10", "HR@10"], ["recall@100", "Recall@100"]], "machine": "none, 2 cores, CPU",
        "commit": "89abcde", "trained_at": trained_at, "trained_on": trained_on,
        "date": "2026-01-01", "plots": {}, "missing": missing,
        "rows": [tables.describe(result, results, COSTS) for result in results.values()],
        "widths": {"ebr": [{"widths": [w], "scored_share": w / 10, "search_recall": w / 8, "recall": w / 20, "at": 100}
                           for w in (1, 2, 4)]},
    }  # fmt: skip


def test_the_page_of_table_1_is_the_golden_one(report, tmp_path):
    path = tables.write_report(report, tmp_path / "results")
    assert path.with_suffix(".md").read_text() == (GOLDEN / "table1-halves.md").read_text()
    assert json.loads(path.read_text())["rows"][1]["gap_closure"] == pytest.approx(1.0)
    for name in ("table1-halves.png", "table1-halves-widths.png"):
        assert (tmp_path / "results" / name).read_bytes().startswith(b"\x89PNG")


def test_the_page_of_an_ablation_is_the_golden_one(report, tmp_path):
    shown = report | {"table": "table2", "command": "hsnn bench table2 --data halves", "missing": []}
    path = tables.write_report(shown, tmp_path / "results")
    assert path.with_suffix(".md").read_text() == (GOLDEN / "table2-halves.md").read_text()
    assert (tmp_path / "results" / "table2-halves.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_without_a_finished_seed_is_shown_as_missing(report):
    for row in report["rows"]:
        row |= {"seeds": [], "figures": {}, "ne_change": {}, "recall_vs_xs": None, "recall_vs_ebr": None,
                "gap_closure": None, "cost": None}  # fmt: skip
    assert "| MoNN XL | −2.20% | – | – | – | – |" in render(report)


def test_a_change_says_its_interval_and_whether_it_is_a_tie():
    assert change({"percent": -0.314, "interval": 0.1, "tie": False}) == "−0.31% ± 0.10"
    assert change({"percent": 0.2, "interval": 0.5, "tie": True}) == "+0.20% ± 0.50, tie"
    assert change({"percent": 0.2, "interval": None, "tie": None}) == "+0.20%"
    assert (percent(None), change(None), si(None)) == ("–", "–", "–")
    assert [si(v) for v in (12, 1234, 5.6e7, 2e13)] == ["12", "1.23 k", "56 M", "20 T"]


def test_rows_answer_the_same_requests_in_turn_and_slow_ones_fewer():
    asked = []

    def row(name, seconds):
        def ask(number):
            asked.append((name, number))
            trace = LayerTrace([10 + number], [1], [[0]], 0)
            return SearchResult(*[None] * 5, (trace,), 0, int(seconds * 1e6))

        return ask

    costs = interleave({"fast": row("fast", 0.001), "slow": row("slow", 2.0)}, 30)
    assert (costs["fast"].requests, costs["slow"].requests) == (30, 15)
    assert asked[4:9] == [("fast", 0), ("slow", 0), ("fast", 1), ("slow", 2), ("fast", 2)], (
        "the order rotates"
    )
    assert costs["fast"].candidates == (24.5,)
    assert costs["fast"].p10_ms <= costs["fast"].median_ms <= costs["fast"].p90_ms


def test_beams_are_the_recipes_widths_scaled_without_repetitions():
    assert beams([2, 8], (0.1, 0.2, 1.0, 2.5)) == [[1, 1], [1, 2], [2, 8], [5, 20]]
    assert beams([1], (0.1, 0.5, 1.0)) == [[1]]
