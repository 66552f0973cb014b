"""No history knows its own moment or anything later."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hsnn_train.data.history import Histories

EVENTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 9), st.booleans()), min_size=1, max_size=30
)


def slow_rows(events: list[tuple[int, int, int, bool]], length: int) -> list[list[int]]:
    """The definition, event by event."""
    rows = []
    for user, time, _, _ in events:
        earlier = [
            (t, place, item)
            for place, (u, t, item, hit) in enumerate(events)
            if u == user and t < time and hit
        ]
        items = [item for _, _, item in sorted(earlier)][-length:]
        rows.append(items + [-1] * (length - len(items)))
    return rows


@settings(max_examples=200, deadline=None)
@given(events=EVENTS, length=st.integers(1, 5))
def test_histories_are_the_strictly_earlier_positives(
    events: list[tuple[int, int, int, bool]], length: int
) -> None:
    user, time, item, hit = (np.array(values) for values in zip(*events))
    histories = Histories(user, time, item.astype(np.int32), hit)
    every = np.arange(len(events))
    assert histories.rows(every, length).tolist() == slow_rows(events, length)
    whole = [[item for item in row if item >= 0] for row in slow_rows(events, len(events))]
    assert [rows.tolist() for rows in histories.whole(every)] == whole


@settings(max_examples=100, deadline=None)
@given(events=EVENTS, moment=st.integers(0, 6))
def test_what_comes_later_changes_nothing(events: list[tuple[int, int, int, bool]], moment: int) -> None:
    changed = [
        (u, t, item if t < moment else 9 - item, hit if t < moment else not hit) for u, t, item, hit in events
    ]
    rows = []
    for log in (events, changed):
        user, time, item, hit = (np.array(values) for values in zip(*log))
        found = Histories(user, time, item.astype(np.int32), hit).rows(np.arange(len(log)), 4)
        rows.append(found[time <= moment])
    np.testing.assert_array_equal(rows[0], rows[1])


def test_without_any_positive_all_histories_are_empty() -> None:
    histories = Histories(np.zeros(2), np.arange(2), np.zeros(2, np.int32), np.zeros(2, bool))
    assert histories.rows(np.arange(2), 3).tolist() == [[-1, -1, -1], [-1, -1, -1]]


@settings(max_examples=200, deadline=None)
@given(events=EVENTS, length=st.integers(1, 5))
def test_without_order_a_history_is_the_others_of_its_own_moment(
    events: list[tuple[int, int, int, bool]], length: int
) -> None:
    user, time, _, hit = (np.array(values) for values in zip(*events))
    item = np.arange(len(events), dtype=np.int32)  # every row its own item, so that none can hide another
    first = time == 0
    histories = Histories(user, time, item, hit, of_others=first)
    every = np.arange(len(events))
    found, whole = histories.rows(every, length), histories.whole(every)
    for row in every:
        own = (user == user[row]) & hit & ((time == 0) & (item != row) if first[row] else time < time[row])
        assert sorted(whole[row]) == np.flatnonzero(own).tolist()
        shown = found[row][found[row] >= 0].tolist()
        assert len(shown) == min(length, own.sum()) and set(shown) <= set(whole[row])
        assert (found[row][len(shown) :] == -1).all()


def test_the_order_of_a_set_tells_nothing_of_the_missing_one() -> None:
    rows = 12
    histories = Histories(
        np.zeros(rows),
        np.zeros(rows),
        np.arange(rows, dtype=np.int32),
        np.ones(rows, bool),
        np.ones(rows, bool),
    )
    drawn = histories.items.tolist()
    assert drawn != sorted(drawn)  # the table's order is gone
    for length in (rows - 1, 4):
        shown = histories.rows(np.arange(rows), length).tolist()
        assert all(row == sorted(row, key=drawn.index) for row in shown)
        assert len({tuple(row) for row in shown}) == rows  # of long sets every impression shows others
