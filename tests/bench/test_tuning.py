"""Tuning: finds the best of a toy function, resumes, keeps the best per method, and never sees the test split."""

import json
import math

import pytest

from hsnn_bench.spaces import METHODS, Choice, Method, Real, Whole, around, method
from hsnn_bench.tuning import keep, run_tuning, tune, tuned
from hsnn_core.errors import DataError
from hsnn_train.recipe_sections import TrainConfig

SPACE = Method({"x": Real(-2, 2), "n": Whole(1, 8), "c": Choice(("a", "b"))}, {"x": 2.0, "n": 8, "c": "b"})


def toy(params):
    return -((params["x"] - 1) ** 2) - abs(params["n"] - 3) - (params["c"] == "b")


def test_starts_at_the_start_and_ends_better(tmp_path):
    seen = []
    best = tune(SPACE, lambda p: seen.append(p) or toy(p), tmp_path / "toy.db", "s", 1, trials=10, minutes=5)
    assert seen[0] == SPACE.start and len(seen) == best.trials == 10
    assert best.value == max(map(toy, seen)) > toy(SPACE.start) and toy(best.params) == best.value


def test_an_interrupted_study_goes_on_where_it_was_and_ends_as_an_uninterrupted_one(tmp_path):
    whole, halves = [], []
    tune(SPACE, lambda p: whole.append(p) or toy(p), tmp_path / "a.db", "s", 1, trials=5, minutes=5)

    def stops(params):
        if len(halves) == 2:
            raise KeyboardInterrupt
        halves.append(params)
        return toy(params)

    with pytest.raises(KeyboardInterrupt):
        tune(SPACE, stops, tmp_path / "b.db", "s", 1, trials=5, minutes=5)
    best = tune(SPACE, lambda p: halves.append(p) or toy(p), tmp_path / "b.db", "s", 1, trials=5, minutes=5)
    assert halves == whole and best.trials == 5
    again = tune(
        SPACE, lambda p: pytest.fail("the budget is spent"), tmp_path / "b.db", "s", 1, trials=5, minutes=5
    )
    assert again == best


def test_failed_trials_count_and_are_not_chosen(tmp_path):
    def fails(params):
        if params["x"] > 1.5:
            raise DataError("diverged")
        return math.nan if params["c"] == "b" else toy(params)

    best = tune(SPACE, fails, tmp_path / "toy.db", "s", 1, trials=8, minutes=5)
    assert best.trials == 8 and 0 < best.failed < 8 and best.params["c"] == "a"
    with pytest.raises(DataError, match="all 2 trials in .* failed"):
        tune(SPACE, lambda p: math.inf, tmp_path / "none.db", "s", 1, trials=2, minutes=5)


def test_minutes_bound_the_budget_too(tmp_path):
    best = tune(SPACE, toy, tmp_path / "toy.db", "s", 1, trials=50, minutes=1e-9)
    assert best.trials == 1


def test_every_space_starts_inside_itself():
    for name, space in METHODS.items():
        if space.ours:
            space = around(
                space, TrainConfig(lr=0.1, towers_lr=0.2, batch_size=64, epochs=1, temperature=0.5)
            )
            assert space.start["train.lr"] == (0.2 if name == "two_tower" else 0.1), name
        assert set(space.start) == set(space.knobs), name
        for key, knob in space.knobs.items():
            value = space.start[key]
            inside = value in knob.values if isinstance(knob, Choice) else knob.low <= value <= knob.high
            assert inside, f"{name}.{key}"
    with pytest.raises(DataError, match="'svd': unknown; known: popularity, recent, item_knn"):
        method("svd")


def test_a_recipe_of_so_many_steps_is_tuned_by_them():
    tuned_by = around(METHODS["hsnn"], TrainConfig(max_steps=2400))
    assert tuned_by.knobs["train.max_steps"] == Whole(1200, 4800, log=True)
    assert tuned_by.start["train.max_steps"] == 2400 and "train.epochs" not in tuned_by.knobs


def test_entries_are_merged_per_method(tmp_path):
    path = tmp_path / "tuned-x.json"
    keep(path, "b", {"params": {"x": 1}, "value": 0.5})
    keep(path, "a", {"params": {}, "value": 0.1})
    keep(path, "b", {"params": {"x": 2}, "value": 0.6})
    assert tuned("x", tmp_path) == {
        "a": {"params": {}, "value": 0.1},
        "b": {"params": {"x": 2}, "value": 0.6},
    }
    assert list(json.loads(path.read_text())) == ["a", "b"] and tuned("y", tmp_path) == {}
    assert [p.name for p in tmp_path.iterdir()] == ["tuned-x.json"]
    path.write_text("{}}")
    with pytest.raises(DataError, match="tuned-x.json: is not JSON"):
        tuned("x", tmp_path)
    path.write_text('{"a": 3}')
    with pytest.raises(DataError, match="expected an object of methods"):
        tuned("x", tmp_path)


def test_tunes_from_a_recipe_file_and_goes_on(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setitem(
        METHODS, "flat", Method({"train.lr": Choice((0.01, 0.02))}, {"train.lr": 0.02},
                                {"model.layers": ["two_tower_xs"], "model.codebooks": [], "search.widths": []}, True)
    )  # fmt: skip
    asked = {
        "trials": 2,
        "minutes": 5,
        "figure": "recall@10",
        "work": tmp_path / "w",
        "results": tmp_path / "r",
    }
    found = run_tuning(str(recipe_file), ["popularity", "item_knn", "flat"], **asked)
    assert {name: entry["trials"] for name, entry in found.items()} == {
        "flat": 2,
        "item_knn": 2,
        "popularity": 1,
    }
    assert found["item_knn"]["value"] > found["popularity"]["value"]
    assert set(found["flat"]["params"]) == {"train.lr"} and 0 <= found["flat"]["value"] <= 1
    assert found["flat"]["figure"] == "recall@10 of 1000 requests, new items, seed 1"
    assert sorted(p.name for p in (tmp_path / "w" / "halves").iterdir()) == [
        "flat.db",
        "item_knn.db",
        "popularity.db",
    ]
    again = run_tuning(str(recipe_file), ["item_knn"], **asked)
    assert again["item_knn"]["params"] == found["item_knn"]["params"]
    with pytest.raises(DataError, match="expected recall@K or ndcg@K"):
        run_tuning(str(recipe_file), ["als"], figure="auc")


def test_a_split_without_valid_positives_is_refused(recipe_file, tmp_path):
    text = recipe_file.read_text().replace("by: leave_one_out", "{by: time, fractions: [0.5, 0.0, 0.5]}")
    recipe_file.write_text(text)
    with pytest.raises(DataError, match="the split has no positives in valid"):
        run_tuning(str(recipe_file), ["popularity"], work=tmp_path / "w", results=tmp_path / "r")
