"""A click given an impression: what was drawn as a negative of the impression says nothing of the click."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_world import SCHEMA, recipe, tables

from hsnn_core.errors import SchemaError
from hsnn_core.schema import Schema
from hsnn_train import losses
from hsnn_train.batches import step_rng
from hsnn_train.calibration import calibrate
from hsnn_train.data.dataset import build_dataset
from hsnn_train.data.splits import Split
from hsnn_train.data.tables import LogTables
from hsnn_train.evaluate import base_rates, evaluate, pointwise, pointwise_report
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


class Bar:
    def set_description(self, text):
        pass


@pytest.mark.parametrize("train", [POOL, SAMPLED], ids=["pool", "sampled"])
@pytest.mark.parametrize("warm", [True, False])
def test_a_label_counts_where_the_task_that_it_is_given_has_one(world, tmp_path, train, warm):
    """The loss as a function of the labels: a conversion's means nothing where there was no click."""
    trainer = Trainer(made(train), world, tmp_path / "run", progress=False)
    trainer._refresh(Bar())
    moment = Moment(trainer.alpha(), 1.0, warm)
    rows = np.arange(48)

    def supervised(examples):
        objective = replace(trainer.objective, examples=examples)
        torch.manual_seed(0)  # hard negatives are drawn by torch
        parts, _ = objective(rows, trainer.state, moment, step_rng(0, 3))
        return parts["retrieval" if warm and train is POOL else "supervised"].item()

    def relabelled(task, where, value):
        labels = world.train.labels.copy()
        labels[where, task] = value
        return replace(world.train, labels=labels)

    trainer.model.eval()
    as_logged = supervised(world.train)
    unclicked = world.train.labels[:, 0] == 0
    assert supervised(relabelled(1, unclicked, 1.0)) == as_logged, (
        "no conversion is asked of what was not clicked"
    )
    assert supervised(relabelled(1, ~unclicked, 1.0)) != as_logged
    assert supervised(relabelled(0, ~unclicked, 0.0)) != as_logged


def test_only_logits_that_negatives_were_drawn_for_are_corrected_for_the_draws(world, tmp_path, monkeypatch):
    trainer = Trainer(made(POOL), world, tmp_path / "run", progress=False)
    trainer._refresh(Bar())
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
    message = (
        r"train.order: got requests, which is fitted to the first task, click; that is given shown, and ranks"
    )
    with pytest.raises(SchemaError, match=message):
        made(POOL | {"order": "requests"})


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
