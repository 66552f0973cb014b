"""What the orchestrator needs of the items that it serves; see `item_follower`."""

from __future__ import annotations

from typing import Protocol

from hsnn_core.live_index import LiveState


class Items(Protocol):
    """``state``: the items of this moment; ``behind``: positions by which the item log is ahead, -1 when unknown."""

    @property
    def state(self) -> LiveState: ...

    @property
    def behind(self) -> int: ...
