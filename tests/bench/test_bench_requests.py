"""Requests of the external baselines: histories by age, candidates, the best rows, figures."""

import numpy as np
import pytest

from hsnn_bench.requests import best_rows, load_requests, measure, metric, request_histories, train_positives
from hsnn_core.errors import DataError
from hsnn_train.data.requests import evaluation_requests


def test_the_newest_item_of_a_history_has_age_one_and_a_repeated_one_that_of_its_last_visit():
    rows = [np.array([3, 1, 3, 2]), np.array([], np.int32), np.array([0])]
    found = request_histories(rows, 5).toarray()
    assert found.tolist() == [[0, 3, 1, 2, 0], [0] * 5, [1, 0, 0, 0, 0]]


def test_best_rows_breaks_ties_by_row_and_never_counts_what_is_not_eligible():
    scores = np.array([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    found, valid = best_rows(scores, None, 2)
    assert found.tolist() == [[1, 2], [0, 1]] and valid.tolist() == [2, 2]
    eligible = np.array([[1, 0, 1, 0, 1], [0, 0, 0, 0, 1]], bool)
    found, valid = best_rows(scores, eligible, 4)
    assert valid.tolist() == [3, 1]
    assert found[0, :3].tolist() == [2, 4, 0] and found[1, 0] == 4
    assert best_rows(scores, None, 99)[0].shape == (2, 5)


def test_requests_are_those_that_ours_is_evaluated_on(halves):
    requests = load_requests(halves, "test", "new", 15)
    same = evaluation_requests(halves, "test", "new", 15)
    assert np.array_equal(requests.user_key, same.user_key) and len(requests) == 15
    assert all(np.array_equal(a, b) for a, b in zip(requests.wanted, same.wanted))
    row, part = 4, slice(4, 5)
    user = requests.user_key[row]
    visited = {
        int(item)
        for examples in (halves.train, halves.valid)
        for item in examples.item_row[examples.user_key == user]
    }
    assert set(requests.history[row].indices.tolist()) == visited
    newest = requests.history[row].indices[np.argmin(requests.history[row].data)]
    assert newest == halves.valid.item_row[halves.valid.user_key == user][0]  # test knows the validation item
    assert set(np.flatnonzero(~requests.eligible(part)[0]).tolist()) == visited
    assert load_requests(halves, "test", "all").eligible(part) is None


def test_train_positives_are_ones(halves):
    users, seen = train_positives(halves)
    assert seen.shape == (40, 24) and users.tolist() == list(range(40))
    assert seen.sum() == len(halves.train) == 40 * 6 and set(seen.data) == {1.0}


def test_figures_by_name():
    found, valid = np.array([[2, 0, 1], [1, 2, 0]]), np.array([3, 1])
    got = measure(found, valid, [np.array([0]), np.array([2])], ("recall@1", "recall@2", "ndcg@2"))
    assert got == pytest.approx({"recall@1": 0, "recall@2": 0.5, "ndcg@2": 0.5 / np.log2(3)})
    with pytest.raises(DataError, match="metric recall@4: only 3 items"):
        measure(found, valid, [], ("recall@4",))
    for name in ("hits@3", "recall@", "recall", "ndcg@0"):
        with pytest.raises(DataError, match="expected recall@K or ndcg@K"):
            metric(name)
