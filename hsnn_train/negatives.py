"""Where negatives come from: items drawn by popularity, the pool that all users of a batch are scored against, and the
lists that stood before a user, whose other items are the ones the positive was chosen over.

Letters: B users, M items of the pool, L positions of a list, V items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hsnn_core.features import without_gaps, without_repeats
from hsnn_train.data.dataset import Examples


class CandidateSampler:
    """Draws items with probability proportional to popularity ** power.

    Args:
        counts: (V,) training positives per item.
        power: 0 is uniform.
        everything: draw among all items, as unlabelled pairs are, whose purpose is to show the model what the
            log's policy never showed; else among those with a training positive, as negatives are: an item
            without one may not even have existed while the log was written, and as a negative would teach
            that new items are never clicked.
    """

    def __init__(self, counts: np.ndarray, power: float, everything: bool) -> None:
        seen = np.flatnonzero(counts)
        self.rows = (np.arange(len(counts)) if everything or not len(seen) else seen).astype(np.int32)
        weight = np.maximum(counts[self.rows].astype(np.float64), 1.0) ** power
        self.share = weight / weight.sum()
        self.cumulative = np.cumsum(self.share)

    def draw(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """Item rows int32 of the given shape."""
        found = np.searchsorted(self.cumulative, rng.random(shape), side="right")
        return self.rows[np.minimum(found, len(self.rows) - 1)]


def had_appeared(
    first_time: np.ndarray | None, examples: Examples, rows: np.ndarray, items: np.ndarray
) -> np.ndarray | None:
    """(B, n) bool: whether item rows (n,) or (B, n) had appeared, by their ``first_time`` (V,), when the examples
    ``rows`` (B,) were. None without first times: everything had."""
    if first_time is None:
        return None
    exists: np.ndarray = first_time[items] <= examples.time[rows][:, None]
    return exists


@dataclass(frozen=True)
class ItemLists:
    """A user feature that lists items.

    columns: of the feature in the packed user ids; row_of_id (ids of the item space,) int32: item-table rows, -1 for
    what cannot be drawn: padding, the unknown id, items that are no negatives; draws: negatives per user.
    """

    columns: slice
    row_of_id: np.ndarray
    draws: int

    def rows(self, user_ids: np.ndarray) -> np.ndarray:
        """Packed user ids (B, S) -> (B, L) int32: the distinct rows of each list that can be drawn, -1 beyond."""
        found = self.row_of_id[without_repeats(user_ids[:, self.columns])]
        return without_gaps(found + 1) - 1

    def draw(self, lists: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """``draws`` of each list (B, L), uniform and with replacement: (B, draws) int32, -1 where a list is empty."""
        lengths = (lists >= 0).sum(1, keepdims=True)
        at = (rng.random((len(lists), self.draws)) * lengths).astype(np.int64)
        return np.take_along_axis(lists, at, axis=1)

    def log_absent(self, lists: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Log of the probability that `draw` takes none of ``items`` (M,) ascending, each for itself: (M,)."""
        lengths = (lists >= 0).sum(1)
        with np.errstate(divide="ignore"):  # the only item of a list is always drawn
            missed = self.draws * np.log1p(-1.0 / np.maximum(lengths, 1))
        at = np.searchsorted(items, lists).clip(max=len(items) - 1)
        inside = (items[at] == lists) & (lists >= 0)
        each = np.broadcast_to(missed[:, None], lists.shape)[inside]
        return np.bincount(at[inside], weights=each, minlength=len(items))


@dataclass(frozen=True)
class Pool:
    """Items that all users of a batch are scored against by their two-tower vectors.

    rows (M,) int32, ascending, item-table rows; positive (B,) int64 into them; log_inclusion (M,) float32: log of
    the probability that the item is in such a pool, the log-Q correction of a sampled softmax (0: always); allowed
    (B, M) bool: whether the item is the positive or may be a negative: it had appeared in the log at the user's time,
    and the user had not had it; None: all may. listed (B, n) int64: the
    draws from each user's own list, positions in the pool, the positive's where the list is empty; lists (B, L) int32:
    item-table rows of those lists, -1 beyond.
    """

    rows: np.ndarray
    positive: np.ndarray
    log_inclusion: np.ndarray
    allowed: np.ndarray | None
    listed: np.ndarray
    lists: np.ndarray

    def listed_draws(self, of: np.ndarray) -> np.ndarray:
        """How many of a user's draws from its list fall on pool items ``of`` (B, C) on average: (B, C) float32."""
        draws = self.listed.shape[1]
        if not draws:
            return np.zeros(of.shape, np.float32)
        inside = (self.rows[of][:, :, None] == self.lists[:, None, :]).any(-1)
        lengths = (self.lists >= 0).sum(1, keepdims=True)
        return (draws * inside / np.maximum(lengths, 1)).astype(np.float32)


class Pools:
    """Draws the pools of training batches.

    Args:
        counts: (V,) training positives per item. One without any is no negative, and in a pool for its own impression.
        size: draws by popularity per pool.
        power: see `CandidateSampler`.
        first_time: (V,) int64, where a negative has to have existed; None where the catalogue stands still.
        had: examples (B,) -> per example the item rows that its user has had, which are no negatives; None where they
            are candidates like others.
        lists: what users' own negatives are drawn from; None for nothing.
    """

    def __init__(
        self,
        counts: np.ndarray,
        size: int,
        power: float,
        first_time: np.ndarray | None = None,
        lists: ItemLists | None = None,
        had: Callable[[np.ndarray], list[np.ndarray]] | None = None,
    ) -> None:
        self.had = had
        self.sampler = CandidateSampler(counts, power, everything=False)
        self.share = np.zeros(len(counts))
        self.share[self.sampler.rows] = self.sampler.share
        self.frequency = np.maximum(counts, 1) / max(1, counts.sum())
        self.size, self.first_time, self.lists = size, first_time, lists

    def draw(self, examples: Examples, rows: np.ndarray, rng: np.random.Generator) -> Pool:
        """The items of examples ``rows`` (B,), ``size`` draws by popularity among the items with a training
        positive, or all of these where they are no more than that, and what each user's list adds."""
        own = examples.item_row[rows]
        lists = np.full((len(rows), 1), -1, np.int32)
        listed = np.empty((len(rows), 0), np.int32)
        if self.lists is not None:
            lists = self.lists.rows(examples.users.ids[rows])
            listed = self.lists.draw(lists, rng)
        seen = self.sampler.rows
        if len(seen) <= self.size:
            drawn = np.union1d(seen, own)
            log_inclusion = np.zeros(len(drawn), np.float32)
        else:
            parts = [self.sampler.draw((self.size,), rng), own, listed[listed >= 0]]
            drawn = np.unique(np.concatenate(parts))
            absent = self.size * np.log1p(-self.share[drawn]) + len(rows) * np.log1p(-self.frequency[drawn])
            if self.lists is not None:
                absent += self.lists.log_absent(lists, drawn)
            log_inclusion = np.log(-np.expm1(absent)).astype(np.float32)
        positive = np.searchsorted(drawn, own)
        allowed = had_appeared(self.first_time, examples, rows, drawn)
        chosen = self.share[drawn] > 0
        if self.had is not None or not chosen.all():
            allowed = np.ones((len(rows), len(drawn)), bool) if allowed is None else allowed
            allowed[:, ~chosen] = False
            if self.had is not None:
                items = self.had(rows)
                user, item = np.repeat(np.arange(len(rows)), list(map(len, items))), np.concatenate(items)
                place = np.searchsorted(drawn, item).clip(max=len(drawn) - 1)
                inside = drawn[place] == item
                allowed[user[inside], place[inside]] = False
            allowed[np.arange(len(rows)), positive] = True
        at = np.where(listed >= 0, np.searchsorted(drawn, listed), positive[:, None])
        return Pool(drawn, positive, log_inclusion, allowed, at, lists)
