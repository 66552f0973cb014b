"""The item-update client: upserts and deletes that are on the server's disk when a call returns."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from hsnn_core.errors import RequestError, ServerError
from hsnn_core.item_updates import REFUSED, STATUSES
from hsnn_core.schema import Schema

from .errors import Patience
from .tls import Tls, open_client

INDEX_MODEL = "hsnn_index"
BATCH, MOST = 1000, 10_000  # updates per call: the default, and what the server takes


@dataclass
class ItemResults:
    """What became of n updates, in their order.

    ``status``: "applied", "stale" (the log has this sequence number of the item, or a higher one), "refused" (it is
    not valid) or "failed" (the log cannot be written now: send it again later); ``messages``: why, empty where
    applied. ``position``: the log's, which contains what was applied: a search that has followed the log up to it sees
    it."""

    status: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    position: int = 0

    def count(self, status: str) -> int:
        """How many have this status."""
        return self.status.count(status)

    def reasons(self, *statuses: str) -> list[tuple[int, str]]:
        """Place in the list and message of every update with one of these statuses."""
        return [(n, self.messages[n]) for n, status in enumerate(self.status) if status in statuses]

    def add(self, more: ItemResults) -> None:
        """Append the results of the updates after these."""
        self.status += more.status
        self.messages += more.messages
        self.position = max(self.position, more.position)


@dataclass(frozen=True)
class LogStats:
    """The server's item log: items ``live`` and ``deleted``, its newest ``position``, ``oldest``: the position up to
    which updates may be forgotten, its ``identity`` (None before the first update), file and schema."""

    live: int
    deleted: int
    position: int
    oldest: int
    identity: str | None
    log: str
    schema_hash: str


class ItemClient:
    """Item updates over gRPC; may be shared between threads.

    >>> with ItemClient("localhost:8001") as client:
    ...     client.upsert([{"id": 17, "features": {"category": [4], "price": 2.5}, "bid": 0.7}])
    ...     client.delete([23, 42])

    ``url``: host:port. ``timeout``: seconds that the call of one batch may take, retries included. ``retries``: further
    attempts when the connection is lost or refused, which cannot apply an update twice. ``tls``: None for plain text.

    Of two updates of an item the one with the higher ``sequence`` wins, whenever it comes. One without a sequence gets
    this client's clock, in microseconds since the epoch (and more than the one before): good where one client, or
    clients with good clocks, update an item. The server refuses a clock that is minutes off. To send an update again
    after an error, without knowing whether it arrived, give it a sequence of your own.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 10.0,
        retries: int = 3,
        batch: int = BATCH,
        model: str = INDEX_MODEL,
        clock: Callable[[], int] = time.time_ns,
        tls: Tls | None = None,
    ) -> None:
        if not 1 <= batch <= MOST:
            raise RequestError(f"batch: got {batch}, expected 1..{MOST} updates in one call")
        self._url, self._timeout, self._retries = url, timeout, retries
        self._batch, self._model, self._clock = batch, model, clock
        self._grpc = open_client(InferenceServerClient, url, tls)
        self._last, self._lock = 0, Lock()

    def schema(self) -> Schema:
        """The schema of the items that the server takes."""
        patience = self._patience()
        while True:
            try:
                reply = self._grpc.get_model_config(self._model, client_timeout=patience.remaining())
            except InferenceServerException as error:
                time.sleep(patience.pause_after(error))
                continue
            if "schema" not in reply.config.parameters:
                raise ServerError(
                    f"the configuration of {self._model} lacks the parameter schema; expected the model that HSNN "
                    "publishes for item updates"
                )
            return Schema.from_json(reply.config.parameters["schema"].string_value)

    def upsert(
        self, rows: Iterable[Mapping[str, Any]], progress: Callable[[int], object] | None = None
    ) -> ItemResults:
        """Insert items or replace all that is known of them.

        A row: {"id": key, "features": {name: value}, "eligibility": {name: value}, "bid": number, "sequence": number},
        all but the id optional; {"id": key, "deleted": True} among them is a delete. A bad row is refused, the others
        are applied; see the results. ``progress`` is called with the number of rows just acknowledged. Raises
        RequestError, DeadlineExceeded or ServerError when a whole batch failed; those before it are applied.
        """
        results = ItemResults()
        rows = iter(rows)
        while batch := list(itertools.islice(rows, self._batch)):
            sent = self._send(batch)
            results.add(sent)
            if progress is not None:
                progress(len(batch))
        return results

    def delete(
        self,
        ids: Iterable[Any],
        sequence: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> ItemResults:
        """Delete items by their keys; ``sequence`` holds for all of them. Results and errors as `upsert`."""
        own = {} if sequence is None else {"sequence": sequence}
        return self.upsert(({"id": item, "deleted": True} | own for item in ids), progress)

    def stats(self) -> LogStats:
        """What the server's log holds."""
        _, _, _, stats = self._call([], None, ("status", "message", "position", "stats"))
        return LogStats(**json.loads(stats[0]))

    def close(self) -> None:
        self._grpc.close()

    def __enter__(self) -> ItemClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, rows: Sequence[Mapping[str, Any]]) -> ItemResults:
        stamped = False
        texts, unusable = [], {}
        for number, row in enumerate(rows):
            if isinstance(row, Mapping) and row.get("sequence") is None:
                row, stamped = dict(row) | {"sequence": self._stamp()}, True
            try:
                texts.append(json.dumps(row, default=_plain).encode())
            except (TypeError, ValueError) as error:
                unusable[number] = f"row {row!r:.80}: {error}; expected values that JSON can hold"
        clock = self._clock() // 1000 if stamped else None
        status, messages, position = self._call(texts, clock, ("status", "message", "position"))
        sent = zip((STATUSES[code] for code in status), (message.decode() for message in messages))
        results = ItemResults(position=int(position[0]))
        for number in range(len(rows)):
            found, message = (REFUSED, unusable[number]) if number in unusable else next(sent)
            results.status.append(found)
            results.messages.append(message)
        return results

    def _call(self, texts: list[bytes], clock: int | None, outputs: Sequence[str]) -> list[np.ndarray]:
        updates = InferInput("updates", [len(texts)], "BYTES")
        updates.set_data_from_numpy(np.array(texts, np.object_))
        patience = self._patience()
        while True:
            left = patience.remaining()
            try:
                answer = self._grpc.infer(
                    self._model,
                    [updates],
                    outputs=[InferRequestedOutput(name) for name in outputs],
                    parameters=None if clock is None else {"clock": clock},
                    client_timeout=left,
                )
            except InferenceServerException as error:
                time.sleep(patience.pause_after(error))
            else:
                return [answer.as_numpy(name) for name in outputs]

    def _stamp(self) -> int:
        with self._lock:
            self._last = max(self._last + 1, self._clock() // 1000)
            return self._last

    def _patience(self) -> Patience:
        return Patience(self._url, self._model, self._timeout, self._retries, "send fewer updates at a time")


def _plain(value: Any) -> Any:
    """What JSON cannot hold but a row may: arrays and numbers of NumPy, tuples are lists already."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{value!r:.80} ({type(value).__name__}) has no JSON form")
