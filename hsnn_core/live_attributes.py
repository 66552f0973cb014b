"""Eligibility attributes and bids of items that come and go: the base's, and those of added items."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .eligibility import AttributeBitmaps, Context
from .index import HierarchicalIndex
from .item_attributes import ItemAttributes
from .live_view import LiveView
from .row_table import GrowingRows, RowTable

# Added items whose bitmaps are built once and for all; those after the last full chunk are built per state. A multiple
# of 8, so that chunks join without shifting bits.
CHUNK = 4096


@dataclass(frozen=True, eq=False)
class AddedAttributes:
    """Attributes of E added items: ``sealed`` chunks of CHUNK, then ``rest``."""

    sealed: tuple[AttributeBitmaps, ...]
    rest: ItemAttributes | None

    @cached_property
    def _rest(self) -> AttributeBitmaps | None:
        return None if self.rest is None else AttributeBitmaps(self.rest)

    def matching(self, context: Context, user: int) -> np.ndarray:
        """(ceil(E / 8),) uint8: the added items that the user of that number may get, as `AttributeBitmaps`."""
        parts = [chunk.matching(context, user) for chunk in self.sealed]
        if self._rest is not None:
            parts.append(self._rest.matching(context, user))
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class LiveBids:
    """Logarithms of bids, a `search.Bids`: ``items`` (V+E,) float32 by position, ``nodes[l-1]`` (I_l,) float32 the
    largest of those of the live items under each node."""

    items: RowTable
    nodes: tuple[np.ndarray, ...]

    def log(self, layer: int, nodes: np.ndarray) -> np.ndarray:
        """See `search.Bids`."""
        return self.items.take(nodes) if layer > len(self.nodes) else self.nodes[layer - 1][nodes]


@dataclass(frozen=True, eq=False)
class AttributeState:
    """What searches read of the attributes, all of one moment."""

    base: AttributeBitmaps
    added: AddedAttributes
    bids: LiveBids


@dataclass
class GrowingAttributes:
    """The attributes behind the states, for one writer."""

    index: HierarchicalIndex
    base: ItemAttributes
    added: list[ItemAttributes] = field(default_factory=list)
    sealed: list[AttributeBitmaps] = field(default_factory=list)
    rest: ItemAttributes | None = None

    def __post_init__(self) -> None:
        log = np.log(self.base.bids)
        self._bids = GrowingRows(log)
        self._nodes = [
            np.maximum.reduceat(log, self.index.item_ptr(layer)[:-1]) for layer in range(1, self.index.layers)
        ]
        self._base = AttributeBitmaps(self.base)

    def append(self, added: ItemAttributes, places: np.ndarray, nodes: tuple[int, ...]) -> None:
        """n added items, their nodes (n, N-1), and the number of ``nodes`` I_l that layers have now."""
        log = np.log(added.bids)
        self._bids.append(log)
        for layer, count in enumerate(nodes):
            bounds = np.full(count, -np.inf, dtype=np.float32)
            bounds[: len(self._nodes[layer])] = self._nodes[layer]
            np.maximum.at(bounds, places[:, layer], log)
            self._nodes[layer] = bounds
        rest = added if self.rest is None else ItemAttributes.concatenate([self.rest, added])
        while len(rest) >= CHUNK:
            self.added.append(rest.take(np.arange(CHUNK)))
            self.sealed.append(AttributeBitmaps(self.added[-1]))
            rest = rest.take(np.arange(CHUNK, len(rest)))
        self.rest = rest if len(rest) else None

    def lower(self, view: LiveView, layer: int, nodes: np.ndarray, gone: np.ndarray) -> None:
        """Lower the bounds of a layer's ``nodes`` (m,) that lost the items at positions ``gone`` (m,), where one of
        these was the bound; ``view`` is without them."""
        bids = self._bids.table()
        held = np.unique(nodes[bids.take(gone) >= self._nodes[layer - 1][nodes]])
        if not len(held):
            return
        bounds = self._nodes[layer - 1].copy()
        for node in held.tolist():
            members = view.under(layer, node)
            bounds[node] = bids.take(members).max(initial=-np.inf)
        self._nodes[layer - 1] = bounds

    def whole(self) -> ItemAttributes:
        """The attributes of all items, by position."""
        rest = [] if self.rest is None else [self.rest]
        return ItemAttributes.concatenate([self.base, *self.added, *rest])

    @property
    def state(self) -> AttributeState:
        """What there is now."""
        return AttributeState(
            self._base,
            AddedAttributes(tuple(self.sealed), self.rest),
            LiveBids(self._bids.table(), tuple(self._nodes)),
        )
