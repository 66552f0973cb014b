"""Rows by number, of a table that lies in a file and of those that came later.

A search reads a `RowTable`, which never changes; `GrowingRows` appends to the storage behind it and hands out the next
one. Appending does not touch what an earlier table can see, so neither side waits for the other.
"""

from __future__ import annotations

import numpy as np


class RowTable:
    """n rows of shape (...): ``base`` (n0, ...), then ``extra`` (n1, ...) of the same kind.

    ``order`` (n,) int, if given, says which row of the two stands at each number; otherwise n = n0 + n1 and they stand
    one after the other.
    """

    def __init__(
        self, base: np.ndarray, extra: np.ndarray | None = None, order: np.ndarray | None = None
    ) -> None:
        self.base = np.asarray(base)
        self.extra = self.base[:0] if extra is None else extra
        self.order = order

    def __len__(self) -> int:
        return len(self.base) + len(self.extra) if self.order is None else len(self.order)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.base.shape[1:])

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Copies of the rows at ``numbers`` of any shape s: (*s, ...). IndexError beyond the rows."""
        rows = numbers if self.order is None else np.take(self.order, numbers)
        if not len(self.extra):
            return np.take(self.base, rows, axis=0)
        late = rows >= len(self.base)
        if not late.any():
            return np.take(self.base, rows, axis=0)
        if len(self.base):
            taken = np.take(self.base, np.where(late, 0, rows), axis=0)
            taken[late] = np.take(self.extra, rows[late] - len(self.base), axis=0)
            return taken
        return np.take(self.extra, rows, axis=0)

    def part(self, part: slice) -> np.ndarray:
        """The rows ``part`` (start:stop); a view where nothing came later."""
        if self.order is None and part.stop <= len(self.base):
            return self.base[part]
        return self.take(np.arange(part.start, part.stop))


class GrowingRows:
    """The rows that came later: storage for one writer, which doubles when it is full."""

    def __init__(self, base: np.ndarray) -> None:
        self.base = np.asarray(base)
        self._storage = np.empty((0, *self.base.shape[1:]), self.base.dtype)
        self._count = 0

    def __len__(self) -> int:
        """Of both, base and later."""
        return len(self.base) + self._count

    def append(self, rows: np.ndarray) -> None:
        """Add rows (r, ...) at the end."""
        needed = self._count + len(rows)
        if needed > len(self._storage):
            # What earlier tables see stays in the old storage.
            grown = np.empty((max(needed, 2 * len(self._storage), 64), *self.base.shape[1:]), self.base.dtype)
            grown[: self._count] = self._storage[: self._count]
            self._storage = grown
        self._storage[self._count : needed] = rows
        self._count = needed

    @property
    def extra(self) -> np.ndarray:
        """The later rows so far, a view that further appending leaves as it is."""
        return self._storage[: self._count]

    def table(self, order: np.ndarray | None = None) -> RowTable:
        """All rows so far."""
        return RowTable(self.base, self.extra, order)
