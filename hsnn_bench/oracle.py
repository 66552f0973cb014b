"""The exhaustive scores of one user over a corpus of any size: `hsnn_core.exhaustive`, a piece of the items at once."""

from __future__ import annotations

import numpy as np

from hsnn_core.features import Encoded
from hsnn_core.index import HierarchicalIndex
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import best, rank_scores

PIECE = 1 << 16  # items scored at once


def item_scores(
    index: HierarchicalIndex,
    scorer: LayerScorer,
    user: Encoded,
    rank: np.ndarray,
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """(V,) float32 rank score of every item for one user, by position; -inf of those that are not ``allowed`` (V,)
    bool, which are not scored."""
    state = scorer.open(user)
    carried = np.zeros((1, index.nodes(1), 0), dtype=np.float32)  # (1, I_l, (l-1)*T)
    for layer in range(1, index.layers):
        monn, _ = scorer.score(state, layer, np.arange(index.nodes(layer))[None], carried)
        carried = np.concatenate([carried, monn], axis=2)
        if layer + 1 < index.layers:
            carried = carried[:, index.parents(layer + 1)]
    above = index.parents(index.layers) if index.layers > 1 else None  # (V,)

    scores = np.full(index.items, -np.inf, dtype=np.float32)
    every = np.arange(index.items) if allowed is None else np.flatnonzero(allowed)
    for start in range(0, len(every), PIECE):
        positions = every[start : start + PIECE]
        previous = (
            np.zeros((1, len(positions), 0), np.float32) if above is None else carried[:, above[positions]]
        )
        _, logits = scorer.score(state, index.layers, positions[None], previous)
        scores[positions] = rank_scores(logits, rank)[0]
    return scores


def top_positions(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the best ``k`` of scores (V,), those of -inf left out, best first; ties go to the smaller one, as in
    the search."""
    top = np.flatnonzero(best(scores[None], k)[0])
    return top[np.lexsort((top, -scores[top]))]


def best_items(
    index: HierarchicalIndex,
    scorer: LayerScorer,
    user: Encoded,
    k: int,
    rank: np.ndarray,
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """Item ids (k,) int64 of the best ``k`` of all items for one user (fewer in a smaller corpus), best first;
    ``allowed`` (V,) bool by position: only of these."""
    scores = item_scores(index, scorer, user, rank, allowed)
    return index.item_ids[top_positions(scores, k)]
