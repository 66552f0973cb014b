"""Neighbours of items, and the folds that keep an impression's own label out of its crossings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hsnn_core.errors import SchemaError
from hsnn_core.schema import Schema
from hsnn_train.data.dataset import Dataset, build_dataset
from hsnn_train.data.neighbours import BACKWARD, DAMPING, DECAY, FOLDS, fold_of, neighbours
from hsnn_train.data.splits import Split
from hsnn_train.data.tables import LogTables
from hsnn_train.recipe import Recipe, recipe_from_dict
from hsnn_train.trainer import make_batches, rows_i2ifs


def test_by_hand():
    # Histories 0-1-2, 1-0, and 3-1: 1 follows 0 and 3, 0 follows 1, 2 follows both 1 and, with one place between, 0.
    group = np.array([7, 7, 7, 8, 8, 9, 9])
    time = np.array([1, 2, 3, 5, 4, 1, 2])
    item = np.array([0, 1, 2, 0, 1, 3, 1])
    found = neighbours(group, time, item, items=5, length=3)
    assert found.tolist() == [[1, 2, -1], [0, 2, 3], [1, 0, -1], [1, -1, -1], [-1, -1, -1]]
    # From 1, item 0 came once after and once before, 2 once after; 0 has popularity 2, 2 has 1, and 3 came before.
    assert (1 + BACKWARD) / 2**DAMPING > 1 > BACKWARD
    # From 2 nothing goes on; of what came before it, 1 is nearer than 0 by more than its popularity 3 takes.
    assert 1 / 3**DAMPING > DECAY / 2**DAMPING


def test_what_comes_after_an_item_weighs_more_than_what_came_before():
    group, item = np.array([1, 1, 1]), np.array([1, 0, 2])
    assert neighbours(group, np.arange(3), item, items=3, length=2)[0].tolist() == [2, 1]


def test_damping_is_the_callers():
    # 1 follows 0 twice and is twice as popular as 2, which follows it once.
    group, item = np.array([1, 1, 2, 2, 3, 3]), np.array([0, 1, 0, 1, 0, 2])
    found = [neighbours(group, np.arange(6), item, 3, 1, damping=d)[0, 0] for d in (0.0, 1.5)]
    assert found == [1, 2]


def test_popular_items_are_damped():
    # 0 meets 1 and 2 once each; 1 is everywhere else too.
    group = np.array([1, 1, 2, 2, 3, 4, 5])
    item = np.array([0, 1, 0, 2, 1, 1, 1])
    assert neighbours(group, np.arange(7), item, items=3, length=2)[0].tolist() == [2, 1]


def test_an_item_is_no_neighbour_of_itself_and_far_places_are_none():
    group = np.zeros(13, int)
    item = np.array([0, 0, 1, *range(2, 12)])
    found = neighbours(group, np.arange(13), item, items=12, length=12)
    assert 0 not in found[0]
    assert 11 not in found[0] and 11 in found[1]  # 11 and 10 places


def test_of_sets_all_items_are_equally_near_and_long_ones_weigh_less():
    # 0 is with 1 in a set of two, with 2 and 3 in a set of four: 1 / 2 against 1 / 4, popularity aside.
    group = np.array([1, 1, 2, 2, 2, 2])
    item = np.array([0, 1, 0, 3, 4, 2])
    found = neighbours(group, np.zeros(6), item, items=5, length=4, ordered=False)
    assert found[0].tolist() == [1, 2, 3, 4]
    # Once among two is more than twice among five: one over the size, not over its root.
    group, item = np.repeat([1, 2, 3], [2, 5, 5]), np.array([0, 1, 0, 2, 3, 4, 5, 0, 2, 6, 7, 8])
    assert neighbours(group, np.zeros(12), item, 9, 1, ordered=False, damping=0.0)[0, 0] == 1
    group, item = np.array([1, 1, 2, 2, 2, 2]), np.array([0, 1, 0, 3, 4, 2])
    shuffled = np.array([3, 1, 5, 0, 2, 4])
    again = neighbours(group[shuffled], np.zeros(6), item[shuffled], items=5, length=4, ordered=False)
    assert again.tolist() == found.tolist()


def test_a_short_list_is_the_head_of_a_long_one():
    rng = np.random.default_rng(0)
    group, item = np.sort(rng.integers(0, 60, 600)), rng.integers(0, 40, 600).astype(np.int32)
    long = neighbours(group, np.arange(600), item, items=40, length=39)
    assert neighbours(group, np.arange(600), item, items=40, length=5).tolist() == long[:, :5].tolist()


def test_folds_are_fixed_and_even():
    folds = fold_of(np.arange(10_000))
    assert folds[:5].tolist() == fold_of(np.arange(5)).tolist()
    counts = np.bincount(folds, minlength=FOLDS)
    assert len(counts) == FOLDS and counts.min() > 1800


SCHEMA = {
    "name": "shop",
    "keys": {"user": "user", "item": "sku", "time": "time"},
    "tasks": [{"name": "click"}],
    "features": {
        "user": {"history": {"kind": "sequence", "of": "item", "length": 4, "from": "click"}},
        "item": {
            "item": {"kind": "sparse", "of": "item"},
            "near": {"kind": "sparse", "of": "item", "max": 2, "from": "click"},
        },
    },
    "interactions": {"near": {"user": "history", "item": "near", "matches": 1}},
}


def dataset(near: dict | None = None) -> Dataset:
    """Users 0 to 9: user u clicks items 2u and 2u + 1, which nobody else does; the last item is for test. ``near``: the
    interaction, where not SCHEMA's."""
    users = np.repeat(np.arange(10), 3)
    items = np.stack([2 * np.arange(10), 2 * np.arange(10) + 1, np.full(10, 20)], axis=1).ravel()
    part = np.tile(["train", "train", "test"], 10)
    impressions = pa.table(
        {"user": users, "sku": items, "time": np.arange(30), "click": np.ones(30, int), "part": part}
    )
    schema = Schema.from_dict(SCHEMA if near is None else SCHEMA | {"interactions": {"near": near}})
    tables = LogTables(schema, impressions, None, pa.table({"sku": np.arange(21)}))
    return build_dataset(schema, tables, Split(by="column", column="part"), seed=1)


def near_of(items: np.ndarray, found: Dataset) -> list[list[int]]:
    ids = items[:, found.schema.layout("item").slots[1].start :]
    keys = np.append([-1, -1], found.item_keys)
    return [[int(keys[i]) for i in row if i > 1] for row in ids]


def test_a_pair_of_one_user_is_seen_when_served_and_not_when_that_user_is_trained_on():
    found = dataset()
    assert near_of(found.items.ids, found)[:4] == [[1], [0], [3], [2]]
    assert near_of(found.items.ids, found)[20] == []  # the test split says nothing
    for user in range(10):
        out = near_of(found.folds[int(fold_of(np.array([user]))[0])].ids, found)
        assert out[2 * user] == [] and out[2 * user + 1] == []
    assert found.train.fold.tolist() == fold_of(found.train.user_key).tolist()
    assert set(found.test.fold.tolist()) == {-1}


@pytest.mark.parametrize(
    ("near", "crossed"), [(None, 1.0), ({"user": "history", "via": "near", "item": "item"}, np.log(2.0))]
)
def test_training_crosses_out_of_fold_and_evaluation_does_not(near, crossed):
    found = dataset(near)
    own = np.arange(20)  # row = item, clicked by user row // 2
    lists = rows_i2ifs(found)
    assert len(lists) == FOLDS + 1
    second = own[1::2]  # the second click of every user, whose history is the first
    recipe = _recipe()
    batches = make_batches(found, recipe)
    users = found.train.users.ids[second]
    served = batches._crossings(users, second[:, None], [None], np.full(10, -1))[0]
    trained = batches._crossings(users, second[:, None], [None], found.train.fold[second])[0]
    assert served.dense[:, 0, 0].tolist() == [np.float32(crossed)] * 10
    assert trained.dense[:, 0, 0].tolist() == [0.0] * 10


def _recipe() -> Recipe:
    raw = {"schema": SCHEMA, "data": {}, "model": {"layers": ["cpu_s"], "codebooks": []},
           "search": {"widths": []}, "train": {"negatives": 2, "unlabelled": 0}}  # fmt: skip
    return recipe_from_dict(raw, "shop", Path())


@pytest.mark.parametrize(
    ("owner", "entry"),
    [
        ("user", {"kind": "sparse", "of": "item", "from": "click"}),
        ("item", {"kind": "sparse", "vocab": 4, "from": "click"}),
    ],
)
def test_only_histories_and_neighbours_are_derived(owner, entry):
    raw = {**SCHEMA, "features": {**SCHEMA["features"], owner: {**SCHEMA["features"][owner], "other": entry}}}
    with pytest.raises(SchemaError, match=r"other.from: only a user's sequence `of: item` \(a history\)"):
        Schema.from_dict(raw)
