"""Neighbours of an item: the items that its readers go on to, as lists for crossings to go via.

What leads from item i to item j sums, over the histories that have j at most `WINDOW` places after i, `DECAY` to the
power of the places between them, and `BACKWARD` of that where j stands before i; divided by the popularity of j to the
power `DAMPING`, or everybody's neighbours were the bestsellers. Where histories are sets without an order, all items of
one are equally near, and a history weighs one over its size, so that each of its items has the same say.

Lists made of the train split know its labels: of two items that only one user has in common, each is the other's
neighbour because of that very user, and a model trained on such pairs learns to trust what held-out users do not
have. So users are divided into `FOLDS`, and an impression is trained with the lists that the users of its fold had no
part in; what is served and evaluated has the lists of all.

Letters: S positives, V items, L neighbours per item.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import sparse

WINDOW = 10
DECAY = 0.8
BACKWARD = 0.25
DAMPING = 0.15
FOLDS = 5


def fold_of(group: np.ndarray) -> np.ndarray:
    """Folds (S,) int8, 0 to FOLDS - 1, of the keys (S,) int64 that histories are kept by: the same in every process,
    and unrelated to any order of the keys."""
    mixed = group.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(33)) % np.uint64(FOLDS)).astype(np.int8)


def neighbours(
    group: np.ndarray, time: np.ndarray, item_row: np.ndarray, items: int, length: int, ordered: bool = True,
    damping: float = DAMPING,
) -> np.ndarray:  # fmt: skip
    """Item rows (V, length) int32, the strongest first, then -1, from positives (S,) of the same group in order of time
    (ties: order of rows); ``ordered`` False takes a group's positives as a set."""
    together = (_windowed if ordered else _sets)(group, time, item_row, items)
    together.setdiag(0.0)
    popularity = np.maximum(np.bincount(item_row, minlength=items), 1)
    similar = together @ sparse.diags(popularity**-damping)
    similar.eliminate_zeros()
    found = np.full((items, length), -1, np.int32)
    for item, (others, values) in enumerate(_rows(similar.tocsr())):
        if len(others) > length:
            # All that could be among the best, with those that tie with the last of them.
            near = values >= np.partition(values, -length)[-length]
            others, values = others[near], values[near]
        best = np.lexsort((others, -values))[:length]
        found[item, : len(best)] = others[best]
    return found


def _windowed(group: np.ndarray, time: np.ndarray, item_row: np.ndarray, items: int) -> sparse.csr_matrix:
    order = np.lexsort((np.arange(len(group)), time, group))
    group, item_row = group[order], item_row[order]
    together = sparse.csr_matrix((items, items), dtype=np.float64)
    for places in range(1, WINDOW + 1):
        same = group[places:] == group[:-places]
        left, right = item_row[:-places][same], item_row[places:][same]
        weight = np.full(len(left), DECAY ** (places - 1))
        together += sparse.csr_matrix((weight, (left, right)), shape=(items, items))
    return (together + BACKWARD * together.T).tocsr()


def _sets(group: np.ndarray, time: np.ndarray, item_row: np.ndarray, items: int) -> sparse.csr_matrix:
    groups, of = np.unique(group, return_inverse=True)
    weight = 1 / np.bincount(of)
    member = sparse.csr_matrix((np.ones(len(of)), (of, item_row)), shape=(len(groups), items))
    return (member.T @ sparse.diags(weight) @ member).tocsr()


def _rows(matrix: sparse.csr_matrix) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start, stop in zip(matrix.indptr[:-1], matrix.indptr[1:]):
        yield matrix.indices[start:stop], matrix.data[start:stop]
