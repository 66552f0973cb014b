"""The external recommenders of `implicit` (Ben Frederickson), popularity, and item lists, behind one interface.

    model = MODELS["als"]().fit(dataset, params, seed)
    rows, valid = model.recommend(requests, k)        # (R, min(k, V)) int32 item rows, (R,) int64 that count

All but `Recent` learn from the train split's positives of the first task. What a model cannot tell apart (a user it
knows nothing of, items that are no neighbour of the history) it ranks by popularity in train. Everything runs on one
thread, so that a seed gives one result and times compare.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from scipy import sparse
from threadpoolctl import threadpool_limits

from hsnn_core.errors import DataError
from hsnn_core.terms import place_weights
from hsnn_train.data.dataset import Dataset
from hsnn_train.data.neighbours import DAMPING, neighbours

from .requests import Requests, best_rows, train_positives

Params = Mapping[str, Any]


class Recommender(ABC):
    """What every external baseline is."""

    #: parameters and their defaults; `fit` refuses others
    defaults: ClassVar[Params] = {}

    def fit(self, dataset: Dataset, params: Params, seed: int) -> Recommender:
        """Learn; returns itself. Raises DataError for an unknown parameter and for a train split without
        positives."""
        for name in params:
            if name not in self.defaults:
                known = ", ".join(self.defaults) or "none"
                raise DataError(f"{type(self).__name__}: unknown parameter {name!r}; known: {known}")
        self.users, seen = train_positives(dataset)
        count = np.asarray(seen.sum(axis=0)).ravel()
        self.popularity = (count / count.max()).astype(np.float32)  # (V,) in 0..1
        with threadpool_limits(limits=1):
            self._fit(seen, {**self.defaults, **params}, seed)
        return self

    def recommend(self, requests: Requests, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best k items of every request: rows (R, min(k, V)) int32, best first, and how many count (R,)."""
        parts = []
        with threadpool_limits(limits=1):
            for part in requests.parts():
                scores = self.scores_of(requests, part)
                parts.append(best_rows(scores, requests.eligible(part), k))
        found, valid = zip(*parts)
        return np.concatenate(found), np.concatenate(valid)

    @abstractmethod
    def _fit(self, seen: sparse.csr_matrix, params: dict[str, Any], seed: int) -> None:
        """Learn from csr (U, V) of ones."""

    @abstractmethod
    def scores_of(self, requests: Requests, part: slice) -> np.ndarray:
        """Scores (r, V) float32 of all items for the requests ``part``. DataError where it cannot."""


class OfHistory(Recommender):
    """Scores by the user and the history alone."""

    def scores_of(self, requests: Requests, part: slice) -> np.ndarray:
        return self.scores(requests.user_key[part], requests.history[part])

    @abstractmethod
    def scores(self, user_key: np.ndarray, history: sparse.csr_matrix) -> np.ndarray:
        """Scores (R, V) float32 of all items for user keys (R,) int64 and histories (see `Requests`)."""


class Popularity(OfHistory):
    """The items of the most train positives, the same for every user."""

    def _fit(self, seen: sparse.csr_matrix, params: dict[str, Any], seed: int) -> None:
        pass

    def scores(self, user_key: np.ndarray, history: sparse.csr_matrix) -> np.ndarray:
        return np.broadcast_to(self.popularity, history.shape)


class Recent(Recommender):
    """The items of the most positives among the last ``positives`` of the whole log, every split's, strictly before the
    request; items that have none rank by popularity in train. What a news site shows who it knows nothing of."""

    defaults: ClassVar[Params] = {"positives": 5000}

    def fit(self, dataset: Dataset, params: Params, seed: int) -> Recommender:
        super().fit(dataset, params, seed)
        parts = (dataset.train, dataset.valid, dataset.test)
        hit = np.concatenate([part.labels[:, 0] > 0 for part in parts])
        time = np.concatenate([part.time for part in parts])[hit]
        order = np.argsort(time, kind="stable")
        self.time = time[order]
        self.item_row = np.concatenate([part.item_row for part in parts])[hit][order]
        return self

    def _fit(self, seen: sparse.csr_matrix, params: dict[str, Any], seed: int) -> None:
        self.positives = params["positives"]

    def scores_of(self, requests: Requests, part: slice) -> np.ndarray:
        if requests.time is None:
            raise DataError("Recent: needs requests whose times compare; set search.candidates: seen_before")
        stop = np.searchsorted(self.time, requests.time[part])
        return np.stack([self._counts(max(0, last - self.positives), last) for last in stop])

    def _counts(self, first: int, last: int) -> np.ndarray:
        """(V,) float32: how often each item is among these positives, and below 1 its popularity."""
        count = np.bincount(self.item_row[first:last], minlength=len(self.popularity))
        return (count + self.popularity / 2).astype(np.float32)


class ItemKNN(OfHistory):
    """Nearest neighbours of the items of the request's history: score_i = Σ_j decay^age_j · sim(j, i).

    Parameters: ``weighting`` of the user-item matrix before the similarity: cosine, tfidf or bm25 (with ``k1``
    and ``b``); ``neighbours`` kept per item; ``decay`` per step of age within the history (1: none).
    """

    defaults: ClassVar[Params] = {
        "weighting": "cosine",
        "neighbours": 100,
        "k1": 1.2,
        "b": 0.75,
        "decay": 1.0,
    }

    def _fit(self, seen: sparse.csr_matrix, params: dict[str, Any], seed: int) -> None:
        from implicit.nearest_neighbours import BM25Recommender, CosineRecommender, TFIDFRecommender

        kinds = {"cosine": CosineRecommender, "tfidf": TFIDFRecommender}
        if params["weighting"] == "bm25":
            model = BM25Recommender(params["neighbours"], params["k1"], params["b"], num_threads=1)
        elif params["weighting"] in kinds:
            model = kinds[params["weighting"]](params["neighbours"], num_threads=1)
        else:
            raise DataError(f"ItemKNN: weighting {params['weighting']!r}, expected cosine, tfidf or bm25")
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # implicit converts its own weighted matrix, and warns that it was COO
            model.fit(seen, show_progress=False)
        self.similarity = model.similarity.tocsr()
        self.decay = params["decay"]

    def scores(self, user_key: np.ndarray, history: sparse.csr_matrix) -> np.ndarray:
        scores = (_weighted(history, self.decay) @ self.similarity).toarray().astype(np.float32)
        # No neighbour of anything in the history: below all that are, by popularity.
        return np.where(scores > 0, scores, self.popularity - 2)


class NeighbourLists(ItemKNN):
    """What the lists of `hsnn_train.data.neighbours` rank by themselves, without any network: score_i = Σ_j
    decay^age_j / √place, over the items j of the history in whose list i has that place, 1 the first. HSNN may read
    such lists as an interaction; here they have the whole history, and a length, damping and decay of their own.

    Parameters: ``length`` of a list; ``damping`` of popular items in it; ``decay`` per step of age within the history.
    """

    defaults: ClassVar[Params] = {"length": 100, "damping": DAMPING, "decay": 0.75}

    def fit(self, dataset: Dataset, params: Params, seed: int) -> Recommender:
        train = dataset.train
        hit = train.labels[:, 0] > 0
        self.positives = (train.user_key[hit], train.time[hit], train.item_row[hit])
        self.ordered = not dataset.unordered
        return super().fit(dataset, params, seed)

    def _fit(self, seen: sparse.csr_matrix, params: dict[str, Any], seed: int) -> None:
        items = seen.shape[1]
        lists = neighbours(
            *self.positives, items, min(params["length"], items), self.ordered, params["damping"]
        )
        item, place = np.nonzero(lists >= 0)
        weight = place_weights(lists.shape[1]).astype(np.float32)[place]
        self.similarity = sparse.csr_matrix((weight, (item, lists[item, place])), shape=(items, items))
        self.decay = params["decay"]


class ALS(OfHistory):
    """Alternating least squares for implicit feedback; the request's history is folded in (`recalculate_user`),
    with confidence alpha · decay^age. An empty history is ranked by popularity."""

    defaults: ClassVar[Params] = {
        "factors": 64,
        "regularization": 0.01,
        "alpha": 1.0,
        "iterations": 15,
        "decay": 1.0,
    }

    def _fit(self, seen: sparse.csr_matrix, params: dict[str, Any], seed: int) -> None:
        from implicit.cpu.als import AlternatingLeastSquares

        own = {name: params[name] for name in ("factors", "regularization", "alpha", "iterations")}
        self.model = AlternatingLeastSquares(**own, num_threads=1, random_state=seed)
        self.model.fit(seen, show_progress=False)
        self.decay = params["decay"]

    def scores(self, user_key: np.ndarray, history: sparse.csr_matrix) -> np.ndarray:
        known = np.diff(history.indptr)[:, None] > 0
        factors = self.model.recalculate_user(
            np.arange(len(user_key)), _weighted(history, self.decay)
        )  # (R, f)
        scores = factors @ self.model.item_factors.T
        return np.where(known, scores, self.popularity)


class BPR(OfHistory):
    """Bayesian personalised ranking; has no fold-in, so a request gets its user's trained factor, and a user
    without train positives is ranked by popularity."""

    defaults: ClassVar[Params] = {
        "factors": 64,
        "learning_rate": 0.01,
        "regularization": 0.01,
        "iterations": 100,
    }

    def _fit(self, seen: sparse.csr_matrix, params: dict[str, Any], seed: int) -> None:
        from implicit.cpu.bpr import BayesianPersonalizedRanking

        self.model = BayesianPersonalizedRanking(**params, num_threads=1, random_state=seed)
        self.model.fit(seen, show_progress=False)

    def scores(self, user_key: np.ndarray, history: sparse.csr_matrix) -> np.ndarray:
        at = np.minimum(np.searchsorted(self.users, user_key), len(self.users) - 1)
        known = self.users[at] == user_key
        scores = self.model.user_factors[at] @ self.model.item_factors.T
        return np.where(known[:, None], scores, self.popularity)


def _weighted(history: sparse.csr_matrix, decay: float) -> sparse.csr_matrix:
    """csr (R, V) of decay^age. Below 1e-4 a weight says nothing any more, and zeros would be stored."""
    weighted = history.copy()
    weighted.data = np.maximum(np.power(np.float32(decay), history.data - 1), np.float32(1e-4))
    return weighted


MODELS: dict[str, type[Recommender]] = {
    "popularity": Popularity,
    "recent": Recent,
    "item_knn": ItemKNN,
    "lists": NeighbourLists,
    "als": ALS,
    "bpr": BPR,
}
