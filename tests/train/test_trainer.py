"""The trainer: it learns, it resumes exactly, it is deterministic, it survives Ctrl-C."""

import errno
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from hsnn_cli.commands_training import describe
from hsnn_core.errors import DataError, FormatError, SchemaError, SchemaMismatch
from hsnn_core.exhaustive import exhaustive
from hsnn_core.scorer import LayerScorer
from hsnn_train.batches import step_rng
from hsnn_train.calibration import calibrate
from hsnn_train.checkpoint import load_checkpoint, load_run, save_checkpoint, write_json
from hsnn_train.evaluate import evaluate, pointwise, pointwise_report
from hsnn_train.recipe import load_recipe, recipe_from_dict
from hsnn_train.retrieval import corpus_of
from hsnn_train.runner import TorchRunner
from hsnn_train.steps import Diverged
from hsnn_train.trainer import Interrupted, NotSaved, Trainer, make_batches


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_is_deterministic_by_seed(dataset, make_recipe, tmp_path):
    runs = [Trainer(make_recipe(), dataset, tmp_path / n, progress=False).train() for n in "ab"]
    assert same(weights(runs[0]), weights(runs[1]))
    other = Trainer(make_recipe(train={"seed": 2}), dataset, tmp_path / "c", progress=False).train()
    assert not same(weights(runs[0]), weights(other))


@pytest.mark.parametrize(("method", "stop"), [("joint", signal.SIGINT), ("em", signal.SIGTERM)])
def test_a_resumed_run_equals_an_uninterrupted_one(dataset, make_recipe, tmp_path, method, stop):
    recipe = make_recipe(model={"index": method})
    whole = Trainer(recipe, dataset, tmp_path / "whole", progress=False)
    whole.train()

    cut = Trainer(recipe, dataset, tmp_path / "cut", progress=False)
    one_step = cut._one_step

    def stop_after_13():
        result = one_step()
        if cut.step == 12:
            os.kill(os.getpid(), stop)
        return result

    cut._one_step = stop_after_13
    with pytest.raises(Interrupted, match=r"stopped at step 13 of 24; .* go on with: hsnn train --resume"):
        cut.train()
    resumed = Trainer(recipe, dataset, tmp_path / "cut", resume=True, progress=False)
    assert resumed.step == 13
    resumed.train()
    assert same(weights(whole.model), weights(resumed.model))
    assert np.array_equal(whole.state.paths, resumed.state.paths)
    assert whole.history == resumed.history
    for name in ("checkpoint.pt", "history.jsonl", "recipe.yaml", "schema.json", "transform.hsnn"):
        assert (tmp_path / "cut" / name).exists()
    assert not list((tmp_path / "cut").glob("*.tmp"))


def test_it_learns_and_calibration_meets_the_validation_mean(dataset, make_recipe, tmp_path):
    recipe = make_recipe(train={"max_steps": 150})
    trainer = Trainer(recipe, dataset, tmp_path / "run", progress=False)
    model = trainer.train()
    batches = make_batches(dataset, recipe)
    values = pointwise(model, batches, dataset.valid, trainer.state, 1, parts=True)
    calibrate(model, values)
    after = pointwise_report(
        pointwise(model, batches, dataset.valid, trainer.state, 1), np.array([0.3, 0.1]), "ab"
    )
    assert all(abs(row["calibration"] - 1) < 1e-3 for row in after)
    report = evaluate(model, dataset, recipe, trainer.state, progress=False)
    clicks = [row["ne"] for row in report["pointwise"] if row["task"] == "click"]
    assert clicks[-1] < 0.95
    assert report["retrieval"]["search_recall"]["@10"] > 0.3
    assert json.loads(json.dumps(report)) == report
    health = report["index"]
    assert [row["codewords"] for row in health] == [6, 3]
    assert not any(row["collapsed"] for row in health)


def test_recall_at_full_width_is_the_exhaustive_recall(dataset, make_recipe, tmp_path):
    recipe = make_recipe(search={"widths": [999, 999]})
    trainer = Trainer(recipe, dataset, tmp_path / "run", progress=False)
    got = evaluate(trainer.train(), dataset, recipe, trainer.state, progress=False)["retrieval"]
    assert got["search"] == got["exhaustive"]
    assert set(got["search_recall"].values()) == {1.0}
    assert got["scored_share"] == 1.0
    assert [row["true_item_kept"] for row in got["per_layer"]] == [1.0, 1.0]


def test_the_beams_recall_of_true_items_falls_with_its_width(dataset, make_recipe, tmp_path):
    trainer = Trainer(make_recipe(), dataset, tmp_path / "run", progress=False)
    model = trainer.train()
    kept = []
    for width in (1, 3, 6):
        recipe = make_recipe(search={"widths": [width, 999]})
        got = evaluate(model, dataset, recipe, trainer.state, progress=False)["retrieval"]["per_layer"]
        assert got[0]["true_item_kept"] == got[1]["true_item_kept"]  # all children of what layer 1 kept
        kept.append(got[0]["true_item_kept"])
    assert 0 < kept[0] < kept[1] < kept[2] == 1.0


@pytest.mark.parametrize(
    "model", [{"index": "kmeans"}, {"index": "hierarchy", "codebooks": [], "columns": ["shop", "shop"]}]
)
def test_other_ways_to_build_the_index(dataset, make_recipe, tmp_path, model):
    recipe = make_recipe(model=model)
    trainer = Trainer(recipe, dataset, tmp_path / "run", progress=False)
    trained = trainer.train()
    if model["index"] == "kmeans":
        assert all(not c.requires_grad for c in trained.lti.codebook)
    else:
        assert trained.codebooks() == []
        assert len(np.unique(trainer.state.paths[:, 0])) == 8
    assert evaluate(trained, dataset, recipe, trainer.state, progress=False)["retrieval"]["requests"] == 38


def test_hierarchy_columns_are_checked(dataset, make_recipe, tmp_path):
    recipe = make_recipe(model={"index": "hierarchy", "codebooks": [], "columns": ["category", "shop"]})
    with pytest.raises(SchemaError, match="'category' is not an item feature of kind sparse with one value"):
        Trainer(recipe, dataset, tmp_path / "run", progress=False).train()


def test_a_teacher_gives_the_soft_labels(dataset, make_recipe, tmp_path):
    Trainer(make_recipe(), dataset, tmp_path / "teacher", progress=False).train()
    recipe = make_recipe(train={"teacher": str(tmp_path / "teacher"), "max_steps": 4})
    student = Trainer(recipe, dataset, tmp_path / "student", progress=False)
    student.train()
    assert student.objective.teacher is not None
    assert student.history[-2]["distil"] > 0


def test_load_run_gives_the_trained_model(dataset, make_recipe, tmp_path):
    trainer = Trainer(make_recipe(), dataset, tmp_path / "run", progress=False)
    model = trainer.train()
    run = load_run(tmp_path / "run")
    assert same(weights(model), weights(run.model))
    assert run.step == 24
    assert run.finished
    assert np.array_equal(run.index.paths, trainer.state.paths)
    assert np.array_equal(run.items.ids, dataset.items.ids)


def test_damaged_and_foreign_checkpoints_are_refused(dataset, make_recipe, tmp_path):
    run = tmp_path / "run"
    trainer = Trainer(make_recipe(train={"max_steps": 1}), dataset, run, progress=False)
    trainer.train()
    path = run / "checkpoint.pt"
    schema = trainer.recipe.schema
    with pytest.raises(FormatError, match="no such file; has the run been trained"):
        load_checkpoint(run / "none.pt", schema)
    other = make_recipe(schema={"tasks": [{"name": "click"}]}).schema
    with pytest.raises(SchemaMismatch, match=f"schema {schema.hash}, the run's schema.json is {other.hash}"):
        load_checkpoint(path, other)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match="cannot be read"):
        load_checkpoint(path, schema)


def emptied(dataset, split, rows=0):
    """The data set with only the first rows of a split."""
    part = getattr(dataset, split)
    users = type(part.users)(part.users.dense[:rows], part.users.ids[:rows])
    fields = {name: getattr(part, name)[:rows] for name in ("item_row", "labels", "time", "user_key", "fold")}
    return replace(dataset, **{split: type(part)(users=users, **fields)})


def test_an_empty_split_is_named(dataset, make_recipe, tmp_path):
    trainer = Trainer(make_recipe(train={"max_steps": 1}), dataset, tmp_path / "run", progress=False)
    model, state = trainer.train(), trainer.state
    with pytest.raises(
        DataError, match="no impressions to evaluate on: this split is empty; change .* split:"
    ):
        evaluate(model, emptied(dataset, "test"), trainer.recipe, state, progress=False)


def test_figures_without_positives_are_null_not_nan(dataset, make_recipe, tmp_path):
    trainer = Trainer(make_recipe(train={"max_steps": 1}), dataset, tmp_path / "run", progress=False)
    model, state = trainer.train(), trainer.state
    few = emptied(dataset, "test", 4)
    few.test.labels[:] = 0
    few.train.labels[:, 1], kept = 0, dataset.train.labels[:, 1].copy()  # and a task without any positive
    try:
        report = evaluate(model, few, trainer.recipe, state, progress=False)
    finally:
        dataset.train.labels[:, 1] = kept
    assert report["retrieval"] == {
        "requests": 0, "requests_dropped": 0, "positives": 0, "positives_dropped": 0, "candidates": "all",
        "widths": [4, 8], "corpus": 120,
    }  # fmt: skip
    assert all(row["calibration"] is None for row in report["pointwise"])
    assert [row["ne"] is None for row in report["pointwise"]] == [False, True] * 3
    write_json(
        tmp_path / "metrics.json", {"nan": float("nan"), "list": [float("inf"), 1.5], "report": report}
    )
    saved = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert saved == {"nan": None, "list": [None, 1.5], "report": report}
    assert "no user has a positive in this split" in describe(report)


def test_evaluation_keeps_no_trace_of_every_node(dataset, make_recipe, tmp_path, monkeypatch):
    """Per request and item a node number would be gigabytes over a corpus of 100,000 items."""
    trainer = Trainer(make_recipe(train={"max_steps": 1}), dataset, tmp_path / "run", progress=False)
    model = trainer.train()
    kept = []

    def search_recall_at(found, exact, k):
        kept.extend(array for result in exact for array in vars(result).values() if hasattr(array, "nbytes"))
        kept.extend(trace.nodes for result in exact for trace in result.layers)
        return 1.0

    monkeypatch.setattr("hsnn_train.retrieval._search_recall_at", search_recall_at)
    evaluate(model, dataset, trainer.recipe, trainer.state, progress=False)
    assert kept
    assert max(array.shape[1] for array in kept if array.ndim > 1) <= trainer.recipe.search.max_k


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("train", "batch_size", 0, "train.batch_size: got 0, expected a whole number of at least 1"),
        ("train", "refresh_steps", 0, "train.refresh_steps: got 0"),
        ("train", "negatives", -1, "train.negatives: got -1, expected a whole number of at least 0"),
        ("train", "warmup", 1.5, r"train.warmup: got 1.5, expected a fraction of the steps, 0 to 1"),
        ("train", "lr", 0, "train.lr: got 0.0, expected a number above 0"),
        ("train", "towers_first", 1, "train.towers_first: got 1, expected true or false"),
        ("train", "distil", -1.0, "train.distil: got -1.0, expected a number of at least 0"),
        ("model", "codebooks", [6, "3"], "model.codebooks: got '3', expected a whole number"),
        ("model", "layers", ["smal"] * 3, "model.layers: unknown preset 'smal'; known presets"),
        ("search", "widths", [4, 0], "search.widths: got 0, expected a whole number of at least 1"),
        ("search", "k", 51, r"search.k: got 51, more than search.max_k \(50\)"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_runs(make_recipe, section, key, value, message):
    with pytest.raises(SchemaError, match=message):
        make_recipe(**{section: {key: value}})


def test_a_teacher_without_pairs_to_teach_on_is_refused(make_recipe):
    with pytest.raises(SchemaError, match=r"train.teacher: has no effect without train.distil and either"):
        make_recipe(train={"teacher": "runs/big", "unlabelled": 0})


def test_files_that_are_no_recipe(tmp_path, monkeypatch):
    (tmp_path / "bad.yaml").write_text("schema: {a: [}")
    with pytest.raises(SchemaError, match=r"bad.yaml: is not YAML: "):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "synthetic").mkdir()  # a folder of a shipped recipe's name hides nothing
    monkeypatch.chdir(tmp_path)
    assert load_recipe("synthetic").name == "synthetic"
    with pytest.raises(SchemaError, match="no such file, and no shipped recipe"):
        load_recipe(tmp_path)
    with pytest.raises(SchemaError, match="data: got 'x', expected a mapping"):
        recipe_from_dict({"schema": {}, "data": "x"}, "x", tmp_path)


def test_a_relative_teacher_is_written_as_an_absolute_path(make_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make_recipe(train={"teacher": "runs/big"}).to_dict()["train"]["teacher"] == str(
        tmp_path / "runs/big"
    )
    assert make_recipe().to_dict()["train"]["teacher"] == ""


def test_exponents_without_a_dot_are_numbers(make_recipe):
    """YAML 1.1 reads `1e-3` as text."""
    assert make_recipe(train={"lr": "1e-3"}).train.lr == 0.001


def test_recipes_name_what_is_wrong(make_recipe):
    with pytest.raises(SchemaError, match=r"train\.epoch: unknown key; known keys: epochs"):
        make_recipe(train={"epoch": 3})
    with pytest.raises(SchemaError, match=r"model\.layers: got 'small', expected a list"):
        make_recipe(model={"layers": "small"})
    with pytest.raises(SchemaError, match=r"train\.lr: got 'fast', expected a number"):
        make_recipe(train={"lr": "fast"})
    with pytest.raises(SchemaError, match=r"model\.index: got 'magic', expected one of joint"):
        make_recipe(model={"index": "magic"})
    with pytest.raises(SchemaError, match=r"search\.widths: got 1 widths, expected 2"):
        make_recipe(search={"widths": [4]})


def test_the_section_for_models_without_interactions_is_kept_and_names_what_is_wrong(make_recipe, tmp_path):
    def with_section(section):
        return recipe_from_dict(make_recipe().to_dict() | {"without_interactions": section}, "x", tmp_path)

    kept = with_section({"model": {"min_positives": 7}, "train": {"lr": 0.5}})
    assert recipe_from_dict(kept.to_dict(), "x", tmp_path) == kept
    assert kept.model.min_positives == 1
    assert kept.changes_for(["cpu_xs", "cpu_mol"]) == {"model.min_positives": 7, "train.lr": 0.5}
    assert kept.changes_for(["cpu_s", "cpu_xs"]) == {}
    for section, message in (
        ({"train": {"min": 1}}, r"without_interactions: train\.min: unknown key; known keys: epochs"),
        (
            {"train": {"listed": 2}},
            "without_interactions: train.hard and train.listed: got 0 and 2, expected less",
        ),
        (
            {"train": {"seed": 2}},
            "without_interactions.train.seed: is the comparison's to say; so are model.layers",
        ),
        (
            {"search": {"k": 2}},
            "without_interactions: got {'search': {'k': 2}}, expected {model: {...}, train: {...}}",
        ),
        (["train.lr"], r"without_interactions: got \['train.lr'\], expected"),
    ):
        with pytest.raises(SchemaError, match=message):
            with_section(section)


@pytest.mark.parametrize("layers", [["small"], ["small", "small"], ["two_tower_xs"] * 4])
def test_a_teacher_of_other_depth_scores_with_its_own_index(dataset, make_recipe, tmp_path, layers):
    """Soft labels are what the teacher's own search would say, whatever the student's index looks like."""
    depth = len(layers)
    model = {"layers": layers, "codebooks": [5] * (depth - 1)}
    recipe = make_recipe(model=model, search={"widths": [3] * (depth - 1)}, train={"max_steps": 6})
    trained = Trainer(recipe, dataset, tmp_path / "teacher", progress=False)
    trained.train()
    t = {"teacher": str(tmp_path / "teacher"), "max_steps": 2, "seed": 5}
    student = Trainer(make_recipe(train=t), dataset, tmp_path / "student", progress=False)
    student.train()
    rows = np.arange(7)
    candidates = student.batches.make(dataset.train, rows, student.state, step_rng(5, 1)).candidates
    soft = student.objective.teacher.logits(rows, candidates)
    corpus = corpus_of(trained.model, dataset, trained.state)
    scorer = LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, TorchRunner(trained.model))
    users = type(dataset.train.users)(dataset.train.users.dense[rows], dataset.train.users.ids[rows])
    every = exhaustive(corpus.index, scorer, users, len(dataset.item_keys), np.ones(2, np.float32))
    for user in rows:
        for candidate, key in enumerate(dataset.item_keys[candidates[user]]):
            place = int(np.flatnonzero(every.item_ids[user] == key)[0])
            expected = torch.from_numpy(every.probabilities[user, place])
            assert torch.allclose(torch.sigmoid(soft[user, candidate]), expected, atol=1e-5)


def test_a_teacher_of_other_data_is_refused(dataset, make_recipe, tmp_path):
    Trainer(make_recipe(train={"max_steps": 1}), dataset, tmp_path / "teacher", progress=False).train()
    recipe = make_recipe(train={"teacher": str(tmp_path / "teacher")})
    other = replace(dataset, item_keys=dataset.item_keys[::-1].copy())
    with pytest.raises(DataError, match=r"tables have changed since it was trained \(item keys differs\)"):
        Trainer(recipe, other, tmp_path / "student", progress=False)
    foreign = make_recipe(schema={"tasks": [{"name": "click"}]}).schema
    with pytest.raises(SchemaMismatch, match=f"asked for schema {foreign.hash}"):
        Trainer(recipe, replace(dataset, schema=foreign), tmp_path / "student", progress=False)


def test_resuming_a_finished_run_changes_nothing(dataset, make_recipe, tmp_path):
    first = Trainer(make_recipe(), dataset, tmp_path / "run", progress=False)
    first.train()
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    again = Trainer(make_recipe(), dataset, tmp_path / "run", resume=True, progress=False)
    again.train()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert same(weights(first.model), weights(again.model))
    assert again.history == first.history


def test_resuming_on_other_tables_is_refused(dataset, make_recipe, tmp_path):
    Trainer(make_recipe(train={"max_steps": 2}), dataset, tmp_path / "run", progress=False).train()
    items = type(dataset.items)(dataset.items.dense + 1, dataset.items.ids)
    with pytest.raises(
        DataError,
        match=r"items' dense differs\), or this release derives other features from them, so its ids",
    ):
        Trainer(make_recipe(), replace(dataset, items=items), tmp_path / "run", resume=True, progress=False)
    train = replace(dataset.train, item_row=dataset.train.item_row[:-1])
    with pytest.raises(DataError, match="began with 1200 training impressions, the tables give 1199 now"):
        Trainer(make_recipe(), replace(dataset, train=train), tmp_path / "run", resume=True, progress=False)


@pytest.mark.parametrize("when", ["last step", "final refresh"])
def test_ctrl_c_at_the_very_end_keeps_a_finished_checkpoint(dataset, make_recipe, tmp_path, when):
    whole = Trainer(make_recipe(), dataset, tmp_path / "whole", progress=False)
    whole.train()
    cut = Trainer(make_recipe(), dataset, tmp_path / "cut", progress=False)
    name = "_one_step" if when == "last step" else "_refresh"
    inner = getattr(cut, name)

    def hit(*args, **options):
        if cut.step == 23 or options.get("final"):
            os.kill(os.getpid(), signal.SIGINT)
        return inner(*args, **options)

    setattr(cut, name, hit)
    with pytest.raises(
        Interrupted, match=r"after the last step of 24, before calibration; .*hsnn train --resume"
    ):
        cut.train()
    resumed = Trainer(make_recipe(), dataset, tmp_path / "cut", resume=True, progress=False)
    assert same(weights(whole.model), weights(resumed.train()))
    assert resumed.history == whole.history


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_checkpoint_before(dataset, make_recipe, tmp_path, monkeypatch, call):
    run = tmp_path / "run"
    trainer = Trainer(make_recipe(train={"checkpoint_steps": 5}), dataset, run, progress=False)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    one_step = trainer._one_step

    def fill_after_7():
        if trainer.step == 7:
            monkeypatch.setattr(os, call, full)
        return one_step()

    trainer._one_step = fill_after_7
    with pytest.raises(NotSaved, match=r"checkpoint of step 10 could not .*No space left on device\); the one "
                                       r"before is kept; make room, then go on with: hsnn train --resume"):  # fmt: skip
        trainer.train()
    monkeypatch.undo()
    assert not list(run.glob("*.tmp"))
    resumed = Trainer(make_recipe(), dataset, run, resume=True, progress=False)
    assert resumed.step == 5
    whole = Trainer(make_recipe(), dataset, tmp_path / "whole", progress=False)
    assert same(weights(whole.train()), weights(resumed.train()))


def test_a_full_disk_while_writing(tmp_path):
    """The real thing: a device that is always full."""
    target = tmp_path / "checkpoint.pt"
    target.write_bytes(b"old")
    aside = tmp_path / f".checkpoint.pt.{os.getpid()}.tmp"
    aside.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(target, {"weights": torch.zeros(100_000)})
    assert target.read_bytes() == b"old"
    assert not aside.is_symlink()


def test_divergence_is_noticed_at_once(dataset, make_recipe, tmp_path):
    trainer = Trainer(make_recipe(), dataset, tmp_path / "run", progress=False)
    one_step = trainer._one_step

    def poison():
        if trainer.step == 3:
            with torch.no_grad():
                trainer.model.ensemble[2].bias.fill_(float("nan"))
        return one_step()

    trainer._one_step = poison
    with pytest.raises(
        Diverged, match=r"step 4 of 24: supervised, .*loss is not finite; .* smaller train.lr"
    ):
        trainer.train()


def test_a_new_run_leaves_nothing_of_the_one_before(dataset, make_recipe, tmp_path):
    run = tmp_path / "run"
    Trainer(make_recipe(train={"max_steps": 2}), dataset, run, progress=False).train()
    Trainer(make_recipe(train={"seed": 9}), dataset, run, progress=False)
    assert not (run / "checkpoint.pt").exists()
    assert not (run / "history.jsonl").exists()


def test_a_log_of_positives_alone_needs_negatives(dataset, make_recipe, tmp_path):
    labels = dataset.train.labels.copy()
    labels[:, 0] = 1
    positives = replace(dataset, train=replace(dataset.train, labels=labels))
    with pytest.raises(DataError, match=r"label of task click is 1, .* set train.negatives \(8, say\)"):
        Trainer(make_recipe(), positives, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    Trainer(make_recipe(train={"negatives": 2, "max_steps": 1}), positives, tmp_path / "run", progress=False)
