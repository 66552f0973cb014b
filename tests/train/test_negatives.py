"""Negatives from the lists that stood before users: what is drawn, how likely it was, what the losses correct for."""

from functools import partial

import numpy as np
import pytest
import torch
from tqdm import tqdm

from hsnn_core.errors import SchemaError
from hsnn_train.batches import step_rng
from hsnn_train.negatives import ItemLists, Pools
from hsnn_train.objective import Moment
from hsnn_train.trainer import Trainer, make_pools

LISTED = {
    "pool": 20,
    "negatives": 6,
    "hard": 2,
    "listed": 3,
    "listed_from": "history",
    "unlabelled": 0,
    "max_steps": 8,
}
LISTS = ItemLists(slice(1, 5), np.array([-1, -1, 0, 1, 2, -1], np.int32), 2)
USER_IDS = np.array([[9, 2, 4, 2, 0], [9, 5, 3, 0, 0], [9, 1, 5, 0, 0]], np.int32)


def test_a_list_is_its_distinct_items_that_may_be_negatives():
    assert LISTS.rows(USER_IDS).tolist() == [[0, 2, -1, -1], [1, -1, -1, -1], [-1, -1, -1, -1]]


def test_draws_are_uniform_and_an_empty_list_gives_none():
    rows = LISTS.rows(USER_IDS)
    drawn = np.stack([LISTS.draw(rows, np.random.default_rng(i)) for i in range(2000)])
    assert np.mean(drawn[:, 0] == 0) == pytest.approx(0.5, abs=0.03)
    assert set(np.unique(drawn[:, 0])) == {0, 2}
    assert (drawn[:, 1] == 1).all()
    assert (drawn[:, 2] == -1).all()
    absent = np.exp(LISTS.log_absent(rows, np.array([0, 1, 2, 7])))
    np.testing.assert_allclose(absent, [0.25, 0.0, 0.25, 1.0])


def test_a_pool_with_lists_says_how_likely_each_item_was_in_it(dataset, make_recipe):
    pools = make_pools(dataset, make_recipe(train=LISTED), None)
    rows = np.flatnonzero((dataset.train.labels[:, 0] > 0) & (dataset.train.users.ids != 0).any(1))[-12:]
    drawn = [pools.draw(dataset.train, rows, step_rng(0, step)) for step in range(600)]
    own = dataset.train.item_row[rows]
    listed = np.unique(drawn[0].lists[drawn[0].lists >= 0])
    told = {}
    for pool in drawn:
        assert np.array_equal(pool.rows[pool.positive], own)
        for user, places in enumerate(pool.listed):
            mine = pool.lists[user][pool.lists[user] >= 0]
            assert set(pool.rows[places]) <= (set(mine) or {own[user]})
        told |= dict(zip(pool.rows.tolist(), np.exp(pool.log_inclusion).tolist()))
    free = np.setdiff1d(listed, own)  # there by draws alone
    seen = np.mean([np.isin(free, pool.rows) for pool in drawn], axis=0)
    assert len(free) > 5
    chance = np.array([told[row] for row in free.tolist()])
    share = pools.frequency[free]
    # The positives of this batch are given, and not among these.
    chance = 1 - (1 - chance) / (1 - share) ** len(rows)
    np.testing.assert_allclose(chance, seen, atol=0.07)


def test_the_draws_that_fall_on_a_candidate_are_what_is_expected_of_the_list(dataset, make_recipe):
    pools = make_pools(dataset, make_recipe(train=LISTED), None)
    rows = np.arange(len(dataset.train))[-12:]
    pool = pools.draw(dataset.train, rows, step_rng(0, 1))
    expected = pool.listed_draws(np.broadcast_to(np.arange(len(pool.rows)), (len(rows), len(pool.rows))))
    for user, mine in enumerate(pool.lists):
        mine = mine[mine >= 0]
        inside = np.isin(pool.rows, mine)
        np.testing.assert_allclose(expected[user], np.where(inside, 3 / max(1, len(mine)), 0.0), rtol=1e-6)
    without = Pools(dataset.item_counts, 20, 0.5).draw(dataset.train, rows, step_rng(0, 1))
    assert not without.listed_draws(np.zeros((len(rows), 4), np.int64)).any()


def test_what_the_losses_take_off_is_how_often_a_candidate_is_drawn(dataset, make_recipe, tmp_path):
    """Slot by slot over many steps: a user's item comes as often as exp(offset) says, relative to uniform draws."""
    trainer = Trainer(make_recipe(train=LISTED), dataset, tmp_path / "run", progress=False)
    trainer._refresh(tqdm(disable=True))
    objective, state = trainer.objective, trainer.state
    rows = np.flatnonzero(dataset.train.labels[:, 0] > 0)[-8:]
    seen = np.zeros((len(rows), len(dataset.items.ids)))
    told = np.zeros_like(seen)
    possible = len(objective.pools.sampler.rows)
    rounds = 400
    for step in range(rounds):
        torch.manual_seed(step)
        pool = objective.pools.draw(dataset.train, rows, step_rng(0, step))
        flat = torch.full((len(rows), len(pool.rows)), 1 / len(pool.rows))
        pairs, offset = objective._candidates(rows, pool, possible, flat, state)
        items = pool.rows[pairs.of[:, 1:].numpy()]
        for user in range(len(rows)):
            np.add.at(seen[user], items[user], 1 / rounds)
            told[user, items[user]] = np.exp(offset[user, 1:].numpy()) * 6 / possible
    own = dataset.train.item_row[rows]
    seen[np.arange(len(rows)), own] = told[np.arange(len(rows)), own] = 0.0  # the empty lists' stand-in
    often = seen > 0.05
    assert often.sum() > 20
    assert seen[often].sum() == pytest.approx(told[often].sum(), rel=0.1)
    listed = np.zeros_like(often)
    for user, mine in enumerate(pool.lists):
        listed[user, mine[mine >= 0]] = True
    listed &= often
    assert seen[listed].mean() == pytest.approx(told[listed].mean(), rel=0.1)


def test_training_with_lists_runs_in_both_phases(dataset, make_recipe, tmp_path):
    trainer = Trainer(make_recipe(train=LISTED | {"init_at": 0.5}), dataset, tmp_path / "run", progress=False)
    trainer.train()
    assert trainer.finished
    moment = Moment(None, 1.0, warm=False)
    parts, pairs = trainer.objective(np.arange(8), trainer.state, moment, step_rng(0, 1))
    assert torch.isfinite(parts["loss"])
    assert pairs == 8 * 7


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"listed_from": "age"},
            "train.listed_from: got 'age', expected a sequence of items of the user's: history",
        ),
        ({"listed": 0}, "train.listed_from: got 'history' beside train.listed 0; set both"),
        (
            {"listed": 4},
            "train.hard and train.listed: got 2 and 4, expected less than train.negatives .6. together",
        ),
        ({"listed": -1}, "train.listed: got -1, expected a whole number of at least 0"),
    ],
)
def test_lists_that_make_no_sense_are_named(make_recipe, train, message):
    with pytest.raises(SchemaError, match=message):
        make_recipe(train=LISTED | train)


def test_what_a_user_has_had_is_no_negative_where_it_is_no_candidate(dataset, make_recipe, tmp_path):
    fresh = make_recipe(train={"negatives": 6, "unlabelled": 0, "pool": 40}, search={"candidates": "new"})
    rows = np.flatnonzero(dataset.train.labels[:, 0] > 0)[-80:]  # the log's last: users have had something
    had = partial(dataset.earlier, "train", task=0)
    pool = make_pools(dataset, fresh, None, had).draw(dataset.train, rows, step_rng(0, 7))
    for user, (earlier, positive) in enumerate(zip(had(rows), pool.positive)):
        barred = pool.rows[~pool.allowed[user]]
        assert set(barred) == set(pool.rows) & set(earlier) - {pool.rows[positive]}
    assert (~pool.allowed).sum() > 0
    assert pool.allowed[np.arange(len(rows)), pool.positive].all()
    trainer = Trainer(fresh, dataset, tmp_path / "run", progress=False)
    assert trainer.objective.pools is not None and trainer.objective.pools.had is not None
    everything = make_recipe(train={"negatives": 6, "unlabelled": 0, "pool": 40})
    trainer = Trainer(everything, dataset, tmp_path / "all", progress=False)
    assert trainer.objective.pools is not None and trainer.objective.pools.had is None
