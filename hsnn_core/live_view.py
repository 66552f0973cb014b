"""An index whose items change, as one search sees it: the immutable base, and what came and went since.

A view never changes. The next one shares with it whatever did not: added rows are appended behind what this one can
see, and the small arrays that change (one number per node) are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .index import HierarchicalIndex, slices
from .place_table import Places


@dataclass(frozen=True, eq=False)
class Additions:
    """Children that nodes of a layer got since the base: ``parents`` (n,) ascending, ``children`` (n,) int64, ascending
    under each parent."""

    parents: np.ndarray
    children: np.ndarray

    def with_more(self, parents: np.ndarray, children: np.ndarray) -> Additions:
        """With (m,) more, whose children's numbers lie above all that are there."""
        order = np.argsort(parents, kind="stable")
        parents, children = parents[order], children[order]
        at = np.searchsorted(self.parents, parents, side="right")
        return Additions(np.insert(self.parents, at, parents), np.insert(self.children, at, children))


@dataclass(frozen=True, eq=False)
class LiveView:
    """A `search.SearchIndex` of V base items and E added ones, some of them gone.

    Positions 0..V-1 are the base's, V..V+E-1 the added ones'; the nodes of a layer above the items are the base's,
    then new ones. A node without a live item, and a position whose item is gone, is no candidate.

    ``by_id``              (V,) int64: the base's positions in ascending order of item id.
    ``added_ids``          (E,) int64.
    ``added_places``       of the ids that were added: their positions, -1 when deleted.
    ``added_nodes``        (E, N-1) int32: their nodes at each layer above the items.
    ``gone``               (ceil((V+E)/8),) uint8, one bit per position, the first the lowest; None: nothing is gone.
    ``live``               for l = 1..N-1 (I_l,) int32: live items under each node.
    ``additions``          for l = 2..N: the nodes of layer l that came since, by their node of layer l-1.
    ``representative``     for l = 1..N-1 (I_l,) int32: position.
    ``new_parents``        for l = 1..N-1: the node of layer l-1 above each node that came since (of layer 1: zeros).
    """

    base: HierarchicalIndex
    by_id: np.ndarray
    added_ids: np.ndarray
    added_places: Places
    added_nodes: np.ndarray
    gone: np.ndarray | None
    live: tuple[np.ndarray, ...]
    additions: tuple[Additions, ...]
    representative: tuple[np.ndarray, ...]
    new_parents: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, base: HierarchicalIndex, by_id: np.ndarray) -> LiveView:
        """The base with nothing changed."""
        above = range(1, base.layers)
        none = np.empty(0, dtype=np.int64)
        return cls(
            base,
            by_id,
            none,
            Places(),
            np.empty((0, base.layers - 1), dtype=np.int32),
            None,
            tuple(base.occupancy(layer).astype(np.int32) for layer in above),
            tuple(Additions(none, none) for _ in above),
            tuple(np.array(base.representatives(layer)) for layer in above),
            tuple(none.astype(np.int32) for _ in above),
        )

    @property
    def layers(self) -> int:
        """N."""
        return self.base.layers

    @property
    def items(self) -> int:
        """V + E, those that are gone included."""
        return self.base.items + len(self.added_ids)

    @cached_property
    def live_items(self) -> int:
        """Items that can be found."""
        if self.live:  # a thousand numbers, where the bits are as many as items
            return int(self.live[0].sum())
        return self.items - (0 if self.gone is None else int(np.unpackbits(self.gone).sum()))

    def nodes(self, layer: int) -> int:
        """I_l, those without a live item included."""
        return self.items if layer == self.layers else len(self.live[layer - 1])

    def children(self, layer: int, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `HierarchicalIndex.children`."""
        base, more = self.base.child_ptr[layer - 2], self.additions[layer - 2]
        inside = np.minimum(nodes, len(base) - 2)
        first = base[inside]
        counts = np.where(nodes < len(base) - 1, base[inside + 1] - first, 0)
        if not len(more.parents):
            return slices(first, counts)
        late = np.searchsorted(more.parents, nodes)
        late_counts = np.searchsorted(more.parents, nodes, side="right") - late
        both = counts + late_counts
        begin = both.cumsum() - both
        children = np.empty(both.sum(), dtype=np.int64)
        numbers, parent = slices(first, counts)
        children[numbers + (begin - first)[parent]] = numbers
        numbers, parent = slices(late, late_counts)
        children[numbers + (begin + counts - late)[parent]] = more.children[numbers]
        return children, np.repeat(np.arange(len(nodes)), both)

    def parents(self, layer: int) -> np.ndarray:
        """(I_l,) int32 node of layer l-1 above each node of layer l > 1."""
        added = self.added_nodes[:, -1] if layer == self.layers else self.new_parents[layer - 1]
        return np.concatenate([self.base.parents(layer), added])

    def present(self, layer: int, nodes: np.ndarray) -> np.ndarray | None:
        """Which of ``nodes`` (any shape) hold a live item; None when all do."""
        if layer < self.layers:
            there: np.ndarray = self.live[layer - 1][nodes] > 0
            return None if there.all() else there
        return None if self.gone is None else ~bits_at(self.gone, nodes)

    def counts(self, layer: int, nodes: np.ndarray) -> np.ndarray:
        """Number of live items under each of ``nodes`` (any shape), int64."""
        if layer < self.layers:
            return self.live[layer - 1][nodes].astype(np.int64)
        there = self.present(layer, nodes)
        return np.ones(nodes.shape, dtype=np.int64) if there is None else there.astype(np.int64)

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """Item ids, int64, at positions of any shape."""
        late = positions >= self.base.items
        if not late.any():
            return self.base.item_ids[positions]
        ids = self.base.item_ids[np.where(late, 0, positions)]
        ids[late] = self.added_ids[positions[late] - self.base.items]
        return ids

    def find(self, item_ids: np.ndarray) -> np.ndarray:
        """Positions of those of ``item_ids`` (n,) int64 that are live, in no order."""
        # Steps of a binary search over mapped files touch few pages; a table of all ids would be read whole.
        at = np.searchsorted(self.base.item_ids, item_ids, sorter=self.by_id)
        base = self.by_id[np.minimum(at, len(self.by_id) - 1)]
        base = base[self.base.item_ids[base] == item_ids]
        if self.gone is not None:
            base = base[~bits_at(self.gone, base)]
        added = self.added_places.take(item_ids)
        return np.concatenate([base, added[added >= 0]])

    def under(self, layer: int, node: int) -> np.ndarray:
        """(n,) positions of the live items under a node of a layer above the items."""
        numbers = np.array([node], dtype=np.int64)
        for below in range(layer + 1, self.layers + 1):
            numbers, _ = self.children(below, numbers)
        return numbers if self.gone is None else numbers[~bits_at(self.gone, numbers)]

    def node_of(self, layer: int, positions: np.ndarray) -> np.ndarray:
        """See `HierarchicalIndex.node_of`."""
        if layer == self.layers:
            return positions.astype(np.int64)
        late = positions >= self.base.items
        nodes = self.base.node_of(layer, np.where(late, 0, positions))
        nodes[late] = self.added_nodes[positions[late] - self.base.items, layer - 1]
        return nodes

    def representatives(self, layer: int) -> np.ndarray:
        """(I_l,) position of the item whose features stand for each node; an item stands for itself."""
        return self._every_position if layer == self.layers else self.representative[layer - 1]

    @cached_property
    def _every_position(self) -> np.ndarray:
        return np.arange(self.items, dtype=np.int32)


def bits_at(packed: np.ndarray, places: np.ndarray) -> np.ndarray:
    """bool of the shape of ``places``: the bits there of ``packed`` (n,) uint8, lowest first."""
    bits: np.ndarray = (packed.take(places >> 3) >> (places.astype(np.uint8) & 7)) & 1
    return bits.view(bool)


def with_bits(packed: np.ndarray | None, size: int, places: Sequence[int] | np.ndarray) -> np.ndarray:
    """A copy of ``packed`` of ``size`` bits with those at ``places`` set."""
    copy = np.zeros(-(-size // 8), dtype=np.uint8)
    if packed is not None:
        copy[: len(packed)] = packed
    places = np.asarray(places, dtype=np.int64)
    np.bitwise_or.at(copy, places >> 3, (1 << (places & 7)).astype(np.uint8))
    return copy
