"""The external recommenders: one suite that all pass, hand-computed neighbours, fold-in, exclusion, eligibility."""

import warnings
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from halves_world import SCHEMA

from hsnn_bench.implicit_models import ALS, BPR, MODELS, ItemKNN, NeighbourLists, Popularity, Recent
from hsnn_bench.requests import Requests, load_requests, measure, request_histories, train_positives
from hsnn_core.errors import DataError
from hsnn_core.schema import Schema
from hsnn_train.data.dataset import build_dataset
from hsnn_train.data.splits import Split
from hsnn_train.data.tables import LogTables

SMALL = {"als": {"factors": 4}, "bpr": {"factors": 4, "learning_rate": 0.1}}


def asked(histories, users=None, items=4, eligible=None):
    user_key = np.arange(len(histories)) if users is None else np.array(users)
    extra = {} if eligible is None else {"eligible": np.array(eligible, bool).__getitem__}
    return Requests(
        user_key, request_histories([np.array(h, np.int64) for h in histories], items), [], **extra
    )


@pytest.fixture(scope="module")
def three_users():
    """Users 0 and 1 visit items 0 and 1, user 2 items 1 and 2; item 3 nobody."""
    user, item = [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 1, 2]
    columns = {"user": user, "item": item, "t": list(range(6)), "visit": [1] * 6, "part": ["train"] * 6}
    tables = LogTables(Schema.from_dict(SCHEMA), pa.table(columns), None, pa.table({"item": [0, 1, 2, 3]}))
    return build_dataset(tables.schema, tables, Split.from_dict({"by": "column", "column": "part"}), seed=1)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("popularity", "recent")])
def test_finds_the_items_of_a_users_own_half(halves, name):
    model = MODELS[name]().fit(halves, SMALL.get(name, {}), seed=1)
    requests = load_requests(halves, "test", "new")
    found, valid = model.recommend(requests, 4)
    assert found.shape == (40, 4) and found.dtype == np.int32 and (valid == 4).all()
    own = (found % 2 == requests.user_key[:, None] % 2).mean()
    assert own > 0.9
    # 5 of the 12 items of the half are left, one is wanted, 4 come back
    assert measure(found, valid, requests.wanted, ("recall@4",))["recall@4"] > 0.6


@pytest.mark.parametrize("name", [n for n in MODELS if n != "recent"])
def test_same_seed_same_answer_and_no_excluded_item(halves, name):
    requests = load_requests(halves, "test", "new", 20)
    answers = [
        MODELS[name]().fit(halves, SMALL.get(name, {}), seed=3).recommend(requests, 24) for _ in range(2)
    ]
    assert np.array_equal(answers[0][0], answers[1][0])
    found, valid = answers[0]
    assert (valid == 24 - 7).all()
    for row, count, history in zip(found, valid, requests.history):
        assert not set(row[:count].tolist()) & set(history.indices.tolist())


def test_item_knn_by_hand(three_users):
    model = ItemKNN().fit(three_users, {"neighbours": 4}, seed=1)
    both, other = 2 / np.sqrt(2 * 3), 1 / np.sqrt(3 * 1)
    scores = model.scores(np.arange(2), request_histories([np.array([0]), np.array([2, 1])], 4))
    np.testing.assert_allclose(scores[0], [1, both, 1 / 3 - 2, -2], rtol=1e-6)
    np.testing.assert_allclose(scores[1], [both, 1 + other, 1 + other, -2], rtol=1e-6)
    decayed = ItemKNN().fit(three_users, {"neighbours": 4, "decay": 0.5}, seed=1)
    scores = decayed.scores(np.arange(1), request_histories([np.array([2, 1])], 4))
    np.testing.assert_allclose(scores[0], [both, 1 + other / 2, other + 0.5, -2], rtol=1e-6)


def test_neighbour_lists_by_hand(three_users):
    # 0 goes on to 1, 1 to 2 and, backward, to 0; 2 back to 1
    model = NeighbourLists().fit(three_users, {"length": 3, "decay": 0.5}, seed=1)
    scores = model.scores(np.arange(2), request_histories([np.array([0]), np.array([2, 1])], 4))
    np.testing.assert_allclose(scores[0], [2 / 3 - 2, 1, 1 / 3 - 2, -2], rtol=1e-6)
    np.testing.assert_allclose(scores[1], [2**-0.5, 0.5, 1, -2], rtol=1e-6)
    short = NeighbourLists().fit(three_users, {"length": 1}, seed=1)
    scores = short.scores(np.arange(1), request_histories([np.array([1])], 4))
    np.testing.assert_allclose(scores[0], [2 / 3 - 2, -1, 1, -2], rtol=1e-6)


@pytest.mark.parametrize("weighting", ["cosine", "tfidf", "bm25"])
def test_item_knn_scores_are_those_of_implicit(halves, weighting):
    from implicit.nearest_neighbours import BM25Recommender, CosineRecommender, TFIDFRecommender

    kinds = {"cosine": CosineRecommender, "tfidf": TFIDFRecommender, "bm25": BM25Recommender}
    reference = kinds[weighting](K=10, num_threads=1)
    seen = train_positives(halves)[1]
    with warnings.catch_warnings(action="ignore"):
        reference.fit(seen, show_progress=False)
    model = ItemKNN().fit(halves, {"weighting": weighting, "neighbours": 10}, seed=1)
    ones = seen.copy()
    scores = model.scores(np.arange(40), ones)
    for user in range(0, 40, 7):
        ids, expected = reference.recommend(user, seen[user], N=24, filter_already_liked_items=False)
        np.testing.assert_allclose(scores[user, ids[expected > 0]], expected[expected > 0], rtol=1e-5)


def test_als_folds_the_requests_history_in_and_ranks_an_empty_one_by_popularity(halves):
    model = ALS().fit(halves, {"factors": 4, "alpha": 5.0}, seed=1)
    history = request_histories([np.arange(0, 10, 2), np.arange(1, 11, 2), np.array([], np.int64)], 24)
    scores = model.scores(np.zeros(3, np.int64), history)  # whose user it is does not matter
    assert scores[0, 12::2].min() > scores[0, 13::2].max() and scores[1, 13::2].min() > scores[1, 12::2].max()
    np.testing.assert_array_equal(scores[2], model.popularity)


def test_bpr_ranks_an_unknown_user_by_popularity(halves):
    model = BPR().fit(halves, {"factors": 4}, seed=1)
    scores = model.scores(np.array([5, 999]), request_histories([np.array([1]), np.array([1])], 24))
    np.testing.assert_array_equal(scores[1], model.popularity)
    assert not np.array_equal(scores[0], model.popularity)


def test_popularity_and_eligibility(three_users):
    model = Popularity().fit(three_users, {}, seed=1)
    found, valid = model.recommend(asked([[], []], eligible=[[1, 1, 1, 1], [1, 0, 1, 0]]), 4)
    assert found[0].tolist() == [1, 0, 2, 3]
    assert valid.tolist() == [4, 2] and found[1, :2].tolist() == [0, 2]


def test_recent_counts_the_last_positives_of_every_split_before_the_request(three_users):
    model = Recent().fit(three_users, {"positives": 2}, seed=1)
    requests = replace(asked([[], [], []]), time=np.array([3, 0, 6]))
    found, _ = model.recommend(requests, 4)
    assert found[0].tolist() == [
        1,
        0,
        2,
        3,
    ]  # before 3: items 1 and 0 once each, the more popular in train first
    assert found[1].tolist() == [1, 0, 2, 3]  # nothing before: popularity
    assert found[2].tolist() == [1, 2, 0, 3]  # the last two: items 1 and 2
    with pytest.raises(DataError, match="times compare; set search.candidates: seen_before"):
        model.recommend(asked([[]]), 4)


def test_refuses_what_it_does_not_know(three_users):
    with pytest.raises(DataError, match="ALS: unknown parameter 'rank'; known: factors"):
        ALS().fit(three_users, {"rank": 3}, seed=1)
    with pytest.raises(DataError, match="weighting 'jaccard', expected cosine, tfidf or bm25"):
        ItemKNN().fit(three_users, {"weighting": "jaccard"}, seed=1)
