from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from core_fakes import (
    FakeRunner,
    assert_same_result,
    fake_scorer,
    random_embeddings,
    random_index,
    random_users,
)

from hsnn_core.errors import SearchError
from hsnn_core.exhaustive import exhaustive
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import search

RANK = np.array([1.0, 0.25], dtype=np.float32)


@dataclass
class Crossings:
    dense: np.ndarray
    ids: np.ndarray


class FakeI2IF:
    """Crossings from the user's first id and the item's position alone; remembers which plan ran."""

    def __init__(self, ids_width: int = 2) -> None:
        self.ids_width = ids_width
        self.plans: list[str] = []
        self.built = 0

    def query(self, user_ids):
        return user_ids[:, :1]

    def query_of_nodes(self, query, stand_in):
        return query

    def _at(self, query, positions):
        mixed = query[:, :, None] * 31 + positions[..., None] * 7
        ids = np.broadcast_to(mixed % 11, (*positions.shape, self.ids_width)).astype(np.int32)
        return Crossings(np.concatenate([mixed % 3, mixed % 5, mixed % 2], axis=2).astype(np.float32), ids)

    def probe(self, query, positions):
        self.plans.append("probe")
        return self._at(query, positions)

    def postings(self, positions):
        self.built += 1
        return positions

    def walk(self, query, postings):
        self.plans.append("walk")
        return self._at(query, np.tile(postings, (len(query), 1)))


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    index = random_index(rng, 3, 60, codes=5)
    return index, random_embeddings(rng, index), random_users(rng, 3)


def run(world, buckets=None, i2if=None, pairs_per_call=8192):
    index, embeddings, users = world
    runner = FakeRunner(index.layers)
    scorer = LayerScorer(index, i2if or FakeI2IF(), embeddings, runner, buckets, pairs_per_call)
    return search(index, scorer, users, [3, 4], 10, RANK), exhaustive(index, scorer, users, 10, RANK), runner


@pytest.mark.parametrize(
    "buckets",
    [[[1], [1], [1]], [[3], [2, 5], [4, 16]], [[], [7], []], [[64, 128], [64], [1000]]],
)
def test_buckets_padding_and_chunking_change_nothing(world, buckets):
    plain, plain_all, _ = run(world)
    ours, ours_all, runner = run(world, buckets)
    assert_same_result(ours, plain)
    assert_same_result(ours_all, plain_all)
    for layer, inputs in runner.calls:
        allowed = buckets[layer - 1]
        counts = {value.shape[1] for name, value in inputs.items() if name != "user"}
        assert len(counts) == 1
        assert not allowed or counts <= set(allowed)


def test_pairs_per_call_are_bounded_without_buckets(world):
    plain, plain_all, _ = run(world)
    ours, ours_all, runner = run(world, pairs_per_call=20)
    assert_same_result(ours, plain)
    assert_same_result(ours_all, plain_all)
    assert max(inputs["item"].shape[0] * inputs["item"].shape[1] for _, inputs in runner.calls) == 18


def test_inputs_have_the_declared_names_shapes_and_types(world):
    embeddings = world[1]
    _, _, runner = run(world, i2if=FakeI2IF(ids_width=4))
    assert [layer for layer, _ in runner.calls] == [1, 2, 3, 1, 2, 3]
    for layer, inputs in runner.calls:
        batch, count = inputs["item"].shape[:2]
        expected = {
            "user": ((batch, 3 + layer), np.float32),
            "item": ((batch, count, embeddings[layer - 1].shape[1]), np.float32),
            "cross_dense": ((batch, count, 3), np.float32),
            "cross_ids": ((batch, count, 4), np.int32),
        }
        if layer > 1:
            expected["previous"] = ((batch, count, (layer - 1) * 2), np.float32)
        assert {name: (value.shape, value.dtype) for name, value in inputs.items()} == expected
        assert all(value.flags.c_contiguous for value in inputs.values())


def test_crossings_without_width_and_without_interactions_are_not_sent(world):
    index, embeddings, users = world
    _, _, runner = run(world, i2if=FakeI2IF(ids_width=0))
    assert "cross_ids" not in runner.calls[0][1]
    assert "cross_dense" in runner.calls[0][1]
    runner = FakeRunner(index.layers)
    search(index, LayerScorer(index, None, embeddings, runner), users, [3, 4], 10, RANK)
    assert set(runner.calls[0][1]) == {"user", "item"}
    assert set(runner.calls[1][1]) == {"user", "item", "previous"}


def test_all_nodes_in_order_walk_and_others_probe(world):
    i2if = FakeI2IF()
    run(world, i2if=i2if)
    assert i2if.plans == ["walk", "probe", "probe", "walk", "walk", "walk"]
    assert i2if.built == 3  # layer 1's postings served twice


def test_both_plans_score_alike(world):
    index, embeddings, users = world
    scorer = LayerScorer(index, FakeI2IF(), embeddings, FakeRunner(index.layers))
    state = scorer.open(users)
    nodes = np.tile(np.arange(index.nodes(2)), (3, 1))
    previous = np.random.default_rng(1).normal(size=(*nodes.shape, 2)).astype(np.float32)
    walked = scorer.score(state, 2, nodes, previous)
    probed = scorer.score(state, 2, nodes[:, ::-1], previous[:, ::-1])
    for ours, theirs in zip(walked, probed):
        np.testing.assert_array_equal(ours, theirs[:, ::-1])


def test_half_precision_embeddings_reach_the_network_as_they_are(world):
    index, embeddings, users = world
    half = [table.astype(np.float16) for table in embeddings]
    rounded = [table.astype(np.float32) for table in half]
    results = []
    for tables in (half, rounded):
        runner = FakeRunner(index.layers)
        scorer = LayerScorer(index, FakeI2IF(), tables, runner)
        results.append(search(index, scorer, users, [3, 4], 10, RANK))
        assert {inputs["item"].dtype for _, inputs in runner.calls} == {tables[0].dtype}
    assert_same_result(*results)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"embeddings": slice(0, 2)}, "2 embedding tables, expected 3: one per layer of the index"),
        ({"buckets": [[8]]}, "buckets of 1 layers, expected 3: one list per layer of the index"),
        (
            {"buckets": [[8], [16, 8], [8]]},
            "buckets of layer 2: [16, 8], expected ascending candidate counts from 1",
        ),
        ({"buckets": [[0], [8], [8]]}, "buckets of layer 1: [0], expected ascending candidate counts from 1"),
    ],
)
def test_a_scorer_that_does_not_fit_its_index(world, change, text):
    index, embeddings, _ = world
    tables = embeddings[change["embeddings"]] if "embeddings" in change else embeddings
    with pytest.raises(SearchError) as caught:
        LayerScorer(index, None, tables, FakeRunner(3), change.get("buckets"))
    assert text in str(caught.value)


def test_an_embedding_table_of_another_corpus(world):
    index, embeddings, _ = world
    embeddings = [embeddings[0], embeddings[1][:-1], embeddings[2]]
    nodes = index.nodes(2)
    with pytest.raises(SearchError) as caught:
        LayerScorer(index, None, embeddings, FakeRunner(3))
    assert str(caught.value) == (
        f"embeddings of layer 2: shape ({nodes - 1}, 6), expected ({nodes}, width), one row per node"
    )


def test_malformed_answers_of_the_networks(world):
    index, embeddings, users = world
    runner = FakeRunner(index.layers)
    scorer = LayerScorer(index, None, embeddings, runner)
    state = scorer.open(users)
    nodes = np.zeros((3, 2), dtype=np.int64)
    with pytest.raises(SearchError, match="layer 1: no candidates to score"):
        scorer.score(state, 1, nodes[:, :0], np.zeros((3, 0, 0), np.float32))

    runner.score = lambda layer, inputs: (np.zeros((3, 1, 2)), np.zeros((3, 2, 2)))
    with pytest.raises(SearchError) as caught:
        scorer.score(state, 1, nodes, np.zeros((3, 2, 0), np.float32))
    assert str(caught.value) == "the scorer of layer 1 gave monn of shape (3, 1, 2), expected (3, 2, tasks)"

    runner.user_tower = lambda inputs: {"user_l1": np.zeros((3, 4)), "user_l3": np.zeros((3, 4))}
    with pytest.raises(SearchError) as caught:
        scorer.open(users)
    assert str(caught.value) == (
        "the user tower gave no user_l2 (it gave user_l1, user_l3); "
        "expected one output per layer, user_l1..user_l3"
    )
    runner.user_tower = lambda inputs: {f"user_l{layer}": np.zeros((2, 4)) for layer in (1, 2, 3)}
    with pytest.raises(
        SearchError, match=r"the user tower's user_l1 has shape \(2, 4\), expected \(3, width\)"
    ):
        scorer.open(users)


def test_pieces_are_of_the_largest_bucket_and_the_rest_of_the_next(world):
    index, embeddings, users = world
    runner = FakeRunner(index.layers)
    scorer = LayerScorer(index, None, embeddings, runner, [[], [], [3, 8, 20]])
    nodes = np.tile(np.arange(46), (3, 1))
    scorer.score(scorer.open(users), 3, nodes, np.zeros((3, 46, 4), np.float32))
    assert [inputs["item"].shape[1] for _, inputs in runner.calls] == [20, 20, 8]
    assert np.array_equal(runner.calls[2][1]["item"][0, :6], embeddings[2][40:46])
    assert not runner.calls[2][1]["item"][:, 6:].any()


def test_the_size_of_a_call_changes_no_bit():
    rng = np.random.default_rng(4)
    index = random_index(rng, 3, 300, codes=8)
    users, found = random_users(rng, 2), []
    for pairs in (8192, 64, 14):
        scorer, _ = fake_scorer(np.random.default_rng(5), index, pairs_per_call=pairs)
        found.append(search(index, scorer, users, [5, 20], 40, RANK))
    for other in found[1:]:
        assert_same_result(found[0], other)
