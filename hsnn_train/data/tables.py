"""The three tables of a log, impressions, users and items, read from files and checked.

Parquet, CSV and JSON lines. In CSV a feature of several values is written `a|b|c`, an empty field is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from hsnn_core.errors import DataError
from hsnn_core.schema import Schema

from .columns import column, is_text, keys_of, labels_of, times_of

TABLES = ("impressions", "users", "items")
UNKNOWN_ITEMS = ("refuse", "drop")
SIMULATED = b"hsnn.simulated"  # key in a table's metadata: every figure made from it is labelled so


@dataclass(frozen=True)
class LogTables:
    """Impressions, users (optional) and items under one schema, with columns named as in the schema.

    A user's feature is a column of the impressions when it is there, else of the users.

    Attributes:
        unknown_items: what happens to impressions of items that the items table lacks, "refuse" or "drop".
        history_by: column of the impressions within which histories are kept (a session); None: the user.
        files: what each table is called in errors.
        notes: what a person should know about how the tables were made.
        unordered: a user's impressions are a set: neither time nor the order of rows says which came first.
    """

    schema: Schema
    impressions: pa.Table
    users: pa.Table | None
    items: pa.Table
    unknown_items: str = "refuse"
    history_by: str | None = None
    files: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    unordered: bool = False

    def where(self, table: str) -> str:
        """The table as errors name it."""
        file = dict(self.files).get(table)
        return f"{table} ({file})" if file else table

    @property
    def simulated(self) -> bool:
        """Whether the impressions come from a simulation."""
        return SIMULATED in (self.impressions.schema.metadata or {})


@dataclass(frozen=True)
class Log:
    """Checked numbers of the tables: S impressions, V items.

    user_key (S,) int64; user_row (S,) int32 row of the users table, -1 when the user is not there; item_row
    (S,) int32; labels (S, T) float32; time (S,) int64, the row number without a time key; group (S,) int64,
    within which histories are kept; item_keys (V,) int64 in table order. ``tables`` holds just these
    impressions.
    """

    tables: LogTables
    user_key: np.ndarray
    user_row: np.ndarray
    item_row: np.ndarray
    labels: np.ndarray
    time: np.ndarray
    group: np.ndarray
    item_keys: np.ndarray


def load_tables(
    schema: Schema,
    paths: Mapping[str, Path],
    unknown_items: str = "refuse",
    history_by: str | None = None,
) -> LogTables:
    """The tables in files: ``paths`` has impressions, items and, when there is one, users.

    The ending says the format: .parquet, .csv, .jsonl (or .json, .ndjson). Raises DataError.
    """
    for name in paths:
        if name not in TABLES:
            raise DataError(f"data.{name}: unknown table, expected {', '.join(TABLES)}")
    for name in ("impressions", "items"):
        if name not in paths:
            raise DataError(f"data.{name}: missing; expected the path of a Parquet, CSV or JSONL file")
    read = {name: read_table(path, schema, name) for name, path in paths.items()}
    return LogTables(
        schema,
        read["impressions"],
        read.get("users"),
        read["items"],
        unknown_items,
        history_by,
        tuple((name, Path(path).name) for name, path in paths.items()),
    )


def read_table(path: Path, schema: Schema, name: str) -> pa.Table:
    """One table. Raises DataError when the file is absent, has an unknown ending or cannot be parsed."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{name}: no such file: {path}")
    try:
        reading = {".parquet": pyarrow.parquet.read_table, ".csv": lambda file: _read_csv(file, schema)}
        reading |= dict.fromkeys((".jsonl", ".json", ".ndjson"), pyarrow.json.read_json)
        if path.suffix in reading:
            table = reading[path.suffix](path)
            table.validate(full=True)  # texts that are no UTF-8, offsets that lead out of their column
            _ = table.column_names  # decoded when they are asked for
            return table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # damaged Parquet is an OSError
        raise DataError(f"{name} ({path.name}): cannot be read as {path.suffix[1:]}: {error}") from None
    raise DataError(
        f"{name} ({path.name}): got a file ending in {path.suffix!r}, expected .parquet, .csv or .jsonl"
    )


def _read_csv(path: Path, schema: Schema) -> pa.Table:
    """CSV has neither types nor lists: both are taken from the schema."""
    types = {f.name: pa.string() for f in schema.features if f.type == "string" or max(f.length, f.dim) > 1}
    if any(f.encoding == "item" and f.type == "string" for f in schema.features):
        types[schema.item_key] = pa.string()
    several = {a.name: a for a in schema.eligibility if a.kind == "set" and a.max > 1}
    types |= {a.name: pa.string() for a in schema.eligibility if a.type == "string" or a.name in several}
    # Only the empty field is null: "NaN" is an error to report and "NA" a country.
    options = pyarrow.csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True)
    table = pyarrow.csv.read_csv(path, convert_options=options)
    for feature in schema.features:
        if max(feature.length, feature.dim) > 1 and feature.name in table.column_names:
            lists = pc.split_pattern(table.column(feature.name), "|")
            number = pa.float64() if feature.kind == "dense" else pa.int64()
            if feature.kind == "dense" or feature.type == "int":
                lists = lists.cast(pa.list_(number))
            table = table.set_column(table.column_names.index(feature.name), feature.name, lists)
    for name, attribute in several.items():
        if name in table.column_names and pa.types.is_string(table.schema.field(name).type):
            lists = pc.split_pattern(table.column(name), "|")
            lists = lists.cast(pa.list_(pa.int64())) if attribute.type == "int" else lists
            table = table.set_column(table.column_names.index(name), name, lists)
    return table


def check_tables(tables: LogTables) -> Log:
    """Everything that keys, labels and times must be. Raises DataError; drops what ``unknown_items`` says."""
    schema = tables.schema
    if tables.unknown_items not in UNKNOWN_ITEMS:
        raise DataError(f"data.unknown_items: got {tables.unknown_items!r}, expected refuse or drop")
    for name, table in (("impressions", tables.impressions), ("items", tables.items)):
        if not table.num_rows:
            raise DataError(f"{tables.where(name)}: no rows")
    item_keys = unique_keys(tables, "items", tables.items, schema.item_key)
    wanted = _key_column(tables, "impressions", schema.item_key)
    item_row = find_rows(item_keys, wanted)
    if (item_row < 0).any():
        tables, item_row = _unknown_items(tables, item_row)
    impressions, where = tables.impressions, tables.where("impressions")
    user_key = _key_column(tables, "impressions", schema.user_key)
    labels = [
        labels_of(column(impressions, t.name, where, f"label of task {t.name}"), t.name, where)
        for t in schema.tasks
    ]
    _check_given(schema, labels, where)
    if schema.time_key is None:
        time = np.arange(len(user_key), dtype=np.int64)
    else:
        time = times_of(column(impressions, schema.time_key, where, "keys.time"), schema.time_key, where)
    group = user_key
    if tables.history_by is not None:
        by = column(impressions, tables.history_by, where, "data.history_by")
        group = keys_of(by, tables.history_by, where)
    user_row = _user_rows(tables, user_key)
    return Log(tables, user_key, user_row, item_row, np.stack(labels, axis=1), time, group, item_keys)


def _check_given(schema: Schema, labels: list[np.ndarray], where: str) -> None:
    """DataError where a label is 1 without the one that it is given."""
    for task, own, place in zip(schema.tasks, labels, schema.given):
        if place < 0:
            continue
        alone = np.flatnonzero((own > 0) & (labels[place] == 0))
        if len(alone):
            raise DataError(
                f"{where}: {len(alone):,} of {len(own):,} rows have {task.name} = 1 and {task.given} = 0, the first of "
                f"them row {alone[0]}; expected {task.given} = 1 wherever {task.name} is, which is given it"
            )


def find_rows(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The row of each wanted key in ``keys`` (distinct), int32; -1 where there is none."""
    if not len(keys):
        return np.full(wanted.shape, -1, np.int32)
    order = np.argsort(keys, kind="stable")
    place = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
    rows = order[place]
    return np.where(keys[rows] == wanted, rows, -1).astype(np.int32)


def _key_column(tables: LogTables, name: str, key: str) -> np.ndarray:
    table = getattr(tables, name)
    where = tables.where(name)
    use = "keys.user" if key == tables.schema.user_key else "keys.item"
    values = column(table, key, where, use)
    _check_key_type(tables, values, key, where)
    return keys_of(values, key, where)


def _check_key_type(tables: LogTables, values: pa.Array, key: str, where: str) -> None:
    """Keys are one type in all tables and in the features made of item keys, or nothing would be found."""
    if key != tables.schema.item_key:
        return
    for feature in tables.schema.features:
        if feature.encoding == "item" and (feature.type == "string") != is_text(values.type):
            raise DataError(
                f"{where}: column {key!r}: got {values.type}, but the schema's feature {feature.name} has "
                f"item keys of type {feature.type}; set its type, or convert the column"
            )


def unique_keys(tables: LogTables, name: str, table: pa.Table, key: str) -> np.ndarray:
    """Keys (R,) int64 of the table ``name``, users or items. Raises DataError when a key is missing or repeats."""
    keys = _key_column(tables, name, key)
    order = np.argsort(keys, kind="stable")
    twice = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(twice):
        first, second = int(order[twice[0]]), int(order[twice[0] + 1])
        shown = table.column(key)[first].as_py()
        raise DataError(
            f"{tables.where(name)}: column {key!r}: key {shown!r} is in rows {first} and {second} "
            f"({len(twice)} repeated rows in all); expected one row per {name[:-1]}"
        )
    return keys


def _unknown_items(tables: LogTables, item_row: np.ndarray) -> tuple[LogTables, np.ndarray]:
    schema, unknown = tables.schema, item_row < 0
    count, first = int(unknown.sum()), int(np.argmax(unknown))
    shown = tables.impressions.column(schema.item_key)[first].as_py()
    if tables.unknown_items == "refuse":
        raise DataError(
            f"{tables.where('impressions')}: {count} of {len(unknown)} rows have an item that "
            f"{tables.where('items')} lacks, the first in row {first}: {shown!r}; add the items, or drop the "
            f"rows with data.unknown_items: drop"
        )
    if count == len(unknown):
        raise DataError(
            f"{tables.where('impressions')}: not one of {count} rows has an item of {tables.where('items')}; "
            f"got for example {shown!r}; do both tables name items in the same way?"
        )
    note = f"{count} of {len(unknown)} impressions dropped: their items are not in the items table"
    kept = tables.impressions.filter(pa.array(~unknown))
    return replace(tables, impressions=kept, notes=(*tables.notes, note)), item_row[~unknown]


def _user_rows(tables: LogTables, user_key: np.ndarray) -> np.ndarray:
    if tables.users is None:
        return np.full(len(user_key), -1, np.int32)
    key = tables.schema.user_key
    known = unique_keys(tables, "users", tables.users, key)
    kinds = [is_text(t.schema.field(key).type) for t in (tables.users, tables.impressions)]
    if kinds[0] != kinds[1]:
        raise DataError(
            f"{tables.where('users')}: column {key!r}: got {tables.users.schema.field(key).type} keys, and "
            f"{tables.impressions.schema.field(key).type} in {tables.where('impressions')}; expected one type"
        )
    return find_rows(known, user_key)
