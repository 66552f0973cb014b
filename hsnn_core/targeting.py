"""Targeting before pruning: the items that each user of a request may get, counted under every node.

Bitmaps say which items match (`eligibility`); those that are gone and those that the request excludes are taken out.
How many are left under a node of the base is a difference of two ranks, since its items lie side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .eligibility import Context, clear_bits
from .live_attributes import AttributeState
from .live_view import LiveView, bits_at

_CACHED = 16384  # words that are counted at once: what a core keeps close


class TargetingFilter:
    """An `item_filter.ItemFilter` over a view of an index that changes.

    ``attributes`` and ``context`` (of B users): None where the schema declares no attributes. ``excluded``: positions
    that each of the B users must not get, those of items that are not there left out.
    """

    def __init__(
        self,
        view: LiveView,
        users: int,
        attributes: AttributeState | None,
        context: Context | None,
        excluded: Sequence[np.ndarray],
    ) -> None:
        self._users = [
            _UserItems(view, attributes, context, user, np.sort(excluded[user])) for user in range(users)
        ]

    def counts(self, layer: int, users: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """See `ItemFilter`."""
        parts = [items.counts(layer, part) for items, part in self._parts(users, nodes)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def passes(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """See `ItemFilter`."""
        parts = [mine.passes(part) for mine, part in self._parts(users, items)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _parts(self, users: np.ndarray, nodes: np.ndarray) -> list[tuple[_UserItems, np.ndarray]]:
        """Each user's items with what is asked of them: a request's users stand one after the other."""
        if len(self._users) == 1:
            return [(self._users[0], nodes)]
        bounds = np.searchsorted(users, np.arange(len(self._users) + 1))
        return [(items, nodes[start:stop]) for items, start, stop in zip(self._users, bounds, bounds[1:])]

    def eligible(self) -> np.ndarray:
        """How many items each user may get: (B,) int64."""
        return np.array([items.eligible() for items in self._users], dtype=np.int64)


class _UserItems:
    """The items that one user may get: bits of the base and of what was added."""

    def __init__(
        self,
        view: LiveView,
        attributes: AttributeState | None,
        context: Context | None,
        user: int,
        excluded: np.ndarray,
    ) -> None:
        self._view = view
        self._base_items = view.base.items
        if attributes is not None and context is not None:
            base = attributes.base.matching(context, user)
            added = attributes.added.matching(context, user)
        else:
            base, added = _all_bits(self._base_items), _all_bits(len(view.added_ids))
        if view.gone is not None:
            # The byte in which the base ends holds added items' bits as well; those of `base` are 0 there.
            base &= ~view.gone[: len(base)]
            behind = np.unpackbits(view.gone[self._base_items >> 3 :], bitorder="little")
            behind = behind[self._base_items & 7 :][: len(view.added_ids)]
            added &= ~np.packbits(behind, bitorder="little")
        cut = int(np.searchsorted(excluded, self._base_items))
        clear_bits(base, excluded[:cut])
        clear_bits(added, excluded[cut:] - self._base_items)
        self._base, self._added = base, added
        self._words, self._ranks = np.empty(0, np.uint64), np.empty(0, np.int64)
        self._of_added: dict[int, np.ndarray] = {}

    def counts(self, layer: int, nodes: np.ndarray) -> np.ndarray:
        """Items under each of ``nodes`` (n,) of a layer above the items: (n,) int64."""
        ptr = self._view.base.item_ptr(layer)
        inside = np.minimum(nodes, len(ptr) - 2)
        counts = self._rank(ptr[inside + 1]) - self._rank(ptr[inside])
        counts[nodes > inside] = 0
        if len(self._added):
            counts += self._added_under(layer)[nodes]
        return counts

    def passes(self, items: np.ndarray) -> np.ndarray:
        """Whether those at positions ``items`` (n,) are among them: (n,) bool."""
        if not len(self._added):
            return bits_at(self._base, items)
        late = items >= self._base_items
        there = bits_at(self._base, np.where(late, 0, items))
        there[late] = bits_at(self._added, items[late] - self._base_items)
        return there

    def eligible(self) -> int:
        """How many items the user may get, of the base and added ones."""
        added = int(np.unpackbits(self._added).sum()) if len(self._added) else 0
        return int(self._rank(np.array([self._base_items]))[0]) + added

    def _rank(self, positions: np.ndarray) -> np.ndarray:
        """How many of the base's items before each position; (n,) int64."""
        if not len(self._ranks):
            # One word more at least, so that the position behind the last item has a rank.
            padded = np.zeros((self._base_items // 64 + 1) * 8, dtype=np.uint8)
            padded[: len(self._base)] = self._base
            self._words = padded.view("<u8")
            self._ranks = np.zeros(len(self._words) + 1, dtype=np.int64)
            for start in range(0, len(self._words), _CACHED):
                part = slice(start, start + _CACHED)
                self._ranks[1:][part] = _ones(self._words[part])
            np.cumsum(self._ranks, out=self._ranks)
        at = positions >> 6
        below = (np.uint64(1) << (positions & 63).astype(np.uint64)) - np.uint64(1)
        return self._ranks[at] + _ones(self._words[at] & below)

    def _added_under(self, layer: int) -> np.ndarray:
        """(I_l,) how many of the added items under each node."""
        if layer not in self._of_added:
            mine = np.unpackbits(self._added, bitorder="little")[: len(self._view.added_ids)].astype(bool)
            nodes = self._view.added_nodes[mine, layer - 1]
            self._of_added[layer] = np.bincount(nodes, minlength=self._view.nodes(layer))
        return self._of_added[layer]


def _ones(words: np.ndarray) -> np.ndarray:
    """How many bits of each word (n,) uint64 are set, int64: sums of 2, 4, 8 bits side by side, then of all bytes."""
    pairs, fours, bytes_ = (
        np.uint64(mask) for mask in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F)
    )
    other = words >> np.uint64(1)
    other &= pairs
    sums = words - other
    np.right_shift(sums, np.uint64(2), out=other)
    other &= fours
    sums &= fours
    sums += other
    np.right_shift(sums, np.uint64(4), out=other)
    sums += other
    sums &= bytes_
    sums *= np.uint64(0x0101010101010101)
    sums >>= np.uint64(56)
    return sums.view(np.int64)


def _all_bits(count: int) -> np.ndarray:
    bits = np.full(-(-count // 8), 255, dtype=np.uint8)
    if count & 7:
        bits[-1] = (1 << (count & 7)) - 1
    return bits
