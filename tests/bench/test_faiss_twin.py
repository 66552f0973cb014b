"""The Faiss twin: all probes equal the exhaustive product, the target is reached, filters hold."""

import numpy as np
import pytest

from hsnn_bench.faiss_twin import Queries, approximate, exhaustive
from hsnn_bench.requests import best_rows
from hsnn_core.errors import DataError


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(12, 8))
    items = (centres[rng.integers(0, 12, 600)] + 0.4 * rng.normal(size=(600, 8))).astype(np.float32)
    users = (centres[rng.integers(0, 12, 60)] + 0.4 * rng.normal(size=(60, 8))).astype(np.float32)
    return items, Queries(users[:30]), Queries(users[30:])


def test_exhaustive_equals_the_sorted_products(world):
    items, _, queries = world
    twin = exhaustive(items, queries, 20)
    np.testing.assert_array_equal(twin.found, best_rows(queries.vectors @ items.T, None, 20)[0])
    assert twin.valid.tolist() == [20] * 30 and twin.scored_share == 1 and twin.microseconds > 0


@pytest.mark.parametrize("name", ["ivf", "hnsw"])
def test_approximate_reaches_its_target_with_less_work(world, name):
    items, tuning, queries = world
    twin = approximate(name, items, tuning, queries, 20, target=0.95)
    assert twin.recall > 0.9  # chosen on other requests than it is measured on
    assert 0.01 < twin.scored_share < 0.9


def test_all_probes_are_exhaustive(world):
    items, tuning, queries = world
    twin = approximate("ivf", items, tuning, queries, 20, target=1.0)
    exact = exhaustive(items, queries, 20)
    assert twin.recall == pytest.approx(1.0, abs=0.02)
    beyond = approximate("ivf", items, tuning, queries, 20, target=1.1)  # not to be had: the best there is
    assert beyond.settings["nprobe"] >= 1 and beyond.recall >= twin.recall - 0.02
    one_list = approximate("ivf", items[:3], tuning, queries, 3, target=1.0)
    assert one_list.recall == 1.0
    assert np.array_equal(np.sort(one_list.found, 1), np.tile([0, 1, 2], (30, 1)))
    assert exact.recall == 1.0


@pytest.mark.parametrize("name", ["ivf", "hnsw"])
def test_items_that_are_not_eligible_never_come_back(world, name):
    items, tuning, queries = world
    rng = np.random.default_rng(1)
    masks = [rng.random((30, len(items))) < 0.3 for _ in range(2)]
    masks[1][0] = False
    masks[1][0, :4] = True  # fewer than K
    restricted = [Queries(q.vectors, mask.__getitem__) for q, mask in zip((tuning, queries), masks)]
    twin = approximate(name, items, *restricted, 10, target=0.9)
    for row, count, mask in zip(twin.found, twin.valid, masks[1]):
        assert mask[row[:count]].all()
    assert twin.valid[0] <= 4
    assert exhaustive(items, restricted[1], 10).valid[0] == 4


def test_refuses_what_it_cannot_search(world):
    items, tuning, queries = world
    with pytest.raises(DataError, match="'lsh': expected ivf or hnsw"):
        approximate("lsh", items, tuning, queries, 10)
    with pytest.raises(DataError, match="k: got 601, expected 1..600"):
        exhaustive(items, queries, 601)
    with pytest.raises(DataError, match="vectors: got float64"):
        exhaustive(items, Queries(queries.vectors.astype(np.float64)), 5)
    with pytest.raises(DataError, match="vectors: no requests"):
        exhaustive(items, Queries(queries.vectors[:0]), 5)
