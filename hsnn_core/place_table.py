"""Where things are by their number, and what changed of it since: tables that are replaced, never changed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class Places:
    """``keys`` (n,) int64 ascending, all different, and their ``places`` (n,) int64, -1 for nowhere."""

    keys: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    places: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def take(self, keys: np.ndarray, otherwise: np.ndarray | int = -1) -> np.ndarray:
        """Places of keys of any shape, ``otherwise`` for those that are not here."""
        if not len(self.keys):
            return np.broadcast_to(otherwise, keys.shape)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.places[at], otherwise)

    def with_changes(self, keys: np.ndarray, places: np.ndarray) -> Places:
        """With keys (m,), all different, at other places (m,)."""
        order = np.argsort(keys)
        keys, places = keys[order].astype(np.int64), places[order].astype(np.int64)
        at = np.searchsorted(self.keys, keys)
        known = np.zeros(len(keys), dtype=bool)
        inside = at < len(self.keys)
        known[inside] = self.keys[at[inside]] == keys[inside]
        changed = self.places.copy()
        changed[at[known]] = places[known]
        return Places(
            np.insert(self.keys, at[~known], keys[~known]), np.insert(changed, at[~known], places[~known])
        )


class PositionTable:
    """Position of every id of the item space, -1 for items that are not there: a table (cardinality,), and what changed
    since."""

    def __init__(self, base: np.ndarray, changed: Places | None = None) -> None:
        self._base = base
        self._changed = Places() if changed is None else changed

    def __len__(self) -> int:
        return len(self._base)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Positions of ids of any shape."""
        return self._changed.take(ids, otherwise=self._base[ids])

    def positions(self) -> np.ndarray:
        """(cardinality,) int32, all of them."""
        return self.take(np.arange(len(self))).astype(np.int32, copy=False)

    def with_changes(self, ids: np.ndarray, positions: np.ndarray) -> PositionTable:
        """A table with ids (n,), all different, at other positions (n,)."""
        return PositionTable(self._base, self._changed.with_changes(ids, positions))
