"""The exhaustive top K of one user over a corpus of any size: `hsnn_core.exhaustive` a piece of the items at a time."""

from __future__ import annotations

import numpy as np

from hsnn_core.features import Encoded
from hsnn_core.index import HierarchicalIndex
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import best, rank_scores

PIECE = 1 << 16  # items scored before the best so far are kept and the others forgotten


def best_items(
    index: HierarchicalIndex,
    scorer: LayerScorer,
    user: Encoded,
    k: int,
    rank: np.ndarray,
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """Item ids (k,) int64 of the best ``k`` of all items for one user (fewer in a smaller corpus), best first; ties go
    to the smaller position, as in the search. ``allowed`` (V,) bool by position: only of these."""
    state = scorer.open(user)
    carried = np.zeros((1, index.nodes(1), 0), dtype=np.float32)  # (1, I_l, (l-1)*T)
    for layer in range(1, index.layers):
        monn, _ = scorer.score(state, layer, np.arange(index.nodes(layer))[None], carried)
        carried = np.concatenate([carried, monn], axis=2)
        if layer + 1 < index.layers:
            carried = carried[:, index.parents(layer + 1)]
    above = index.parents(index.layers) if index.layers > 1 else None  # (V,)

    top = np.empty(0, dtype=np.int64)
    keys = np.empty(0, dtype=np.float32)
    for start in range(0, index.items, PIECE):
        positions = np.arange(start, min(start + PIECE, index.items))
        if allowed is not None:
            positions = positions[allowed[positions]]
        if not len(positions):
            continue
        previous = (
            np.zeros((1, len(positions), 0), np.float32) if above is None else carried[:, above[positions]]
        )
        _, logits = scorer.score(state, index.layers, positions[None], previous)
        top = np.concatenate([top, positions])
        keys = np.concatenate([keys, rank_scores(logits, rank)[0]])
        keep = np.flatnonzero(best(keys[None], k)[0])
        top, keys = top[keep], keys[keep]
    return index.item_ids[top[np.lexsort((top, -keys))]]
