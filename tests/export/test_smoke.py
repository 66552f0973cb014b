from __future__ import annotations

import numpy as np
import pytest

from export.smoke import check_answer
from hsnn_core.bundle import Smoke
from hsnn_core.errors import PublishError
from hsnn_core.search import SearchResult

# Two users, K = 10; the second one has 9 items only, and an item whose id is 0 is an item like any other.
IDS = np.arange(20, dtype=np.int64).reshape(2, 10)
IDS[1, 9] = 0
SHARES = np.linspace(0.9, 0.1, 20, dtype=np.float32).reshape(2, 10, 1)
SHARES[1, 9] = 0
SMOKE = Smoke({}, IDS, SHARES)


def answer(
    ids: np.ndarray = IDS, shares: np.ndarray = SHARES, valid: tuple[int, int] = (10, 9)
) -> SearchResult:
    return SearchResult(
        item_ids=ids,
        probabilities=shares,
        rank_score=np.log(np.maximum(shares[..., 0], 1e-9)),
        valid=np.array(valid, np.int32),
        positions=ids,
        layers=(),
        user_microseconds=0,
        total_microseconds=0,
    )


def test_the_expected_answer_in_any_order_passes() -> None:
    check_answer(answer(), SMOKE, 1e-4)
    swapped = [1, 0, *range(2, 10)]
    check_answer(answer(IDS[:, swapped], SHARES[:, swapped]), SMOKE, 1e-4)


def test_one_tie_may_fall_either_way_but_not_many() -> None:
    ids = IDS.copy()
    ids[0, 9] = 99
    check_answer(answer(ids), SMOKE, 1e-4)
    ids[0, 8] = 98
    with pytest.raises(PublishError, match="17 of the 19 expected items were found, expected at least 90%"):
        check_answer(answer(ids), SMOKE, 1e-4)
    with pytest.raises(PublishError, match="10 of the 19"):
        check_answer(answer(valid=(10, 0)), SMOKE, 1e-4)


def test_another_probability_is_named() -> None:
    shares = SHARES + np.float32(2e-3) * (IDS == 3)[..., None]
    check_answer(answer(shares=shares), SMOKE, 5e-3)
    with pytest.raises(PublishError, match=r"differ by up to 2\.0e-03, allowed are 0\.0001"):
        check_answer(answer(shares=shares), SMOKE, 1e-4)
