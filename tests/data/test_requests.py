"""Evaluation requests: who asks, what they want, and which items are candidates for them."""

from __future__ import annotations

from typing import Any

import log_samples as sample
import numpy as np
import pyarrow as pa
import pytest

from hsnn_core.errors import DataError
from hsnn_train.data.dataset import Dataset, build_dataset
from hsnn_train.data.requests import evaluation_requests
from hsnn_train.data.splits import Split

EVERY = slice(None)


def build(**changes: Any) -> Dataset:
    """The tiny log, all of it clicks; only the impression at time 100 trains. Rows: item 30, 10, 20."""
    table = sample.impressions(**{"click": [1] * 6, **changes})
    split = Split.from_dict({"fractions": [1 / 6, 0, 5 / 6]})
    return build_dataset(sample.schema(), sample.tables(impressions=table), split, 1)


def test_the_first_time_of_an_item_is_in_any_split() -> None:
    assert build().item_first_time.tolist() == [130, 100, 120]
    never = build(item_id=[10, 10, 10, 30, 10, 30])
    assert never.item_first_time.tolist() == [130, 100, np.iinfo(np.int64).max]


def test_all_items_are_candidates_of_one_request_per_user() -> None:
    data = build()
    found = evaluation_requests(data, "test")
    assert found.user_key.tolist() == [1, 2]
    assert found.rows.tolist() == [1, 0]
    assert found.time.tolist() == [120, 110]
    assert [rows.tolist() for rows in found.wanted] == [[0, 2], [1, 2]]
    assert found.eligible(EVERY) is None
    assert (found.asked, found.positives, len(found)) == (2, 4, 2)
    users, wanted = data.relevant("test")
    np.testing.assert_array_equal(users.ids, found.users.ids)
    assert [rows.tolist() for rows in wanted] == [rows.tolist() for rows in found.wanted]


def test_new_items_are_not_in_the_whole_history() -> None:
    found = evaluation_requests(build(), "test", "new")
    mask = found.eligible(EVERY)
    assert mask is not None
    assert mask.tolist() == [[True, False, True], [True, True, True]]  # user 1 had item 10 at time 100
    assert mask.dtype == bool
    assert [rows.tolist() for rows in found.wanted] == [[0, 2], [1, 2]]
    only = found.eligible(slice(1, 2))
    assert only is not None
    assert only.tolist() == [[True] * 3]


def test_new_leaves_out_repetitions_and_requests_of_nothing_else() -> None:
    found = evaluation_requests(
        build(user_id=[1, 2, 1, 2, 2, 2], item_id=[10, 10, 10, 30, 20, 30]), "test", "new"
    )
    assert found.user_key.tolist() == [2]  # user 1 only comes back to item 10
    assert [rows.tolist() for rows in found.wanted] == [[0, 1, 2]]
    assert (found.asked, found.positives) == (2, 4)


def test_new_counts_positives_older_than_the_feature_holds() -> None:
    rows = 6
    table = pa.table({
        "user_id": [1] * rows, "item_id": list(range(rows)), "time": list(range(rows)),
        "hour": [1] * rows, "click": [1] * rows, "buy": [0] * rows,
    })  # fmt: skip
    items = pa.table({"item_id": list(range(rows)), "topics": [["x"]] * rows})
    tables = sample.tables(impressions=table, items=items)
    data = build_dataset(sample.schema(), tables, Split.from_dict({"by": "leave_one_out"}), 1)
    mask = evaluation_requests(data, "test", "new").eligible(EVERY)
    assert mask is not None
    assert mask.tolist() == [[False] * 5 + [True]]  # the schema's history has length 2


def test_seen_before_is_a_request_per_click_at_its_own_time() -> None:
    found = evaluation_requests(build(), "test", "seen_before")
    # Items 20 (at 120) and 30 (at 130) appear with the click itself, which nothing can find.
    assert found.time.tolist() == [110, 140, 150]
    assert found.user_key.tolist() == [2, 2, 1]
    assert [rows.tolist() for rows in found.wanted] == [[1], [2], [0]]
    assert (found.asked, found.positives) == (5, 5)
    mask = found.eligible(EVERY)
    assert mask is not None
    assert mask.tolist() == [[False, True, False], [True] * 3, [True] * 3]
    assert found.users.ids[:, 0].tolist() == [4, 7, 8]  # hour + 2: as of each click


@pytest.mark.parametrize("candidates", ["all", "new", "seen_before"])
@pytest.mark.parametrize("most", [None, 7])
def test_requests_equal_a_naive_reading_of_the_log(candidates: str, most: int | None) -> None:
    rng = np.random.default_rng(3)
    rows, users, items = 200, 15, 40
    user, item = rng.integers(0, users, rows), rng.integers(0, items, rows)
    time, click = np.sort(rng.integers(0, 120, rows)), rng.integers(0, 2, rows)
    table = pa.table({"user_id": user, "item_id": item, "time": time, "hour": [1] * rows, "click": click,
                      "buy": [0] * rows})  # fmt: skip
    things = pa.table({"item_id": np.arange(items), "topics": [["x"]] * items})
    tables = sample.tables(impressions=table, items=things)
    data = build_dataset(sample.schema(), tables, Split.from_dict({"fractions": [0.4, 0.2, 0.4]}), 1)
    found = evaluation_requests(data, "test", candidates, most)
    assert len(found) <= found.asked <= (most or rows)
    mask = found.eligible(EVERY)
    held_out = time >= data.test.time[0]
    for n in range(len(found)):
        own = (user == found.user_key[n]) & (click > 0)
        allowed = set(range(items))
        if candidates == "new":
            allowed -= set(item[own & (time < found.time[n])])
        if candidates == "seen_before":
            allowed = set(item[time < found.time[n]])
            wanted = {int(data.test.item_row[found.rows[n]])}
        else:
            wanted = set(item[own & held_out]) & allowed
            assert found.time[n] == time[(user == found.user_key[n]) & held_out].min()
        assert found.wanted[n].tolist() == sorted(wanted)
        assert mask is None or set(np.flatnonzero(mask[n])) == allowed
        assert wanted <= allowed
    again = evaluation_requests(data, "test", candidates, most)
    assert again.rows.tolist() == found.rows.tolist()


@pytest.mark.parametrize("candidates", ["all", "new", "seen_before"])
def test_a_split_without_positives_asks_nothing(candidates: str) -> None:
    found = evaluation_requests(build(click=[1, 0, 0, 0, 0, 0]), "test", candidates)
    assert (len(found), found.asked, found.positives, found.wanted) == (0, 0, 0, [])
    mask = found.eligible(EVERY)
    assert mask is None or mask.shape == (0, 3)


def test_unknown_candidates() -> None:
    with pytest.raises(DataError, match="candidates: got 'some', expected all, new or seen_before"):
        evaluation_requests(build(), "test", "some")
