from __future__ import annotations

import numpy as np
import pytest
from core_fakes import assert_same_result, small_world

from hsnn_core.errors import DataError
from hsnn_core.exhaustive import exhaustive
from hsnn_core.index import assign_paths, centroid_distances
from hsnn_core.item_filter import MaskFilter
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import search


def test_paths_embeddings_and_codeword_terms():
    world = small_world()
    items = world.transform.encode_items(world.item_raw)
    towers = world.runner.item_tower(items.tensors("item"))
    paths, distances = assign_paths(world.codebooks, towers["index"])
    corpus = world.corpus()
    index = corpus.index
    assert index.layers == 3
    rows = index.row_of_position
    np.testing.assert_array_equal(index.item_ids, world.item_keys[rows])
    np.testing.assert_array_equal(corpus.embeddings[2], towers["item_l3"][rows])
    for layer in (1, 2):
        nodes = index.ancestors(layer)
        assert len(corpus.embeddings[layer - 1]) == index.nodes(layer) < len(rows)
        for node, code in enumerate(index.codes[layer - 1]):
            members = rows[nodes == node]
            assert (paths[members, :layer] == code).all()
            row = min(members, key=lambda r: (distances[r, layer - 1], world.item_keys[r]))
            chain = sum(world.codebooks[step][code[step]] for step in range(layer))
            weight, bias = world.projection[layer - 1]
            expected = towers[f"item_l{layer}"][row] + chain @ weight + bias
            np.testing.assert_allclose(corpus.embeddings[layer - 1][node], expected, rtol=1e-5, atol=1e-6)
    assert all(table.dtype == np.float32 for table in corpus.embeddings)


@pytest.mark.parametrize("batch_size", [1, 7, 30, 1000])
def test_batches_change_nothing_and_progress_counts_every_item_once(batch_size):
    world = small_world()
    whole = world.corpus()
    done: list[int] = []
    corpus = world.corpus(batch_size=batch_size, progress=done.append)
    assert sum(done) == 30
    assert max(done) <= batch_size
    for name, array in whole.index.to_arrays().items():
        np.testing.assert_array_equal(corpus.index.to_arrays()[name], array)
    for ours, theirs in zip(corpus.embeddings, whole.embeddings):
        np.testing.assert_array_equal(ours, theirs)


def test_only_representatives_go_through_the_tower_again():
    world = small_world(items=60)
    seen: list[int] = []

    def tower(inputs):
        seen.append(len(inputs["item_ids"]))
        return world.runner.item_tower(inputs)

    corpus = world.corpus(item_tower=tower, batch_size=60)
    assert seen == [60, len(np.unique(np.concatenate(corpus.index.representative)))]


def test_flat_corpus_needs_no_index_vector():
    world = small_world(layers=1)

    def tower(inputs):
        outputs = world.runner.item_tower(inputs)
        del outputs["index"]
        return outputs

    corpus = world.corpus(item_tower=tower)
    assert corpus.index.layers == 1
    np.testing.assert_array_equal(corpus.index.item_ids, np.sort(world.item_keys))
    assert [len(table) for table in corpus.embeddings] == [30]
    assert corpus.codebooks == []


def test_given_paths_take_the_item_nearest_to_its_node_centre():
    world = small_world()
    paths = np.stack([np.arange(30) % 3, np.arange(30) % 6], axis=1)
    corpus = world.corpus(codebooks=[], codeword_projection=[], paths=paths)
    items = world.transform.encode_items(world.item_raw)
    towers = world.runner.item_tower(items.tensors("item"))
    distances = centroid_distances(towers["index"], paths)
    for layer in (1, 2):
        for node, position in enumerate(corpus.index.representatives(layer)):
            members = corpus.index.row_of_position[corpus.index.ancestors(layer) == node]
            row = corpus.index.row_of_position[position]
            assert distances[row, layer - 1] == distances[members, layer - 1].min()
            np.testing.assert_array_equal(
                corpus.embeddings[layer - 1][node], towers[f"item_l{layer}"][row]
            )  # no codeword term


def test_crossings_are_those_of_the_items_at_each_position():
    world = small_world()
    corpus = world.corpus()
    users = world.transform.encode_users(world.user_raw)
    every = np.tile(np.arange(30), (4, 1))
    crossings = corpus.i2if.probe(corpus.i2if.query(users.ids), every)
    # "seen" is the second interaction, with one id: the item itself, when the user's history has it.
    seen_ids = crossings.ids[:, :, -1]
    for user, history in enumerate(world.user_raw["history"]):
        np.testing.assert_array_equal(seen_ids[user] > 0, np.isin(corpus.index.item_ids, history))
    category = world.item_raw["category"][corpus.index.row_of_position]
    for user, history in enumerate(world.user_raw["history"]):
        rows = np.flatnonzero(np.isin(world.item_keys, history))
        terms = set(world.item_raw["category"][rows].ravel()) - {np.iinfo(np.int64).min}
        matched = [len(set(row) & terms) for row in category]
        np.testing.assert_array_equal(crossings.dense[user, :, 0], matched)


def test_an_item_the_transform_does_not_know_is_indexed_but_in_no_history():
    world = small_world()
    known = world.item_keys.copy()
    world.item_keys[4] = 100_000
    world.item_raw["item"] = world.item_keys[:, None]
    corpus = world.corpus()
    assert 100_000 in corpus.index.item_ids
    position_of_id = corpus.i2if.position_of_id.positions()
    assert (position_of_id >= 0).sum() == 29
    assert (position_of_id[:2] == -1).all()
    for row, key in enumerate(known):
        position = position_of_id[2 + row]
        assert position == -1 if row == 4 else corpus.index.item_ids[position] == key


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("interactions", [True, False])
def test_search_at_full_width_equals_exhaustive_with_real_crossings(layers, interactions):
    world = small_world(layers=layers, interactions=interactions)
    corpus = world.corpus()
    assert (corpus.i2if is not None) == interactions
    users = world.transform.encode_users(world.user_raw)
    scorer = LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, world.runner)
    widths = [corpus.index.nodes(layer) for layer in range(1, layers)]
    rank = np.array([1.0, 0.5])
    mask = np.random.default_rng(0).random((4, 30)) < 0.6
    for allowed in (None, MaskFilter(corpus.index, mask)):
        ours = search(corpus.index, scorer, users, widths, 8, rank, allowed)
        assert_same_result(ours, exhaustive(corpus.index, scorer, users, 8, rank, allowed))


def broken_tower(world, name, change):
    def tower(inputs):
        outputs = world.runner.item_tower(inputs)
        value = change(outputs.pop(name))
        return outputs if value is None else outputs | {name: value}

    return tower


def with_nan(value):
    value[5, 0] = np.nan
    return value


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        (
            "item_l3",
            lambda v: None,
            "the item tower gave no item_l3, expected item_l3, index; got item_l1, item_l2, index",
        ),
        ("index", lambda v: v[:-1], "the item tower's index has shape (29, 3), expected (30, width)"),
        ("item_l3", with_nan, "the item tower's item_l3 is not finite for the item of row 5; check"),
        ("item_l1", lambda v: v[0], "the item tower's item_l1 has shape (5,), expected ("),
    ],
)
def test_broken_item_towers(name, change, text):
    world = small_world()
    with pytest.raises(DataError) as caught:
        world.corpus(item_tower=broken_tower(world, name, change))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"paths": np.zeros((30, 2), int)}, "2 codebooks and paths as well, expected one of them"),
        ({"item_ids": np.arange(7)}, "30 encoded items and 7 item ids, expected as many of each"),
        (
            {"codeword_projection": [(np.zeros((3, 5)), np.zeros(5))]},
            "1 codeword projections, expected 2: one per",
        ),
    ],
)
def test_arguments_that_do_not_fit(changes, text):
    with pytest.raises(DataError) as caught:
        small_world().corpus(**changes)
    assert text in str(caught.value)
