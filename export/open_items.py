"""What a request without context may get, so that a server's answers to such requests compare with a search offline."""

from __future__ import annotations

import time

import numpy as np

from hsnn_core.bundle import Bundle
from hsnn_core.eligibility import AttributeBitmaps, Context
from hsnn_core.item_filter import MaskFilter
from hsnn_core.live_attributes import GrowingAttributes
from hsnn_core.live_view import LiveView
from hsnn_core.targeting import TargetingFilter


def open_items(bundle: Bundle) -> np.ndarray | None:
    """(V,) bool by position, as of now; None where the schema restricts nothing."""
    if bundle.attributes is None:
        return None
    context = Context.from_wire(bundle.schema, {}, users=1, now=time.time())
    bits = AttributeBitmaps(bundle.attributes).matching(context, 0)
    return np.unpackbits(bits, count=bundle.index.items, bitorder="little").astype(bool)


def open_filter(bundle: Bundle) -> MaskFilter | None:
    """`open_items` for the search of one user."""
    mask = open_items(bundle)
    return None if mask is None else MaskFilter(bundle.index, mask[None])


class OpenTargeting:
    """The same as the orchestrator does it, for every request anew, so that it costs what it costs there."""

    def __init__(self, bundle: Bundle) -> None:
        self._schema = bundle.schema
        self._attributes = (
            None if bundle.attributes is None else GrowingAttributes(bundle.index, bundle.attributes).state
        )
        self._view = LiveView.of(bundle.index, np.argsort(bundle.index.item_ids, kind="stable"))

    def filter(self, users: int) -> TargetingFilter | None:
        """Of a request of B ``users``; None where the schema restricts nothing."""
        if self._attributes is None:
            return None
        context = Context.from_wire(self._schema, {}, users, time.time())
        return TargetingFilter(self._view, users, self._attributes, context, [np.empty(0, np.int64)] * users)
