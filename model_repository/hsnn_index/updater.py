"""One call of item updates, from JSON to what became of each; knows nothing of Triton."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from log_owner import LogOwner, this_server

from hsnn_core.errors import FeatureError, FormatError, HsnnError, LogError, RequestError
from hsnn_core.item_log import ItemLog, LogReader
from hsnn_core.item_updates import APPLIED, FAILED, REFUSED, STALE, Update, parse_update
from hsnn_core.schema import Schema

MAX_UPDATES = 10_000
MAX_CLOCK_SECONDS = 300.0


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of n updates: ``status`` n of STATUSES; ``messages`` n texts, empty where applied; ``position``: of
    the log after them, 0 when it cannot be opened."""

    status: list[str]
    messages: list[str]
    position: int


class Updater:
    """Writes updates to one log. Opens it with the first call, and tries again with every call until it can: a server
    whose log is taken, full or missing serves retrieval all the same."""

    def __init__(self, path: Path, schema: Schema, clock: Callable[[], float] = time.time) -> None:
        self._path, self._schema, self._clock = path, schema, clock
        self._server = this_server()
        self._reader = LogReader(path, schema.hash)
        self._owner: LogOwner | None = None
        self._log: ItemLog | None = None

    def apply(self, texts: Sequence[bytes], client_clock: int | None = None) -> Outcome:
        """Apply the updates that are valid, in their order, and say what is wrong with the others.

        ``client_clock``: microseconds since the epoch at the client, where sequences come from its clock. RequestError,
        and nothing is applied, when there are more than MAX_UPDATES or that clock is far off."""
        if len(texts) > MAX_UPDATES:
            raise RequestError(
                f"updates: got {len(texts)}, expected at most {MAX_UPDATES} in one call; split them"
            )
        self._check_clock(client_clock)
        status = [REFUSED] * len(texts)
        messages = [""] * len(texts)
        valid: dict[int, Update] = {}
        for number, text in enumerate(texts):
            try:
                valid[number] = parse_update(self._schema, text)
            except FeatureError as error:
                messages[number] = str(error)
        try:
            appended = self._opened().append(valid.values())
        except (LogError, FormatError) as error:
            for number in valid:
                status[number], messages[number] = FAILED, str(error)
            return Outcome(status, messages, self._position())
        for (number, update), applied, known in zip(valid.items(), appended.applied, appended.sequences):
            status[number] = APPLIED if applied else STALE
            if not applied:
                messages[number] = (
                    f"item {update.item}: sequence {update.sequence} is in the log already"
                    if known == update.sequence
                    else f"item {update.item}: sequence {update.sequence} is older than {known}, which the log has"
                )
        return Outcome(status, messages, appended.position)

    def stats(self) -> dict[str, Any]:
        """The log's facts: path, identity, schema_hash, position, oldest, live and deleted items. Raises LogError or
        FormatError when it cannot be read."""
        counts = self._reader.counts()
        return {
            "log": str(self._path),
            "identity": self._reader.identity(),
            "schema_hash": self._schema.hash,
            "position": self._reader.position(),
            "oldest": self._reader.oldest(),
            "live": counts.live,
            "deleted": counts.deleted,
        }

    def open(self) -> None:
        """Open the log now. Raises LogError or FormatError, which every `apply` will give as its reason."""
        self._opened()

    def close(self) -> None:
        """Give the log back, for another server to write."""
        self._reader.close()
        if self._log is not None:
            self._log.close()
        if self._owner is not None:
            self._owner.release()

    def _opened(self) -> ItemLog:
        if self._owner is None:
            self._owner = LogOwner.claim(self._path, self._server)
        if self._log is None:
            self._log = ItemLog.open(self._path, self._schema.hash)
        return self._log

    def _position(self) -> int:
        try:
            return self._reader.position()
        except HsnnError:
            return 0

    def _check_clock(self, client_clock: int | None) -> None:
        if client_clock is None:
            return
        ahead = client_clock / 1e6 - self._clock()
        if abs(ahead) > MAX_CLOCK_SECONDS:
            raise RequestError(
                f"clock: the client's is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this server's, and "
                f"its sequences come from it; expected at most {MAX_CLOCK_SECONDS:.0f} s: set it right, or send "
                "sequences of your own"
            )
