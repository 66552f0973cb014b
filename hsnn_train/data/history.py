"""Histories: for every impression, the items of the same user's earlier positives.

"Earlier" is strict: positives at the impression's own time, the impression itself among them, never count, so
no row can see its own label or that of a row logged with it.

A log without any order (Gowalla's) has sets: the history of a train impression is then the user's other train
positives. They stand in an order drawn once, since rows may be sorted by what they are to predict; where there are more
than a history holds, it has those before the impression's own place, going round, so that every impression shows
others. What is shown keeps the drawn order: begun at the impression's own place it would tell which one is missing.
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
        of_others: (S,) bool, the impressions whose history is the other positives of their own time; None: of none.

    Example:
        >>> h = Histories(np.zeros(3), np.array([5, 6, 7]), np.array([30, 10, 20]), np.ones(3, bool))
        >>> h.rows(np.arange(3), 2).tolist()
        [[-1, -1], [30, -1], [30, 10]]
    """

    def __init__(
        self,
        group: np.ndarray,
        time: np.ndarray,
        item_row: np.ndarray,
        positive: np.ndarray,
        of_others: np.ndarray | None = None,
    ) -> None:
        self.sets = of_others is not None
        places = np.random.default_rng(0).permutation(len(group)) if self.sets else np.arange(len(group))
        order = np.lexsort((places, time, group))
        sorted_group, sorted_time = group[order], time[order]
        hit = positive[order]
        before = np.concatenate([[0], np.cumsum(hit)])  # (S + 1,) positives before each place in the order
        new_group = np.ones(len(order), bool)
        new_group[1:] = sorted_group[1:] != sorted_group[:-1]
        new_moment = new_group.copy()
        new_moment[1:] |= sorted_time[1:] != sorted_time[:-1]
        self.items = item_row[order][hit].astype(np.int32)
        # A history is `count` places of the `cycle` from `begin` on, the first of them `turn` places along.
        self.begin, self.count, self.turn, self.cycle = np.zeros((4, len(order)), np.int64)
        moment = before[_start_of(new_moment)]
        self.begin[order] = before[_start_of(new_group)]
        self.count[order] = moment - before[_start_of(new_group)]
        self.cycle[order] = moment - before[_start_of(new_group)]
        if of_others is not None:
            stop = before[_end_of(new_moment)]
            for own, sorted_values in (
                (self.begin, moment),
                (self.count, stop - moment - hit),
                (self.turn, before[:-1] - moment + hit),
                (self.cycle, stop - moment),
            ):
                values = np.empty(len(order), np.int64)
                values[order] = sorted_values
                own[of_others] = values[of_others]

    def rows(self, impressions: np.ndarray, length: int) -> np.ndarray:
        """Item rows (R, length) int32 of the last ``length`` positives of the history, oldest first, then -1; of a set,
        in the order drawn."""
        if not len(self.items):
            return np.full((len(impressions), length), -1, np.int32)
        count = self.count[impressions][:, None]
        along = np.arange(length)  # (R, length) from here on
        place = self.turn[impressions][:, None] + np.maximum(count - length, 0) + along
        place = self.begin[impressions][:, None] + place % np.maximum(self.cycle[impressions], 1)[:, None]
        if self.sets:
            place = np.sort(np.where(along < count, place, len(self.items)), axis=1)
        found = self.items[np.minimum(place, len(self.items) - 1)]
        return np.where(along < count, found, np.int32(-1))

    def whole(self, impressions: np.ndarray) -> list[np.ndarray]:
        """Per impression (R,) the int32 item rows of its whole history, oldest first."""
        return [self.rows(np.array([row]), int(self.count[row]))[0] for row in impressions]


def _start_of(new: np.ndarray) -> np.ndarray:
    """For every place the place at which its run began."""
    return np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))


def _end_of(new: np.ndarray) -> np.ndarray:
    """For every place the place after the end of its run."""
    starts = np.flatnonzero(new)
    return np.repeat(np.append(starts[1:], len(new)), np.diff(np.append(starts, len(new))))
