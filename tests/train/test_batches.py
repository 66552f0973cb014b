"""Sampled candidates: what may be a negative, what may be unlabelled, and how the batch says so."""

import numpy as np
import pytest
import torch

from hsnn_train.batches import step_rng
from hsnn_train.checkpoint import make_model
from hsnn_train.negatives import CandidateSampler
from hsnn_train.refresh import refresh
from hsnn_train.trainer import make_batches, make_pools

COUNTS = np.array([0, 4, 0, 16, 1])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_negatives_are_items_with_a_positive_by_popularity_to_a_power(power):
    drawn = CandidateSampler(COUNTS, power, everything=False).draw((60_000,), np.random.default_rng(0))
    share = np.bincount(drawn, minlength=5) / len(drawn)
    expected = np.where(COUNTS > 0, COUNTS.astype(float) ** power, 0)
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.01)


def test_unlabelled_pairs_reach_items_the_log_never_showed():
    drawn = CandidateSampler(COUNTS, 0.5, everything=True).draw((2000,), np.random.default_rng(0))
    assert set(drawn.tolist()) == {0, 1, 2, 3, 4}


def test_a_log_without_positives_draws_among_all():
    drawn = CandidateSampler(np.zeros(3, np.int64), 1.0, everything=False).draw(
        (500,), np.random.default_rng(0)
    )
    assert set(drawn.tolist()) == {0, 1, 2}


def test_what_had_not_appeared_is_no_negative_where_the_catalogue_grows(dataset, make_recipe):
    growing = make_recipe(
        train={"negatives": 6, "unlabelled": 0, "pool": 40}, search={"candidates": "seen_before"}
    )
    model = make_model(growing, dataset.transform)
    state, _ = refresh(model, dataset.items, dataset.item_keys)
    rows = np.arange(60)  # the log's first impressions: most items are still to come
    batch = make_batches(dataset, growing).make(dataset.train, rows, state, step_rng(0, 7))
    had_appeared = dataset.item_first_time[batch.candidates] <= dataset.train.time[rows][:, None]
    own = batch.candidates == dataset.train.item_row[rows][:, None]
    expected = had_appeared & ~own
    expected[:, 0] = True
    assert np.array_equal(batch.pairs.labelled.numpy() > 0, expected)
    assert 0 < expected[:, 1:].mean() < 0.7
    rows = np.flatnonzero(dataset.train.labels[:160, 0])
    pool = make_pools(dataset, growing, dataset.item_first_time).draw(dataset.train, rows, step_rng(0, 7))
    assert np.array_equal(pool.allowed, dataset.item_first_time[pool.rows] <= rows[:, None])
    assert pool.allowed[np.arange(len(rows)), pool.positive].all()
    still = make_recipe(train={"negatives": 6, "unlabelled": 0, "pool": 40})
    assert make_pools(dataset, still, None).draw(dataset.train, rows, step_rng(0, 7)).allowed is None


def test_labels_say_which_candidates_are_labelled(dataset, make_recipe):
    recipe = make_recipe(train={"negatives": 3, "unlabelled": 2})
    model = make_model(recipe, dataset.transform)
    state, _ = refresh(model, dataset.items, dataset.item_keys)
    rows = np.arange(40)
    batch = make_batches(dataset, recipe).make(dataset.train, rows, state, step_rng(0, 7))
    assert batch.pairs.labels.shape == (40, 6, 2)
    assert np.array_equal(batch.pairs.labels[:, 0].numpy(), dataset.train.labels[rows])
    assert batch.pairs.labels[:, 1:].sum() == 0
    assert batch.pairs.labelled[:, 0].all()
    assert not batch.pairs.labelled[:, 4:].any()
    again = make_batches(dataset, recipe).make(dataset.train, rows, state, step_rng(0, 7))
    assert np.array_equal(batch.candidates, again.candidates)


def test_crossings_are_looked_up_for_the_layers_that_read_them(dataset, make_recipe):
    """This world's item layer is two towers; where all layers read, those that do here are given the same."""
    recipe = make_recipe()
    every = make_recipe(model={"layers": ["small", "medium", "small"]})
    model = make_model(recipe, dataset.transform)
    state, _ = refresh(model, dataset.items, dataset.item_keys)
    rows = np.arange(40)
    some = make_batches(dataset, recipe).make(dataset.train, rows, state, step_rng(0, 7)).pairs
    all_of_them = make_batches(dataset, every).make(dataset.train, rows, state, step_rng(0, 7)).pairs
    reads = [dense is not None for dense in some.cross_dense]
    assert reads == [ids is not None for ids in some.cross_ids] == list(model.reads_interactions)
    assert reads == [True, True, False]
    for layer in (0, 1):
        assert torch.equal(some.cross_dense[layer], all_of_them.cross_dense[layer])
        assert torch.equal(some.cross_ids[layer], all_of_them.cross_ids[layer])
