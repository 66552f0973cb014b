from __future__ import annotations

import numpy as np
import pytest

from export.build_index import candidate_buckets
from hsnn_core.index import HierarchicalIndex

LADDER = [64, 128, 256, 512, 1024, 2048, 4096]


def tree(items: int, codes: tuple[int, ...], skew: float, seed: int = 0) -> HierarchicalIndex:
    """V items over paths of the given codes; `skew` piles them up in the first ones."""
    rng = np.random.default_rng(seed)
    paths = np.stack([(rng.random(items) ** skew * count).astype(int) for count in codes], axis=1)
    return HierarchicalIndex.build(np.arange(items), paths, np.zeros(paths.shape))


@pytest.mark.parametrize(
    ("codes", "widths", "items", "expected"),
    [
        ((24, 12), (8, 64), 60, [[64], [64, 128], [64]]),
        ((24, 12), (8, 64), 9000, [[64], [64, 128], LADDER]),
        ((200,), (16,), 300, [[256], [64, 128, 256, 512]]),
        ((), (), 60, [[64]]),
        ((), (), 10_000, [[4096]]),
    ],
)
def test_buckets_reach_as_far_as_a_beam(
    codes: tuple[int, ...], widths: tuple[int, ...], items: int, expected: list[list[int]]
) -> None:
    paths = np.zeros((items, len(codes)), int)
    index = tree(items, codes, 1.0) if codes else HierarchicalIndex.build(np.arange(items), paths, paths)
    assert candidate_buckets(index, widths, codes) == expected


def test_two_snapshots_of_one_recipe_have_the_same_buckets() -> None:
    """Their profiles stand in one config.pbtxt, so a retrained index could not be published otherwise."""
    even, piled = tree(3000, (130, 40), 1.0), tree(2500, (120, 40), 4.0)  # the last ten hold nothing
    assert even.nodes(1) > 128 > piled.nodes(1)
    assert candidate_buckets(even, (4, 30), (130, 40)) == candidate_buckets(piled, (4, 30), (130, 40))


def test_a_hierarchy_of_the_data_goes_by_its_nodes() -> None:
    index = tree(500, (90, 2), 1.0)
    assert candidate_buckets(index, (4, 8), ()) == [[128], [64, 128, 256], [64, 128, 256, 512]]
