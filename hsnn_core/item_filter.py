"""Which items a request may get, and how many of them lie under a node: what the search asks before it prunes.

A node without such an item is no candidate, so narrow targeting cannot starve; and a beam whose nodes hold few of
them takes more nodes (`search`).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .errors import SearchError
from .index import HierarchicalIndex


class ItemFilter(Protocol):
    """The items that each of B users may get."""

    def counts(self, layer: int, users: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """Number of items that user users[i] may get under node nodes[i] of a layer above the items: (n,), (n,) -> (n,)
        int64."""
        ...

    def passes(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether user users[i] may get the item at position items[i]: (n,), (n,) -> (n,) bool."""
        ...


class MaskFilter:
    """A mask (B, V) bool by position, as evaluation has it."""

    def __init__(self, index: HierarchicalIndex, mask: np.ndarray) -> None:
        if mask.ndim != 2 or mask.shape[1] != index.items or mask.dtype != bool:
            raise SearchError(
                f"item mask: {mask.dtype} of shape {mask.shape}, expected bool of shape (users, {index.items}): "
                "users, items by position"
            )
        self._mask = mask
        self._counts = [
            np.add.reduceat(mask, index.item_ptr(layer)[:-1], axis=1, dtype=np.int64)
            for layer in range(1, index.layers)
        ]

    def counts(self, layer: int, users: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """See `ItemFilter`."""
        return self._of(self._counts[layer - 1], users, nodes)

    def passes(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """See `ItemFilter`."""
        return self._of(self._mask, users, items)

    @staticmethod
    def _of(table: np.ndarray, users: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        if len(users) and users.max() >= len(table):
            raise SearchError(f"item mask of {len(table)} users, asked for user {users.max()}")
        found: np.ndarray = table[users, nodes]
        return found
