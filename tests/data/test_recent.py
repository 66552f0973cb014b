"""Histories over a stream are those of the whole log, from a state that is bounded per user."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hsnn_core.schema import KEY_MISSING
from hsnn_train.data.history import Histories
from hsnn_train.data.recent import RecentPositives

events = st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 5), st.booleans())


@settings(max_examples=200, deadline=None)
@given(st.lists(events, max_size=60), st.integers(1, 4), st.data())
def test_a_log_cut_into_files_has_the_histories_of_the_whole(log, length, data):
    group, pause, item, hit = (np.array(part) for part in zip(*log)) if log else (np.empty(0, np.int64),) * 4
    time, item = np.cumsum(pause), item * 1_000_000_007  # raw keys are int64
    hit = hit.astype(bool)
    rows = Histories(group, time, np.arange(len(log), dtype=np.int32), hit).rows(np.arange(len(log)), length)
    whole = np.where(rows < 0, KEY_MISSING, item[rows]) if len(log) else rows
    cuts = sorted(data.draw(st.lists(st.integers(0, len(log)), max_size=4)))
    recent = RecentPositives.none(length)
    for start, stop in zip([0, *cuts], [*cuts, len(log)]):
        part = slice(start, stop)
        earlier = recent.before(group[part], time[part], item[part], hit[part])
        assert np.array_equal(earlier(np.arange(stop - start), length), whole[part])
        own = np.flatnonzero(hit[part]) + start
        recent = recent.with_positives(group[own], time[own], item[own])
        assert np.unique(recent.group, return_counts=True)[1].max(initial=0) <= 2 * length


def test_late_impressions_see_nothing_that_came_after_them():
    recent = RecentPositives.none(2).with_positives(
        np.zeros(3, int), np.array([5, 7, 9]), np.array([50, 70, 90])
    )
    earlier = recent.before(np.zeros(2, int), np.array([7, 100]), np.array([1, 2]), np.array([True, False]))
    assert earlier(np.arange(2), 2).tolist() == [[50, KEY_MISSING], [1, 90]]
