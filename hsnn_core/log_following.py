"""From the log of item updates to an index that has them: the same steps in a server and in a compaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .bundle import Bundle, LogPosition
from .corpus import ItemTower
from .errors import DataError, FeatureError, LogError
from .features import Encoded
from .item_attributes import ItemAttributes
from .item_log import Entry, LogReader
from .item_updates import Update, item_wire_rows
from .live_index import LiveIndex, LiveState

# Entries of one change: the searches of a moment wait for none of them, but the next change waits for this one.
ENTRIES = 1000


class LogFollower:
    """Brings the live index of a bundle up to its log; for one thread, `state` for any.

    ``item_tower``: see `LiveIndex`. Raises LogError when the bundle contains updates of another log, and what
    `LiveIndex` raises.
    """

    def __init__(self, bundle: Bundle, reader: LogReader, item_tower: ItemTower) -> None:
        self._schema, self._transform = bundle.schema, bundle.transform
        self._reader, self._contained = reader, bundle.log
        self._bundle, self._tower = bundle, item_tower
        self._live = self._started()
        self._state = self._live.state
        self._identity: str | None = None
        self.unusable: list[tuple[int, str]] = []  # items whose update could not be applied, and why

    @property
    def live(self) -> LiveIndex:
        """The index."""
        return self._live

    @property
    def state(self) -> LiveState:
        """What searches read; it never goes back to fewer updates."""
        return self._state

    @property
    def log(self) -> LogPosition:
        """How much of which log is in the state."""
        return LogPosition(self.state.log_position, self._identity or self._contained.identity)

    def behind(self) -> int:
        """How many positions the log is ahead. Raises LogError and FormatError as `LogReader`."""
        return self._reader.position() - self._live.state.log_position

    def follow(self, limit: int = ENTRIES) -> int:
        """Apply at most ``limit`` entries that came since; returns how many there were.

        An update that the networks cannot use (its embedding is not finite) is left out and kept in ``unusable``: the
        item is then as if it were deleted. Raises LogError and FormatError as `LogReader`; nothing is changed then.
        After any other error the next call begins again from the bundle, while searches keep the state that they have.
        """
        if self._identity is None:
            self._identify()
        if not self._live.usable:
            self._live = self._started()
        entries = self._reader.since(self._live.state.log_position, limit)
        if entries:
            self._apply(entries)
            if self._live.state.log_position >= self._state.log_position:
                self._state = self._live.state
        return len(entries)

    def catch_up(self, progress: Callable[[int], object] | None = None) -> int:
        """Follow up to what is the newest position now, whatever comes meanwhile; returns the number of entries.
        ``progress`` is called with the position reached."""
        total, newest = 0, self._reader.position()
        while self._live.state.log_position < newest and (count := self.follow()):
            total += count
            if progress is not None:
                progress(self._live.state.log_position)
        return total

    def _started(self) -> LiveIndex:
        bundle = self._bundle
        return LiveIndex(bundle.schema, bundle.transform, bundle.corpus, self._tower, bundle.log.position)

    def _identify(self) -> None:
        identity = self._reader.identity()
        contained = self._contained
        if contained.identity is not None and identity != contained.identity:
            raise LogError(
                f"the snapshot contains the updates up to position {contained.position} of the item log "
                f"{contained.identity}, but the log here is {identity or 'empty'}; put its own log in place, or export "
                "and publish a snapshot without updates"
            )
        self._identity = identity

    def _apply(self, entries: Sequence[Entry]) -> None:
        position = entries[-1].position
        try:
            self._change(entries, position)
        except (DataError, FeatureError):
            if not self._live.usable:
                raise
            for entry in entries:
                try:
                    self._change([entry], entry.position)
                except (DataError, FeatureError) as error:
                    if not self._live.usable:
                        raise
                    self.unusable.append((entry.item, str(error)))
                    self._change([entry._replace(deleted=True)], entry.position)

    def _change(self, entries: Sequence[Entry], position: int) -> None:
        upserts = [entry.update() for entry in entries if not entry.deleted and entry.payload]
        deleted = np.array([entry.item for entry in entries if entry.deleted], dtype=np.int64)
        attributes = None
        if self._schema.has_attributes:
            rows = [update.eligibility for update in upserts]
            attributes = ItemAttributes.from_rows(self._schema, rows, [update.bid for update in upserts])
        self._live.apply(
            np.array([update.item for update in upserts], dtype=np.int64),
            self._encoded(upserts),
            attributes,
            deleted,
            position,
        )

    def _encoded(self, upserts: Sequence[Update]) -> Encoded:
        layout = self._schema.layout("item")
        if not upserts:
            return Encoded(
                np.empty((0, layout.dense_width), np.float32), np.empty((0, layout.ids_width), np.int32)
            )
        return self._transform.encode_items(item_wire_rows(self._schema, upserts))
