"""Evaluation requests as the external baselines see them: a user key, a history, and the items that may come back.

They are the requests, with the candidates, that the HSNN is evaluated on (`hsnn_train.data.requests`).

Letters: R requests, V items (rows of the item table).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from hsnn_core.errors import DataError
from hsnn_train.data.dataset import Dataset
from hsnn_train.data.requests import evaluation_requests
from hsnn_train.metrics import ndcg_at, recall_at

CHUNK = 256  # requests whose scores of all items are in memory at once


def everything(part: slice) -> np.ndarray | None:
    """The candidates of requests that have no restriction."""
    return None


@dataclass(frozen=True)
class Requests:
    """R requests.

    Attributes:
        user_key: (R,) int64.
        history: csr (R, V) float32; an entry is 1 for the newest item of the request's history, 2 for the one
            before, and so on; items are distinct.
        wanted: per request the int32 rows of its relevant items.
        eligible: the candidates of a slice of r requests, (r, V) bool by item row; None when all are.
        time: (R,) int64 where times of users compare ("seen_before"), else None.
    """

    user_key: np.ndarray
    history: sparse.csr_matrix
    wanted: list[np.ndarray]
    eligible: Callable[[slice], np.ndarray | None] = everything
    time: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.user_key)

    @property
    def items(self) -> int:
        """V."""
        return int(self.history.shape[1])

    def parts(self, size: int = CHUNK) -> Iterator[slice]:
        """Slices of at most ``size`` requests that make up all of them."""
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))


def load_requests(
    dataset: Dataset, split: str, candidates: str = "all", limit: int | None = None
) -> Requests:
    """The requests of a split, at most ``limit``; see `hsnn_train.data.requests` for ``candidates``.

    Raises DataError when there are none.
    """
    found = evaluation_requests(dataset, split, candidates, limit)
    if not len(found):
        raise DataError(f"no request in {split} has a positive to be found; change the recipe's split:")
    history = request_histories(dataset.earlier(split, found.rows, 0), found.items)
    time = found.time if candidates == "seen_before" else None
    return Requests(found.user_key, history, found.wanted, found.eligible, time)


def request_histories(histories: list[np.ndarray], items: int) -> sparse.csr_matrix:
    """Histories, per request its item rows from old to new, as csr (R, V) float32 of age + 1 (see `Requests`)."""
    indptr, indices, ages = [0], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for rows in histories:
        newest, first = np.unique(
            rows[::-1], return_index=True
        )  # a repeated item is as new as its last visit
        indices.append(newest)
        ages.append(np.argsort(np.argsort(first)) + 1)
        indptr.append(indptr[-1] + len(newest))
    data = np.concatenate(ages).astype(np.float32)
    return sparse.csr_matrix((data, np.concatenate(indices), indptr), shape=(len(histories), items))


def train_positives(dataset: Dataset) -> tuple[np.ndarray, sparse.csr_matrix]:
    """The train split's positives of the first task: user keys (U,) int64 ascending, and csr (U, V) float32 of
    ones. Raises DataError when there are none."""
    train = dataset.train
    hit = train.labels[:, 0] > 0
    if not hit.any():
        raise DataError(f"no positive of task {dataset.schema.tasks[0].name} in train: nothing to learn from")
    users, row = np.unique(train.user_key[hit], return_inverse=True)
    shape = (len(users), len(dataset.item_keys))
    seen = sparse.csr_matrix((np.ones(len(row), np.float32), (row, train.item_row[hit])), shape=shape)
    seen.data[:] = 1.0  # a repeated visit counts once
    return users, seen


def best_rows(scores: np.ndarray, eligible: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best k of scores (R, V): item rows (R, min(k, V)) int32, best first, ties to the smaller row, and the
    number of them that count (R,) int64. Items that are not ``eligible`` (R, V) never count."""
    if eligible is not None:
        scores = np.where(eligible, scores, -np.inf)
    k = min(k, scores.shape[1])
    # Every item at least as good as the k-th, so that a tie at the edge does not depend on the partition.
    edge = -np.partition(-scores, k - 1, axis=1)[:, k - 1]
    found = np.zeros((len(scores), k), np.int32)
    valid = np.minimum(np.isfinite(scores).sum(1), k)
    for r, row in enumerate(scores):
        candidates = np.flatnonzero(row >= edge[r])
        found[r] = candidates[np.argsort(-row[candidates], kind="stable")[:k]]
    return found, valid


def metric(name: str) -> tuple[str, int]:
    """("recall", 100) of "recall@100". Raises DataError."""
    kind, at, depth = name.partition("@")
    if kind not in ("recall", "ndcg") or not at or not depth.isdigit() or not int(depth):
        raise DataError(f"metric {name!r}: expected recall@K or ndcg@K, for example recall@100")
    return kind, int(depth)


def measure(
    found: np.ndarray, valid: np.ndarray, wanted: list[np.ndarray], names: tuple[str, ...]
) -> dict[str, float]:
    """Figures like "recall@100" and "ndcg@10" of item rows (R, K), by name. Raises DataError for another name or
    for a depth that is more than K."""
    report = {}
    for name in names:
        kind, depth = metric(name)
        if depth > found.shape[1]:
            raise DataError(f"metric {name}: only {found.shape[1]} items were retrieved")
        report[name] = {"recall": recall_at, "ndcg": ndcg_at}[kind](found, valid, wanted, depth)
    return report
