"""Splits: disjoint by construction (one number per impression), complete, and ordered in time."""

from __future__ import annotations

from typing import Any

import log_samples as sample
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsnn_core.errors import DataError, SchemaError
from hsnn_train.data.splits import TEST, TRAIN, VALID, Split
from hsnn_train.data.tables import Log, check_tables

LOGS = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9), st.booleans()), min_size=4, max_size=40)


def log_of(events: list[tuple[int, int, bool]]) -> Log:
    user, time, hit = (list(values) for values in zip(*events))
    count = len(events)
    return check_tables(
        sample.tables(
            impressions=sample.impressions(
                user_id=user, item_id=[10] * count, time=time, hour=[0] * count, click=hit, buy=[0] * count
            )
        )
    )


@settings(max_examples=100, deadline=None)
@given(LOGS)
def test_time_split_is_ordered_and_keeps_a_moment_together(events: list[tuple[int, int, bool]]) -> None:
    log = log_of(events)
    try:
        parts = Split.from_dict({"by": "time", "fractions": [0.6, 0.2, 0.2]}).assign(log)
    except DataError as error:
        assert "no impression is left to train" in str(error)  # noqa: PT017
        return
    order = np.lexsort((parts, log.time))
    assert (np.diff(parts[order]) >= 0).all()
    for moment in np.unique(log.time):
        assert len(set(parts[log.time == moment].tolist())) == 1


@settings(max_examples=100, deadline=None)
@given(LOGS, st.sampled_from(["user_time", "leave_one_out"]))
def test_splits_within_users_are_ordered(events: list[tuple[int, int, bool]], by: str) -> None:
    log = log_of(events)
    try:
        parts = Split.from_dict({"by": by}).assign(log)
    except DataError as error:
        assert "no impression is left to train" in str(error)  # noqa: PT017
        return
    for user in np.unique(log.user_key):
        mine = log.user_key == user
        order = np.argsort(log.time[mine], kind="stable")
        assert (np.diff(parts[mine][order]) >= 0).all()
        if by == "leave_one_out":
            hits = parts[mine & (log.labels[:, 0] > 0)]
            held_out = [int((hits == part).sum()) for part in (VALID, TEST)]
            assert held_out == ([1, 1] if len(hits) >= 3 else [0, 0])


def test_leave_one_out_by_hand() -> None:
    log = check_tables(sample.tables())
    parts = Split.from_dict({"by": "leave_one_out"}).assign(log)
    # user 1: clicks at rows 0, 2, 5 and a pass at row 3, after the one for valid; user 2 clicks once
    assert parts.tolist() == [TRAIN, TRAIN, VALID, VALID, TRAIN, TEST]


def test_time_and_user_time_by_hand() -> None:
    log = check_tables(sample.tables())
    assert Split.from_dict({"fractions": [0.5, 0.25, 0.25]}).assign(log).tolist() == [0, 0, 0, 1, 2, 2]
    parts = Split.from_dict({"by": "user_time", "fractions": [0.5, 0.25, 0.25]}).assign(log)
    # user 1 has rows 0, 2, 3, 5, cut after two and three; user 2 rows 1, 4, cut after one and two
    assert parts.tolist() == [0, 0, 0, 1, 1, 2]


def test_last_days_by_hand() -> None:
    day = 86_400
    log = check_tables(
        sample.tables(impressions=sample.impressions(time=[0, day, 2 * day, 3 * day, 4 * day, 5 * day]))
    )
    parts = Split.from_dict({"by": "last_days", "valid_days": 1, "test_days": 2}).assign(log)
    assert parts.tolist() == [0, 0, 0, 1, 2, 2]


def test_last_days_with_the_wrong_unit() -> None:
    log = check_tables(sample.tables(impressions=sample.impressions(time=[0, 10**10, 2, 3, 4, 5])))
    with pytest.raises(
        DataError, match=r"spans 115741 days with unit 's'; set split.unit to the unit of column 'time'"
    ):
        Split.from_dict({"by": "last_days"}).assign(log)


def test_split_by_a_column() -> None:
    named = ["train", "train", "valid", "test", "test", "train"]
    table = sample.impressions(part=named)
    log = check_tables(sample.tables(impressions=table))
    assert Split.from_dict({"by": "column", "column": "part"}).assign(log).tolist() == [0, 0, 1, 2, 2, 0]
    named[3] = "dev"
    log = check_tables(sample.tables(impressions=sample.impressions(part=named)))
    with pytest.raises(DataError, match=r"column 'part', row 3: got 'dev', expected train, valid, test"):
        Split.from_dict({"by": "column", "column": "part"}).assign(log)
    with pytest.raises(DataError, match=r"column 'split' is missing \(split.column\)"):
        Split.from_dict({"by": "column"}).assign(log)


def test_a_share_of_train_for_valid() -> None:
    rows = 4000
    named = ["train", "test"] * (rows // 2)
    table = pa.table(
        {
            "user_id": [1] * rows,
            "item_id": [10] * rows,
            "time": range(rows),
            "hour": [1] * rows,
            "part": named,
        }
        | {"click": [1] * rows, "buy": [0] * rows}
    )
    log = check_tables(sample.tables(impressions=table))
    split = Split.from_dict({"by": "column", "column": "part", "valid_share": 0.1})
    parts = split.assign(log)
    assert (parts[1::2] == TEST).all()
    assert 150 < (parts[::2] == VALID).sum() < 250
    assert (split.assign(log) == parts).all()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"by": "random"},
            "split.by: got 'random', expected one of time, user_time, last_days, leave_one_out, column",
        ),
        ({"by": ["time"]}, "split.by: got ['time'], expected a name"),
        ({"kind": "time"}, "split.kind: unknown key; known keys: by, fractions,"),
        (
            {"fractions": [0.8, 0.1]},
            "split.fractions: got [0.8, 0.1], expected three numbers >= 0 for train (> 0), valid and test "
            "that sum to 1",
        ),
        ({"fractions": [0.8, 0.3, 0.1]}, "split.fractions: got [0.8, 0.3, 0.1], expected"),
        ({"test_days": -1}, "split.test_days: got -1, expected a number of days >= 0"),
        ({"unit": "h"}, "split.unit: got 'h', expected one of s, ms, us"),
        (
            {"by": "column", "valid_share": 1},
            "split.valid_share: got 1, expected a share of train, at least 0, below 1",
        ),
        (
            {"valid_share": 0.1},
            "split.valid_share: is for splits by column alone; the others have a valid part",
        ),
    ],
)
def test_bad_split_sections(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError) as error:
        Split.from_dict(raw)
    assert str(error.value).startswith(message)


def test_a_split_that_leaves_nothing_to_train() -> None:
    log = check_tables(sample.tables(impressions=sample.impressions(time=[7] * 6)))
    with pytest.raises(DataError, match=r"no impression is left to train \(train 0, valid 0, test 6\)"):
        Split.from_dict({"by": "time"}).assign(log)
    with pytest.raises(SchemaError, match=r"split.task: got 'view', expected one of click, buy"):
        Split.from_dict({"by": "leave_one_out", "task": "view"}).assign(log)
