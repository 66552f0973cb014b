"""Histories: for every impression, the items of the same user's earlier positives.

"Earlier" is strict: positives at the impression's own time, the impression itself among them, never count, so
no row can see its own label or that of a row logged with it.
"""

from __future__ import annotations

import numpy as np


class Histories:
    """The earlier positives of S impressions, kept as one list and two pointers per impression.

    Args:
        group: (S,) int64, whose positives count (the user, or a session).
        time: (S,) int64.
        item_row: (S,) int32.
        positive: (S,) bool.

    Example:
        >>> h = Histories(np.zeros(3), np.array([5, 6, 7]), np.array([30, 10, 20]), np.ones(3, bool))
        >>> h.rows(np.arange(3), 2).tolist()
        [[-1, -1], [30, -1], [30, 10]]
    """

    def __init__(
        self, group: np.ndarray, time: np.ndarray, item_row: np.ndarray, positive: np.ndarray
    ) -> None:
        order = np.lexsort((np.arange(len(group)), time, group))
        sorted_group, sorted_time = group[order], time[order]
        hit = positive[order]
        before = np.concatenate([[0], np.cumsum(hit)])  # (S + 1,) positives before each place in the order
        new_group = np.ones(len(order), bool)
        new_group[1:] = sorted_group[1:] != sorted_group[:-1]
        new_moment = new_group.copy()
        new_moment[1:] |= sorted_time[1:] != sorted_time[:-1]
        self.items = item_row[order][hit].astype(np.int32)
        self.begin = np.empty(len(order), np.int64)
        self.end = np.empty(len(order), np.int64)
        self.begin[order] = before[_start_of(new_group)]
        self.end[order] = before[_start_of(new_moment)]

    def rows(self, impressions: np.ndarray, length: int) -> np.ndarray:
        """Item rows (R, length) int32 of the last ``length`` earlier positives, oldest first, then -1."""
        end = self.end[impressions]
        begin = np.maximum(self.begin[impressions], end - length)
        place = begin[:, None] + np.arange(length)  # (R, length)
        if not len(self.items):
            return np.full(place.shape, -1, np.int32)
        found = self.items[np.minimum(place, len(self.items) - 1)]
        return np.where(place < end[:, None], found, np.int32(-1))

    def whole(self, impressions: np.ndarray) -> list[np.ndarray]:
        """Per impression (R,) the int32 item rows of all earlier positives, oldest first."""
        return [self.items[self.begin[row] : self.end[row]] for row in impressions]


def _start_of(new: np.ndarray) -> np.ndarray:
    """For every place the place at which its run began."""
    return np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))
