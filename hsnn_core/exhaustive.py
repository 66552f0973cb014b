"""Exhaustive scoring: the slow, readable twin of `hsnn_core.search` and its oracle.

Every node of every layer is scored for every user, the ancestors' MoNN logits are carried down the tree, and
all items are sorted. The layer-wise search with full widths must give the same ids, order and scores; with
narrower beams, the share of these top K that it finds is the search recall (paper §4).
"""

from __future__ import annotations

from time import perf_counter_ns

import numpy as np

from .features import Encoded
from .item_filter import ItemFilter
from .search import (
    Bids,
    LayerTrace,
    Scorer,
    SearchIndex,
    SearchResult,
    checked_request,
    checked_scores,
    rank_scores,
    sigmoid,
)


def exhaustive(
    index: SearchIndex,
    scorer: Scorer,
    users: Encoded,
    k: int,
    rank: np.ndarray,
    item_filter: ItemFilter | None = None,
    bids: Bids | None = None,
) -> SearchResult:
    """The best K of all V items for each of B users; arguments and errors as `search.search`."""
    began = perf_counter_ns()
    batch = len(users.ids)
    rank = checked_request(batch, k, rank)
    state = scorer.open(users)
    user_done = perf_counter_ns()

    carried = np.zeros((batch, index.nodes(1), 0), dtype=np.float32)  # (B, I_l, (l-1)*T)
    traces = []
    for layer in range(1, index.layers + 1):
        start = perf_counter_ns()
        every = np.tile(np.arange(index.nodes(layer)), (batch, 1))  # (B, I_l)
        monn, logits = scorer.score(state, layer, every, carried)
        there = index.present(layer, every)
        checked_scores(layer, monn, logits, np.ones(every.shape, bool) if there is None else there, len(rank))
        if layer < index.layers:
            carried = np.concatenate([carried, monn], axis=2)[:, index.parents(layer + 1)]
        counts = np.full(batch, index.nodes(layer))
        traces.append(LayerTrace(counts, counts, every, (perf_counter_ns() - start) // 1000))

    tasks = len(rank)
    item_ids = np.zeros((batch, k), dtype=np.int64)
    positions = np.zeros((batch, k), dtype=np.int64)
    probabilities = np.zeros((batch, k, tasks), dtype=np.float32)
    rank_score = np.full((batch, k), -np.inf, dtype=np.float32)
    valid = np.zeros(batch, dtype=np.int32)
    scores = rank_scores(logits, rank)  # (B, V)
    every_item = np.arange(index.items)
    if bids is not None:
        scores = scores + bids.log(index.layers, every_item)
    for user in range(batch):
        if item_filter is None:
            present = index.present(index.layers, every_item)
        else:
            present = item_filter.passes(np.full(index.items, user), every_item)
        allowed = every_item if present is None else np.flatnonzero(present)
        if len(allowed) > k:  # sort only those that are at least as good as the k-th, ties with it included
            keys = scores[user, allowed]
            allowed = allowed[keys >= np.partition(keys, len(keys) - k)[len(keys) - k]]
        # Best score first, then smaller position.
        top = allowed[np.argsort(-scores[user, allowed], kind="stable")][:k]
        valid[user] = len(top)
        positions[user, : len(top)] = top
        item_ids[user, : len(top)] = index.ids(top)
        probabilities[user, : len(top)] = sigmoid(logits[user, top])
        rank_score[user, : len(top)] = scores[user, top]
    return SearchResult(
        item_ids=item_ids,
        probabilities=probabilities,
        rank_score=rank_score,
        valid=valid,
        positions=positions,
        layers=tuple(traces),
        user_microseconds=(user_done - began) // 1000,
        total_microseconds=(perf_counter_ns() - began) // 1000,
    )
