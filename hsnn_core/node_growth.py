"""The nodes of one layer as they grow: which there are, under which parents, how many live items each holds."""

from __future__ import annotations

import numpy as np

from .index import HierarchicalIndex
from .live_view import Additions
from .row_table import GrowingRows


class NodeGrowth:
    """The nodes of a layer above the items: the base's, then new ones.

    ``live`` (I_l,) int32 live items; ``representative`` (I_l,) int32 position, -1 for none; ``parents`` (new nodes,)
    int32, of layer 1 zeros; ``codes``: rows (I_l, l) of their paths; ``additions``: what came under them since. Arrays
    are replaced, never changed: readers hold them.
    """

    def __init__(self, base: HierarchicalIndex, layer: int) -> None:
        self._base, self._layer = base, layer
        self.base_nodes = base.nodes(layer)
        self.live = base.occupancy(layer).astype(np.int32)
        self.representative = np.array(base.representatives(layer), dtype=np.int32)
        self.parents = np.empty(0, dtype=np.int32)
        self.codes = GrowingRows(base.codes[layer - 1])
        none = np.empty(0, dtype=np.int64)
        self.additions = Additions(none, none)
        self._made: dict[tuple[int, int], int] = {}

    def find_or_make(self, parents: np.ndarray, paths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nodes (n,) under ``parents`` (n,) (of layer 1: zeros) with ``paths`` (n, l), and those that had to be
        made."""
        nodes = np.empty(len(paths), dtype=np.int64)
        made: list[int] = []
        for row, (parent, path) in enumerate(zip(parents.tolist(), paths)):
            code = int(path[-1])
            node = self._in_base(parent, code)
            if node < 0:
                node = self._made.get((parent, code), -1)
            if node < 0:
                node = self._made[parent, code] = self.base_nodes + len(self.parents) + len(made)
                made.append(row)
            nodes[row] = node
        if made:
            self.codes.append(paths[made])
            self.parents = np.concatenate([self.parents, parents[made].astype(np.int32)])
            self.live = np.concatenate([self.live, np.zeros(len(made), dtype=np.int32)])
            self.representative = np.concatenate(
                [self.representative, np.full(len(made), -1, dtype=np.int32)]
            )
        return nodes, nodes[made]

    def adopt(self, nodes: np.ndarray, children: np.ndarray) -> None:
        """``children`` (n,), new nodes of the layer below or positions, came under ``nodes`` (n,)."""
        if len(nodes):
            self.additions = self.additions.with_more(nodes.astype(np.int64), children.astype(np.int64))

    def count(self, gained: np.ndarray, lost: np.ndarray) -> None:
        """Nodes ``gained`` (n,) and ``lost`` (m,) an item each time they are named."""
        live = self.live.copy()
        np.add.at(live, gained, 1)
        np.subtract.at(live, lost, 1)
        self.live = live

    def _in_base(self, parent: int, code: int) -> int:
        """The base's node under a parent with that code; -1 when there is none."""
        codes = self._base.codes[self._layer - 1]
        if self._layer == 1:
            first, stop = 0, len(codes)
        elif parent >= self._base.nodes(self._layer - 1):
            return -1
        else:
            first, stop = self._base.child_ptr[self._layer - 2][parent : parent + 2]
        # A node's children are in order of their codes.
        at = first + int(np.searchsorted(codes[first:stop, -1], code))
        return int(at) if at < stop and codes[at, -1] == code else -1
