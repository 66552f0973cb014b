from __future__ import annotations

import numpy as np
import pytest
from core_fakes import random_index
from hypothesis import given, settings
from hypothesis import strategies as st

from hsnn_core import index as index_module
from hsnn_core.errors import DataError, FormatError
from hsnn_core.index import HierarchicalIndex, assign_paths, centroid_distances
from hsnn_core.item_filter import MaskFilter


def small_index() -> HierarchicalIndex:
    """Six items, paths of two codes; nodes 0 and 2 of layer 1, (0,1), (0,4), (2,0) of layer 2."""
    return HierarchicalIndex.build(
        np.array([60, 50, 40, 30, 20, 10]),
        np.array([[2, 0], [0, 4], [0, 1], [0, 4], [2, 0], [0, 1]]),
        np.array([[1.0, 9.0], [2.0, 3.0], [2.0, 1.0], [5.0, 3.0], [1.0, 8.0], [4.0, 1.0]]),
    )


def test_build_by_hand():
    index = small_index()
    assert index.layers == 3
    assert [index.nodes(layer) for layer in (1, 2, 3)] == [2, 3, 6]
    # Leaves in order of path, items of a leaf in order of id.
    assert index.item_ids.tolist() == [10, 40, 30, 50, 20, 60]
    assert index.row_of_position.tolist() == [5, 2, 3, 1, 4, 0]
    assert [ptr.tolist() for ptr in index.child_ptr] == [[0, 2, 3], [0, 2, 4, 6]]
    assert [codes.tolist() for codes in index.codes] == [[[0], [2]], [[0, 1], [0, 4], [2, 0]]]
    # Layer 1, node 0: ids 40 and 50 tie at distance 2 -> 40, position 1. Node 1: 20 and 60 tie at 1 -> 20.
    # Layer 2: 10 and 40 tie at 1 -> 10; 30 and 50 tie at 3 -> 30; 20 at 8 beats 60 at 9.
    assert [nodes.tolist() for nodes in index.representative] == [[1, 4], [0, 2, 4]]
    assert index.ancestors(1).tolist() == [0, 0, 0, 0, 1, 1]
    assert index.ancestors(2).tolist() == [0, 0, 1, 1, 2, 2]
    assert index.ancestors(3).tolist() == [0, 1, 2, 3, 4, 5]
    assert index.parents(2).tolist() == [0, 0, 1]
    assert index.occupancy(1).tolist() == [4, 2]
    assert index.occupancy(2).tolist() == [2, 2, 2]
    allowed = MaskFilter(index, np.array([[False, True, True, False, False, False], [False] * 6]))
    users = np.array([0, 0, 1])
    assert allowed.counts(1, users, np.array([0, 1, 0])).tolist() == [2, 0, 0]
    assert allowed.counts(2, users, np.array([0, 2, 0])).tolist() == [1, 0, 0]
    assert allowed.passes(users, np.array([1, 3, 1])).tolist() == [True, False, False]
    assert index.counts(1, np.array([1, 0])).tolist() == [2, 4]
    assert index.counts(3, np.array([5])).tolist() == [1]
    children, parent = index.children(2, np.array([1, 0]))
    assert children.tolist() == [2, 0, 1]
    assert parent.tolist() == [0, 1, 1]
    assert index.children(3, np.array([2]))[0].tolist() == [4, 5]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), layers=st.integers(1, 4), items=st.integers(1, 60))
def test_build_of_random_trees(seed, layers, items):
    rng = np.random.default_rng(seed)
    ids = rng.choice(1000, size=items, replace=False)
    paths = rng.integers(0, 3, size=(items, layers - 1))
    distances = rng.integers(0, 3, size=paths.shape).astype(np.float32)
    index = HierarchicalIndex.build(ids, paths, distances)

    np.testing.assert_array_equal(index.item_ids, ids[index.row_of_position])
    mask = rng.random((2, items)) < 0.3
    allowed = MaskFilter(index, mask)
    for layer in range(1, layers):
        members: dict[tuple, list[int]] = {}
        for row, path in enumerate(paths):
            members.setdefault(tuple(path[:layer]), []).append(row)
        assert [tuple(code) for code in index.codes[layer - 1]] == sorted(members)  # no empty node exists
        of_node = index.ancestors(layer)
        np.testing.assert_array_equal(index.node_of(layer, np.arange(items)), of_node)
        for node, path in enumerate(sorted(members)):
            rows = members[path]
            held = index.row_of_position[of_node == node]
            assert sorted(held) == sorted(rows)
            nearest = min(rows, key=lambda row: (distances[row, layer - 1], ids[row]))
            assert index.row_of_position[index.representatives(layer)[node]] == nearest
            held = allowed.counts(layer, np.array([0, 1]), np.array([node, node]))
            assert held.tolist() == [mask[user, of_node == node].sum() for user in (0, 1)]
    leaf = index.ancestors(layers - 1) if layers > 1 else np.zeros(items, dtype=int)
    assert all((leaf[p], index.item_ids[p]) < (leaf[p + 1], index.item_ids[p + 1]) for p in range(items - 1))


def test_flat_index_is_one_list_by_item_id():
    index = HierarchicalIndex.build(np.array([7, 3, 5]), np.empty((3, 0), int), np.empty((3, 0)))
    assert index.layers == 1
    assert index.item_ids.tolist() == [3, 5, 7]
    assert index.nodes(1) == 3
    assert index.representatives(1).tolist() == [0, 1, 2]
    allowed = MaskFilter(index, np.array([[True, False, True]]))
    assert allowed.passes(np.zeros(3, int), np.arange(3)).tolist() == [True, False, True]


def test_arrays_round_trip():
    rng = np.random.default_rng(0)
    for layers in (1, 2, 4):
        index = random_index(rng, layers, 40)
        again = HierarchicalIndex.from_arrays(index.to_arrays())
        assert again.layers == layers
        assert again.row_of_position.tolist() == list(range(40)), "what was opened stands by position"
        for name, array in index.to_arrays().items():
            np.testing.assert_array_equal(again.to_arrays()[name], array)


@pytest.mark.parametrize(
    ("ids", "paths", "distances", "text"),
    [
        ([], np.empty((0, 1), int), np.empty((0, 1)), "expected integers (V,) with V > 0"),
        ([1, 1], [[0], [0]], [[0.0], [0.0]], "item ids: 1 occurs 2 times, expected every id once"),
        ([1, 2], [[0], [-1]], [[0.0], [0.0]], "with minimum -1, expected integers from 0"),
        ([1, 2], [[0.5], [1.0]], [[0.0], [0.0]], "paths: float64"),
        ([1, 2], [[0], [1]], [[0.0], [np.nan]], "distances: values that are not finite"),
        ([1, 2], [[0]], [[0.0]], "paths (1, 1) and distances (1, 1): expected both (2, N-1)"),
    ],
)
def test_build_refuses(ids, paths, distances, text):
    with pytest.raises(DataError) as caught:
        HierarchicalIndex.build(np.array(ids, dtype=np.int64), np.array(paths), np.array(distances))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "at", "value", "text"),
    [
        ("layer1_child_ptr", 1, 3, "child pointers of layer 1 must rise strictly from 0 to 3"),
        ("layer2_child_ptr", 3, 5, "child pointers of layer 2 must rise strictly from 0 to 6"),
        (
            "layer2_representative",
            1,
            4,
            "the representative of node 1 of layer 2 is position 4, expected one of its own items 2..3",
        ),
        ("item_ids", 0, 60, "item_ids holds an id twice"),
        ("layer2_codes", (0, 0), 1, "the paths of layer 2 do not continue layer 1's"),
    ],
)
def test_from_arrays_refuses_contradictions(name, at, value, text):
    arrays = {key: array.copy() for key, array in small_index().to_arrays().items()}
    arrays[name][at] = value
    with pytest.raises(FormatError) as caught:
        HierarchicalIndex.from_arrays(arrays)
    assert text in str(caught.value)


def test_from_arrays_names_what_is_missing_or_of_another_type():
    arrays = small_index().to_arrays()
    del arrays["layer1_codes"]
    with pytest.raises(FormatError, match="index: array layer1_codes is missing; got item_ids, "):
        HierarchicalIndex.from_arrays(arrays)
    arrays = small_index().to_arrays()
    arrays["item_ids"] = arrays["item_ids"].astype(np.int32)
    with pytest.raises(FormatError, match="item_ids is int32 with 1 axes, expected int64 with 1"):
        HierarchicalIndex.from_arrays(arrays)


def test_a_layer_that_does_not_exist():
    with pytest.raises(ValueError, match="layer 4 does not exist; expected 1..3"):
        small_index().nodes(4)
    with pytest.raises(ValueError, match="layer 1 has no parents; expected a layer of 2..3"):
        small_index().parents(1)


def test_assign_paths_by_hand():
    codebooks = [np.array([[0.0, 0.0], [10.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])]
    vectors = np.array([[9.5, 0.0], [0.0, 3.0], [10.0, 1.0]], dtype=np.float32)
    paths, distances = assign_paths(codebooks, vectors)
    # 9.5 -> codeword 10, residual -0.5 -> codeword -1 at 0.25; (0,3) -> 0, then (0,2) at 1;
    # (10,1) -> 10, residual (0,1) -> (0,2) at 1, against 2 for the others.
    assert paths.tolist() == [[1, 2], [0, 1], [1, 1]]
    assert distances.tolist() == [[0.25, 0.25], [9.0, 1.0], [1.0, 1.0]]
    assert paths.dtype == np.int32
    assert distances.dtype == np.float32


def test_assign_paths_is_the_residual_chain(monkeypatch):
    rng = np.random.default_rng(1)
    codebooks = [rng.normal(size=(5, 4)).astype(np.float32) for _ in range(3)]
    vectors = rng.normal(size=(23, 4)).astype(np.float32)
    monkeypatch.setattr(index_module, "ASSIGN_CHUNK", 7)
    paths, distances = assign_paths(codebooks, vectors)
    for row, vector in enumerate(vectors):
        residual = vector.astype(np.float64)
        for layer, codebook in enumerate(codebooks):
            away = ((residual - codebook) ** 2).sum(axis=1)
            assert paths[row, layer] == away.argmin()
            assert distances[row, layer] == pytest.approx(away.min(), rel=1e-6)
            residual = residual - codebook[away.argmin()]
    monkeypatch.undo()
    np.testing.assert_array_equal(assign_paths(codebooks, vectors)[0], paths)


def test_assign_paths_refuses():
    vectors = np.zeros((2, 3), dtype=np.float32)
    with pytest.raises(DataError, match=r"codebook of layer 1: shape \(4, 2\), expected \(K, 3\) with K > 0"):
        assign_paths([np.zeros((4, 2))], vectors)
    with pytest.raises(DataError, match="index vectors: row 1 is not finite"):
        assign_paths([np.zeros((4, 3))], np.array([[0, 0, 0], [0, np.nan, 0]], dtype=np.float32))


def test_centroid_distances_by_hand():
    vectors = np.array([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0], [9.0, 9.0]], dtype=np.float32)
    paths = np.array([[1, 5], [1, 5], [1, 7], [0, 5]])
    # Layer 1: mean of the first three is (2, 0). Layer 2: the first two share (1, 0), the others are alone.
    assert centroid_distances(vectors, paths).tolist() == [[4.0, 1.0], [0.0, 1.0], [4.0, 0.0], [0.0, 0.0]]
    assert centroid_distances(vectors, paths[:, :0]).shape == (4, 0)
