"""Histories over a stream: what is left of the log so far is, per user, as much as a history can show.

Histories are strict (`hsnn_train.data.history`): positives of an impression's own moment do not count. So of every
user (or session) the last L positives before its last moment are kept, and the last L of that moment, which
count for whatever comes later.

Letters: P kept positives, S impressions of a file, L longest history.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsnn_core.schema import KEY_MISSING

from .dataset import EarlierKeys
from .history import Histories


@dataclass(frozen=True)
class RecentPositives:
    """The latest positives of one task: group (P,) int64, ascending, and within a group time (P,) int64, ascending;
    item (P,) int64 raw keys. ``length``: L."""

    group: np.ndarray
    time: np.ndarray
    item: np.ndarray
    length: int

    @classmethod
    def none(cls, length: int) -> RecentPositives:
        """Before the first impression."""
        empty = np.empty(0, np.int64)
        return cls(empty, empty, empty, length)

    def with_positives(self, group: np.ndarray, time: np.ndarray, item: np.ndarray) -> RecentPositives:
        """Also these positives (R,) int64, in any order; of those of one group and time the later rows are later."""
        group = np.concatenate([self.group, group])
        time = np.concatenate([self.time, time])
        item = np.concatenate([self.item, item])
        order = np.lexsort((np.arange(len(group)), time, group))
        group, time, item = group[order], time[order], item[order]
        stop = np.searchsorted(group, group, side="right")
        after = stop - 1 - np.arange(len(group))  # positives of the group behind this one
        last = time == time[stop - 1]
        of = np.unique(group, return_inverse=True)[1]
        at_last = np.bincount(of, weights=last).astype(np.int64)[of]
        kept = after < self.length + np.where(last, 0, at_last)
        return RecentPositives(group[kept], time[kept], item[kept], self.length)

    def before(
        self, group: np.ndarray, time: np.ndarray, item: np.ndarray, positive: np.ndarray
    ) -> EarlierKeys:
        """Histories of S impressions that follow: group, time and item (S,) int64, positive (S,) bool.

        Returns (impressions (R,), L) -> keys (R, L) int64, oldest first, then KEY_MISSING.
        """
        own = np.isin(self.group, group)
        keys, code = np.unique(np.concatenate([self.item[own], item]), return_inverse=True)
        first = int(own.sum())
        histories = Histories(
            np.concatenate([self.group[own], group]),
            np.concatenate([self.time[own], time]),
            code.astype(np.int32),
            np.concatenate([np.ones(first, bool), positive]),
        )

        def earlier(rows: np.ndarray, length: int) -> np.ndarray:
            found = histories.rows(rows + first, length)
            return np.where(found < 0, KEY_MISSING, keys[found])

        return earlier
