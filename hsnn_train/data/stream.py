"""Impressions that arrive as files, and the tables of users and items that they refer to.

    STREAM/2026-11-26T10-00.parquet
    STREAM/2026-11-26T10-05.parquet ...      read in the order of their names

A file appears by rename, whole; hidden files and other endings are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from hsnn_core.errors import DataError
from hsnn_core.features import Encoded, FeatureTransform
from hsnn_core.item_attributes import ItemAttributes
from hsnn_core.schema import Schema

from .attributes import read_attributes
from .dataset import Examples, UserFeatures, encode_examples, item_wire, recipe_tables
from .recent import RecentPositives
from .tables import Log, LogTables, check_tables, read_table, unique_keys

ENDING = ".parquet"
Signatures = Mapping[str, tuple[int, int, int] | None]


def waiting(stream: Path, consumed: Mapping[str, object] | set[str]) -> list[str]:
    """Names of the files that are there and not yet ``consumed``, in their order. Raises DataError without a folder."""
    try:
        names = [path.name for path in stream.iterdir() if path.name.endswith(ENDING)]
    except OSError as error:
        raise DataError(
            f"stream {stream}: {error.strerror}; expected a folder into which Parquet files arrive"
        ) from error
    return sorted(name for name in names if not name.startswith(".") and name not in consumed)


def signature(path: Path) -> tuple[int, int, int] | None:
    """What differs once a file was replaced; None when it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


@dataclass(frozen=True)
class LiveTables:
    """The users and items tables of a recipe, as they were when ``read``: the signatures of their files."""

    log: LogTables
    files: Mapping[str, Path]
    read: Signatures

    @classmethod
    def of(cls, schema: Schema, data: Mapping[str, object], base: Path) -> LiveTables:
        """From a recipe's `data:` section; an adapter's tables never change. Raises DataError."""
        if "adapter" in data:
            return cls(replace(recipe_tables(schema, data, base), impressions=pa.table({})), {}, {})
        files = {name: base / str(data[name]) for name in ("users", "items") if data.get(name)}
        read = {
            name: signature(path) for name, path in files.items()
        }  # before reading: a change is seen again
        tables = {name: read_table(path, schema, name) for name, path in files.items()}
        by = data.get("history_by")
        log = LogTables(
            schema,
            pa.table({}),
            tables.get("users"),
            tables["items"],
            history_by=str(by) if by else None,
            files=tuple((name, path.name) for name, path in files.items()),
        )
        if log.users is not None:
            unique_keys(log, "users", log.users, schema.user_key)
        return cls(log, files, read)

    def now(self) -> Signatures:
        """The signatures that the files have at this moment."""
        return {name: signature(path) for name, path in self.files.items()}

    def encoded_items(
        self, transform: FeatureTransform, before: tuple[Encoded, np.ndarray]
    ) -> tuple[Encoded, np.ndarray]:
        """The items table as V encoded rows and keys (V,) int64. Features derived from the log are those that the item
        had ``before``, none for a new one. Raises DataError and FeatureError."""
        schema, table = self.log.schema, self.log.items
        where = self.log.where("items")
        if not table.num_rows:
            raise DataError(f"{where}: no rows")
        keys = unique_keys(self.log, "items", table, schema.item_key)
        items = transform.encode_items(item_wire(schema, table, where, keys))
        items_before, keys_before = before
        row, row_before = np.intersect1d(keys, keys_before, return_indices=True)[1:]
        for slot in schema.layout("item").slots:
            if slot.feature.derive_from is not None:
                items.ids[row, slot.start : slot.stop] = items_before.ids[row_before, slot.start : slot.stop]
        return items, keys

    def item_attributes(self) -> ItemAttributes | None:
        """Eligibility and bids by row of the items table; None when the schema declares none. Raises DataError."""
        return read_attributes(self.log.schema, self.log.items, self.log.where("items"))

    def with_impressions(self, path: Path) -> tuple[Log, int] | None:
        """The checked impressions of a file, and how many were left out because the items table lacks their item; None
        when the file has no rows.

        Raises DataError, and what pyarrow does for some damages: OSError, ArrowException.
        """
        impressions = read_table(path, self.log.schema, "impressions")
        if not impressions.num_rows:
            return None
        files = tuple(pair for pair in self.log.files if pair[0] != "impressions")
        log = check_tables(
            LogTables(
                self.log.schema, impressions, self.log.users, self.log.items, "drop", self.log.history_by,
                (*files, ("impressions", path.name)),
            )
        )  # fmt: skip
        return log, impressions.num_rows - len(log.time)


@dataclass(frozen=True)
class StreamItems:
    """The items table as it was read last.

    items: V encoded rows; item_keys (V,) int64; item_counts (V,) int64: positives of `Schema.drawn_task` so far;
    attributes: eligibility and bids, None where the schema declares none; folds: none, for what the lists of
    neighbours were made of ended before the stream began.
    """

    schema: Schema
    transform: FeatureTransform
    items: Encoded
    item_keys: np.ndarray
    item_counts: np.ndarray
    attributes: ItemAttributes | None
    folds: tuple[Encoded, ...] = ()

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What a snapshot is made of, by name."""
        arrays = {"dense": self.items.dense, "ids": self.items.ids, "item_ids": self.item_keys}
        return arrays | ({} if self.attributes is None else self.attributes.to_arrays())


@dataclass(frozen=True)
class Impressions:
    """A file that can be learnt from: its checked log, the examples in order of time, how many rows were left out,
    and raw wire tensors of its last users."""

    name: str
    log: Log
    examples: Examples
    dropped: int
    users: dict[str, np.ndarray]


def read_examples(
    log: Log, transform: FeatureTransform, recent: Mapping[int, RecentPositives]
) -> tuple[Examples, dict[str, np.ndarray]]:
    """The impressions of a log in order of time, with histories that begin with ``recent`` (by number of the task); and
    raw wire tensors of the last 64 users, by feature name. Raises DataError and FeatureError."""
    schema = log.tables.schema
    keys = log.item_keys[log.item_row]
    users = UserFeatures(
        schema, log, lambda task: recent[task].before(log.group, log.time, keys, log.labels[:, task] > 0)
    )
    order = np.argsort(log.time, kind="stable")
    return encode_examples(transform, users, log, order, None), users.raw(order[-64:])


def history_tasks(schema: Schema) -> dict[int, int]:
    """Number of each task that user features are derived from -> the longest history."""
    names = [task.name for task in schema.tasks]
    found: dict[int, int] = {}
    for feature in schema.user_features:
        if feature.derive_from is not None:
            task = names.index(feature.derive_from)
            found[task] = max(feature.length, found.get(task, 0))
    return found


def extended(recent: Mapping[int, RecentPositives], log: Log) -> dict[int, RecentPositives]:
    """``recent`` with the positives of a log."""
    found = {}
    for task, positives in recent.items():
        hit = log.labels[:, task] > 0
        keys = log.item_keys[log.item_row[hit]]
        found[task] = positives.with_positives(log.group[hit], log.time[hit], keys)
    return found
