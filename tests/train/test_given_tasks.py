"""A click given an impression: what was drawn as a negative of the impression says nothing of the click."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_world import SCHEMA, Bar, recipe, tables

from hsnn_core.errors import DataError, SchemaError
from hsnn_core.schema import Schema
from hsnn_train import beam, losses
from hsnn_train.batches import step_rng
from hsnn_train.calibration import calibrate
from hsnn_train.data.dataset import build_dataset
from hsnn_train.data.splits import Split
from hsnn_train.data.tables import LogTables, check_tables
from hsnn_train.evaluate import Pointwise, base_rates, evaluate, pointwise, pointwise_report
from hsnn_train.negatives import Pools
from hsnn_train.objective import Moment
from hsnn_train.trainer import Trainer, evaluation_batches

TASKS = [
    {"name": "click", "given": "shown", "rank": 1.0},
    {"name": "conversion", "given": "click"},
    {"name": "shown", "weight": 0.1, "rank": 1.0},
]
NAMES = [str(task["name"]) for task in TASKS]
WORLD = SCHEMA | {"tasks": TASKS}
POOL = {"pool": 60, "negatives": 4, "hard": 1, "unlabelled": 0, "init_at": 0.5}
SAMPLED = {"negatives": 4, "unlabelled": 2}


@pytest.fixture(scope="module")
def world():
    torch.set_num_threads(1)
    log = tables()
    impressions = log.impressions.append_column("shown", pa.array(np.ones(len(log.impressions), np.int64)))
    schema = Schema.from_dict(WORLD)
    log = LogTables(schema, impressions, log.users, log.items)
    return build_dataset(schema, log, Split.from_dict({"by": "time"}), seed=1)


def made(train):
    return recipe(schema=WORLD, train=train)


def parts_of(trainer, examples, warm):
    torch.manual_seed(0)  # hard negatives are drawn by torch
    trainer.model.eval()
    objective = replace(trainer.objective, examples=examples)
    parts, _ = objective(np.arange(48), trainer.state, Moment(trainer.alpha(), 1.0, warm), step_rng(0, 3))
    return parts


def started(setting, world, folder):
    trainer = Trainer(setting, world, folder, progress=False)
    trainer._refresh(Bar())
    return trainer


@pytest.mark.parametrize(
    ("train", "warm", "told", "untold"),
    [
        (SAMPLED, True, ["supervised"], []),
        (SAMPLED, False, ["supervised", "index"], []),
        (POOL, True, ["retrieval"], []),
        (POOL, False, ["retrieval", "nodes", "index", "supervised"], ["softmax", "node_distil"]),
    ],
)
def test_a_label_counts_where_the_task_that_it_is_given_has_one(world, tmp_path, train, warm, told, untold):
    """Losses as functions of the labels: a conversion's means nothing where there was no click, and neither is a click
    or a conversion chosen over what was drawn."""
    trainer = started(made(train | {"node_distil": 1.0}), world, tmp_path / "run")
    labels = world.train.labels
    clicked = labels[:, 0] > 0

    def with_labels(task, where, value):
        changed = labels.copy()
        changed[where, task] = value
        return parts_of(trainer, replace(world.train, labels=changed), warm)

    as_logged = parts_of(trainer, world.train, warm)
    no_click = with_labels(1, ~clicked, 1.0)
    other_clicks = with_labels(0, clicked & (labels[:, 1] == 0), 0.0)
    for name in told:
        assert no_click[name] == as_logged[name], "no conversion is asked of what was not clicked"
        assert with_labels(1, clicked, 1.0)[name] != as_logged[name]
        assert other_clicks[name] != as_logged[name]
    for name in untold:
        assert other_clicks[name] == as_logged[name]


def test_what_is_given_another_task_is_no_choice_among_what_was_drawn(world, tmp_path):
    trainer = started(made(POOL | {"node_distil": 1.0}), world, tmp_path / "run")
    parts = parts_of(trainer, world.train, warm=False)
    for name in ("softmax", "node_distil"):
        for layer in (1, 2):
            scale = trainer.model.layer(layer).dot.log_scale  # (T,)
            (gradient,) = torch.autograd.grad(parts[name], [scale], retain_graph=True)
            assert gradient[2] != 0 and not gradient[:2].any()
    silent = replace(world.train, labels=np.zeros_like(world.train.labels))
    assert parts_of(trainer, silent, warm=False)["nodes"] == 0.0, (
        "nothing shown, nothing clicked: nothing to choose"
    )


def test_only_logits_that_negatives_were_drawn_for_are_corrected_for_the_draws(world, tmp_path, monkeypatch):
    trainer = started(made(POOL), world, tmp_path / "run")
    model, seen = trainer.model, {}
    score, layered = model.score_pairs, losses.layered

    def scored(*given):
        out = score(*given)
        seen["given"] = out.logits[-1]
        return out

    def summed(logits, *given):
        seen["corrected"] = logits[-1]
        return layered(logits, *given)

    monkeypatch.setattr(model, "score_pairs", scored)
    monkeypatch.setattr(losses, "layered", summed)
    trainer.objective(np.arange(16), trainer.state, Moment(trainer.alpha(), 1.0, False), step_rng(0, 0))
    taken_off = seen["given"] - seen["corrected"]
    assert not taken_off[..., :2].any()
    assert taken_off[..., 2].all()


@pytest.mark.parametrize("train", [POOL, SAMPLED], ids=["pool", "sampled"])
def test_every_task_is_learnt_calibrated_and_measured_on_its_own_pairs(world, tmp_path, train):
    setting = made(train | {"max_steps": 160})
    trainer = Trainer(setting, world, tmp_path / "run", progress=False)
    model, batches = trainer.train(), evaluation_batches(world, setting)
    values = pointwise(model, batches, world.valid, trainer.state, 1, parts=True)
    shown, clicked = values.labels[:, 2] == 1, values.labels[:, 0] == 1
    assert np.array_equal(values.told[:, 0], shown) and shown.sum() == len(world.valid)
    assert np.array_equal(values.told[:, 1], clicked)
    assert values.told[:, 2].all() and (~shown).sum() > 3 * shown.sum()
    calibrate(model, values)
    rates = base_rates(world.train.labels, setting.schema, setting.train.negatives)
    labels = world.train.labels
    expected = [labels[:, 0].mean(), labels[labels[:, 0] > 0, 1].mean(), 1 / 5]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    report = pointwise_report(
        pointwise(model, batches, world.valid, trainer.state, 1, parts=True), rates, NAMES
    )
    assert all(row["calibration"] == pytest.approx(1.0, abs=2e-3) for row in report)
    assert min(row["ne"] for row in report if row["task"] == "click") < 0.98
    found = evaluate(model, world, setting, trainer.state, "valid", progress=False)
    assert [row["task"] for row in found["pointwise"][:3]] == NAMES
    assert found["base_rates"]["shown"] == pytest.approx(1 / 5)


def test_an_order_fitted_to_requests_is_refused_where_the_first_task_ranks_nothing_by_itself():
    message = r"train.order: got requests, which is fitted to the first task, click, as if .* ranks is click, shown;"
    with pytest.raises(SchemaError, match=message):
        made(POOL | {"order": "requests"})


def test_a_task_without_a_label_in_a_split_has_neither_figure(recwarn):
    values = Pointwise(np.zeros((1, 2, 2)), np.zeros((2, 2)), np.array([[True, False]] * 2))
    report = pointwise_report(values, np.array([0.5, 0.5]), "ab")
    assert [(row["ne"] is None, row["calibration"] is None) for row in report] == [
        (False, False),
        (True, True),
    ]
    assert not recwarn.list


def test_items_are_drawn_by_how_often_they_were_shown(world):
    shown = np.bincount(world.train.item_row, minlength=len(world.item_keys))
    np.testing.assert_array_equal(world.item_counts, shown)


def test_what_was_shown_to_a_user_is_no_negative_where_it_is_no_candidate(world, tmp_path):
    setting = recipe(schema=WORLD, train=POOL, search={"candidates": "new"})
    trainer = Trainer(setting, world, tmp_path / "run", progress=False)
    train, rows = world.train, np.arange(len(world.train))[-20:]
    pool = trainer.objective.pools.draw(train, rows, step_rng(0, 0))
    for row, allowed in zip(rows, pool.allowed):
        before = (train.user_key == train.user_key[row]) & (train.time < train.time[row])
        seen = np.setdiff1d(train.item_row[before], train.item_row[row])
        assert len(seen) and not allowed[np.isin(pool.rows, seen)].any()


def test_a_node_order_is_fitted_to_what_multiplies(world, tmp_path, monkeypatch):
    monkeypatch.setattr(beam, "BEST", 5)
    setting = made(SAMPLED | {"max_steps": 40})
    trainer = Trainer(setting, world, tmp_path / "run", progress=False)
    model, batches = trainer.train(), evaluation_batches(world, setting)
    values = pointwise(model, batches, world.valid, trainer.state, 1, parts=True)
    before = [ensemble.weight.clone() for ensemble in model.ensemble]
    pairs = beam.node_pairs(model, world, setting, trainer.state)
    beam.fit_beam(model, pairs, values, setting.schema.rank)
    changed = [(now.weight != then).any(0).tolist() for now, then in zip(model.ensemble, before)]
    assert changed == [[True, False, True], [True, False, True], [False, False, False]]
    after = pointwise(model, batches, world.valid, trainer.state, 1)
    for row in pointwise_report(after, np.full(3, 0.5), NAMES)[:6]:
        if row["task"] != "conversion":
            assert row["calibration"] == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize(
    ("task", "where", "message"),
    [
        (
            "conversion",
            "click",
            "no training label of task conversion is 0 where click is 1, so there is nothing",
        ),
        (
            "click",
            "shown",
            "no training label of task click is 0 where shown is 1, so there is nothing to tell",
        ),
    ],
)
def test_a_task_that_always_says_yes_where_it_is_asked_is_refused(world, tmp_path, task, where, message):
    labels = world.train.labels.copy()
    labels[:, NAMES.index(task)] = labels[:, NAMES.index(where)]
    always = replace(world, train=replace(world.train, labels=labels))
    with pytest.raises(DataError, match=message):
        Trainer(made(POOL), always, tmp_path / "run", progress=False)


def test_a_label_without_the_one_that_it_is_given_is_refused():
    log = tables()
    shown = pa.array((np.arange(len(log.impressions)) >= 3).astype(np.int64))
    wrong = LogTables(
        Schema.from_dict(WORLD), log.impressions.append_column("shown", shown), log.users, log.items
    )
    clicks = np.flatnonzero(log.impressions.column("click").to_numpy()[:3])
    assert len(clicks)
    found = f"{len(clicks)} of 1,500 rows have click = 1 and shown = 0, the first of them row {clicks[0]};"
    with pytest.raises(DataError, match=found):
        check_tables(wrong)


def test_a_task_that_no_impression_of_training_tells_of_has_no_base_rate():
    labels = np.array([[0.0, 0.0, 1.0]] * 3, np.float32)
    rates = base_rates(labels, Schema.from_dict(WORLD), 1)
    assert rates[0] == 0.0 and np.isnan(rates[1]) and rates[2] == 0.5


@pytest.mark.parametrize("size", [3, 1000])
def test_a_pool_holds_the_impressions_item_though_nobody_chose_it_in_training(world, size):
    counts = world.item_counts.copy()
    never = world.train.item_row[:5]
    counts[never] = 0
    pool = Pools(counts, size, 0.75).draw(world.train, np.arange(20), step_rng(0, 0))
    assert np.array_equal(pool.rows[pool.positive], world.train.item_row[:20])
    assert np.isfinite(pool.log_inclusion).all() and (pool.log_inclusion <= 0).all()
    others = Pools(counts, size, 0.75).draw(world.train, np.arange(200, 210), step_rng(0, 0))
    assert not np.isin(np.setdiff1d(never, world.train.item_row[200:210]), others.rows).any()
    places = np.isin(pool.rows, never)
    own = pool.positive[:, None] == np.arange(len(pool.rows))
    np.testing.assert_array_equal(pool.allowed[:, places], own[:, places])
