"""The external comparison: end to end on a small log, resumable, reported atomically and as agreed."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from hsnn_bench import baselines, baselines_report
from hsnn_bench.baselines import run_baselines
from hsnn_bench.figures import TIE_RULE
from hsnn_bench.implicit_models import Recommender
from hsnn_bench.published import PUBLISHED
from hsnn_bench.requests import load_requests, metric
from hsnn_bench.spaces import METHODS, Method
from hsnn_bench.tuning import keep
from hsnn_cli.commands_training import load_data
from hsnn_core.errors import DataError
from hsnn_train.data.requests import evaluation_requests
from hsnn_train.recipe import load_recipe

GOLDEN = Path(__file__).parent / "golden" / "baselines-toy.md"
FLAT = {"model.layers": ["two_tower_xs"], "model.codebooks": [], "search.widths": []}


@pytest.fixture
def asked(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "two_tower", Method({}, {}, FLAT, ours=True))
    monkeypatch.setitem(METHODS, "als", Method({}, {"factors": 4}))
    monkeypatch.setattr(baselines, "TWIN_K", 10)
    keep(tmp_path / "tuned-halves.json", "item_knn", {"params": {"neighbours": 12, "decay": 0.9}})
    return {
        "data": str(recipe_file),
        "seeds": (1, 2),
        "requests": 30,
        "work": tmp_path / "w",
        "results": tmp_path,
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_faiss_searches_by_the_one_task_that_ranks(asked, tmp_path, rank):
    raw = yaml.safe_load(Path(asked["data"]).read_text())
    raw["schema"]["tasks"] = [{"name": "visit"}, {"name": "again", "rank": rank}]
    Path(asked["data"]).write_text(yaml.safe_dump(raw))
    table = pyarrow.parquet.read_table(tmp_path / "impressions.parquet")
    pyarrow.parquet.write_table(
        table.append_column("again", table["visit"]), tmp_path / "impressions.parquet"
    )
    report = run_baselines(methods=["two_tower"], **asked | {"seeds": (1,)})
    assert report["missing"] == []
    twins = ["two_tower_ivf", "two_tower_hnsw"]
    assert [row["id"] for row in report["rows"]] == ["two_tower", *([] if rank else twins)]
    page = (tmp_path / "baselines-halves.md").read_text()
    assert ("Several tasks rank, so no inner product" in page) == bool(rank)


def test_trains_evaluates_keeps_and_reports(asked, tmp_path, monkeypatch):
    methods = ["popularity", "item_knn", "als", "two_tower", "mol"]
    monkeypatch.setitem(
        METHODS, "mol", Method({}, {}, FLAT | {"model.layers": ["no_such_preset"]}, ours=True)
    )
    report = run_baselines(methods=methods, **asked)
    rows = {row["id"]: row for row in report["rows"]}
    assert list(rows) == ["popularity", "item_knn", "als", "two_tower", "two_tower_ivf", "two_tower_hnsw"]
    assert report["requests"] == 30 and report["candidates"] == "new" and report["single"]

    knn = rows["item_knn"]
    assert knn["tuned"] and knn["params"] == {"neighbours": 12, "decay": 0.9} and knn["seeds"] == [1, 2]
    assert knn["figures"]["recall@20"]["mean"] > 0.9
    assert knn["figures"]["recall@10"]["mean"] > rows["popularity"]["figures"]["recall@10"]["mean"]
    assert rows["als"]["seeds"] == [1, 2] and rows["als"]["figures"]["recall@10"]["std"] is not None
    assert rows["als"]["against_two_tower"] is None  # of 24 items there is no Recall@100
    ivf = rows["two_tower_ivf"]["figures"]
    assert ivf["search_recall@100"]["mean"] > 0.8 and 0 < ivf["scored_share"]["mean"] < 1.5
    assert ivf["microseconds"]["mean"] > 0 and "recall@20" not in ivf  # 10 were asked for
    missing = {(gap["id"], gap["seed"]) for gap in report["missing"]}
    assert missing == {("mol", 1), ("mol", 2)} and "no_such_preset" in report["missing"][0]["reason"]

    stored = json.loads((tmp_path / "baselines-halves.json").read_text())
    assert stored["rows"][1]["figures"] == json.loads(json.dumps(knn["figures"]))
    page = (tmp_path / "baselines-halves.md").read_text()
    assert "HR@10" in page and "Faiss IVF" in page and "no_such_preset" in page
    assert (tmp_path / "baselines-halves.png").read_bytes()[:4] == b"\x89PNG"
    assert not [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")]

    def refit(*_):
        raise AssertionError("kept results are not made again")

    monkeypatch.setattr(Recommender, "fit", refit)
    monkeypatch.setattr(baselines.ours, "trained", refit)
    again = run_baselines(methods=methods[:-1], **asked)
    assert again["rows"] == report["rows"] and again["missing"] == []
    keep(tmp_path / "tuned-halves.json", "item_knn", {"params": {"neighbours": 3}})
    with pytest.raises(AssertionError, match="kept results"):  # but those of other parameters are
        run_baselines(methods=["item_knn"], **asked)


def test_every_seed_answers_the_requests_that_a_tables_rows_of_that_seed_answer(asked, monkeypatch):
    seen = {}

    def spy(dataset, *rest):
        seen[dataset.seed] = load_requests(dataset, *rest).user_key
        return load_requests(dataset, *rest)

    monkeypatch.setattr(baselines, "load_requests", spy)
    report = run_baselines(methods=["popularity"], **asked)
    assert sorted(seen) == [1, 2] and not np.array_equal(seen[1], seen[2])
    assert report["rows"][0]["figures"]["recall@10"]["std"] is not None
    recipe = load_recipe(asked["data"])
    other = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=2))
    of_table = evaluation_requests(load_data(other), "test", "new", 30)
    np.testing.assert_array_equal(seen[2], of_table.user_key)


def test_refuses_an_unknown_method_before_loading_anything(asked):
    with pytest.raises(DataError, match="method 'svd': unknown"):
        run_baselines(methods=["svd"], **asked)


def test_published_figures_are_as_printed():
    for rows in PUBLISHED.values():
        for row in rows:
            assert row.source and row.figures
            for name, value in row.figures.items():
                assert metric(name) and 0 < value < 1
    printed = {
        (data, row.model): tuple(row.figures.values()) for data, rows in PUBLISHED.items() for row in rows
    }
    assert printed[("beauty", "S3-Rec")] == (0.0647, 0.0327)
    assert printed[("beauty", "SASRec, full cross-entropy")] == (0.0821, 0.0405)
    assert printed[("toys", "SASRec")] == (0.0675, 0.0374)
    assert printed[("gowalla", "LightGCN, 3 layers")] == (0.1824, 0.1547)


def toy_report():
    def row(name, label, seeds, recall, std, against, **extra):
        figures = {
            "recall@10": {"mean": recall, "std": std, "values": {}},
            "ndcg@10": {"mean": recall / 2, "std": std},
        }
        return {
            "id": name, "label": label, "seeds": seeds, "figures": figures | extra.pop("figures", {}), "params": {},
            "tuned": False, "settings": {}, "against_two_tower": against, **extra,
        }  # fmt: skip

    search = {"search_recall@100": {"mean": 0.97, "std": None}, "scored_share": {"mean": 0.05, "std": None},
              "microseconds": {"mean": 81.4, "std": None}}  # fmt: skip
    return {
        "data": "toy", "command": "hsnn bench baselines --data toy", "seeds": [1, 2, 3], "requests": 5000,
        "candidates": "new", "items": 12101, "single": True, "simulated": False, "data_notes": ["one note"],
        "commit": "abc1234", "machine": "x86_64, 2 cores, CPU", "date": "2026-11-24",
        "rows": [
            row("item_knn", "item-KNN (implicit)", [], 0.07, None, {"percent": 3.25, "interval": 4.0, "tie": True},
                params={"weighting": "tfidf", "k1": 1.23456}, tuned=True),
            row("two_tower", "two-tower, exhaustive", [1, 2, 3], 0.0678, 0.001, None),
            row("two_tower_ivf", "two-tower, Faiss IVF", [1, 2, 3], 0.066, 0.001,
                {"percent": -2.5, "interval": 1.0, "tie": False}, figures=search,
                settings={1: {"nlist": 110, "nprobe": 9}, 2: {"nlist": 110, "nprobe": 9}}),
        ],
        "published": [{"model": "S3-Rec", "figures": {"recall@10": 0.0647, "ndcg@10": 0.0327}, "source": "CIKM 2020"}],
        "missing": [{"id": "mol", "seed": 2, "reason": "diverged"}],
    }  # fmt: skip


def test_the_page_is_the_golden_one():
    assert baselines_report.render(toy_report()) == GOLDEN.read_text().replace("TIE_RULE", TIE_RULE)


def test_a_report_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    paths = baselines_report.write_report(toy_report(), tmp_path)
    before = {path: path.read_bytes() for path in paths}
    changed = toy_report() | {"commit": "def5678"}
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        baselines_report.write_report(changed, tmp_path)
    assert {path: path.read_bytes() for path in paths} == before
    assert sorted(tmp_path.iterdir()) == sorted(paths)
