"""The encoded data set that training and evaluation read.

A recipe's data section is one of

    data: {adapter: ml-100k, path: ../shared/data/ml-100k, options: {...}}
    data: {impressions: f.parquet, users: u.parquet, items: i.parquet}

and either may add

    unknown_items: drop        impressions of items that the table lacks; they are refused by default
    history_by: session_id     histories within a column's values instead of a user's
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from hsnn_core.errors import DataError
from hsnn_core.features import Encoded, FeatureTransform
from hsnn_core.item_attributes import ItemAttributes
from hsnn_core.schema import KEY_MISSING, Feature, Schema

from .attributes import read_attributes
from .columns import coded_column, column, missing_rows, wire_rows
from .history import Histories
from .neighbours import FOLDS, fold_of, neighbours
from .splits import NAMES, TRAIN, Split
from .tables import TABLES, Log, LogTables, check_tables, load_tables

ENCODE_ROWS = 1 << 16
EarlierKeys = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Examples:
    """S impressions in order of time.

    users: encoded user features as of each impression; item_row (S,) int32 row of the item table; labels
    (S, T) float32; time (S,) int64; user_key (S,) int64; fold (S,) int8: which of `Dataset.folds` is to be seen with
    it, -1 for none.
    """

    users: Encoded
    item_row: np.ndarray
    labels: np.ndarray
    time: np.ndarray
    user_key: np.ndarray
    fold: np.ndarray

    def __len__(self) -> int:
        return len(self.item_row)


@dataclass(frozen=True)
class Dataset:
    """Encoded examples and items; the transform has seen nothing of the users but the train split.

    items: V encoded rows; folds: the same rows with neighbours found without the users of fold 0, 1, ..., empty when
    no feature of an item is derived; item_keys (V,) int64; item_counts (V,) int64: train positives of
    `Schema.drawn_task`; item_first_time (V,) int64: time of the item's first impression in any split, the largest int64
    without one.
    raw_users: (split, rows (R,)) -> wire tensors of those examples' users, by feature name, as a request
    would carry them. earlier: (split, rows (R,), number of a task) -> per example the int32 item
    rows of its whole history, the strictly earlier positives of the task in any split, oldest first. notes: what a
    person should know about the data; simulated: whether figures must be labelled so; attributes: eligibility and bids
    by row of the item table, None when the schema declares none; unordered: see `LogTables`.
    """

    schema: Schema
    transform: FeatureTransform
    items: Encoded
    folds: tuple[Encoded, ...]
    item_keys: np.ndarray
    item_counts: np.ndarray
    item_first_time: np.ndarray
    train: Examples
    valid: Examples
    test: Examples
    raw_users: Callable[[str, np.ndarray], dict[str, np.ndarray]]
    earlier: Callable[[str, np.ndarray, int], list[np.ndarray]]
    seed: int = 1
    notes: tuple[str, ...] = ()
    simulated: bool = False
    attributes: ItemAttributes | None = None
    unordered: bool = False

    def relevant(self, split: str, max_requests: int | None = None) -> tuple[Encoded, list[np.ndarray]]:
        """The users who have a positive (of the first task) in the split, as of their first impression there (R
        rows), and per user the item rows of `positives`. See `user_rows` for ``max_requests`` and order."""
        examples: Examples = getattr(self, split)
        rows = self.user_rows(split, max_requests)
        users = Encoded(examples.users.dense[rows], examples.users.ids[rows])
        return users, self.positives(split, examples.user_key[rows])

    def requests(self, split: str, max_requests: int) -> tuple[dict[str, np.ndarray], Encoded]:
        """The users of `relevant`, as wire tensors (R, ...) for a client and encoded (R rows)."""
        rows = self.user_rows(split, max_requests)
        users = getattr(self, split).users
        return self.raw_users(split, rows), Encoded(users.dense[rows], users.ids[rows])

    def user_rows(self, split: str, max_requests: int | None = None) -> np.ndarray:
        """(R,) int64: the first impression in the split of every user who has a positive there, by user key.

        More users than ``max_requests`` are cut to a choice that depends on the data set's seed alone.
        """
        examples: Examples = getattr(self, split)
        users = self._choice(np.unique(examples.user_key[examples.labels[:, 0] > 0]), max_requests)
        everyone, first = np.unique(examples.user_key, return_index=True)
        rows: np.ndarray = first[np.searchsorted(everyone, users)]
        return rows

    def click_rows(self, split: str, max_requests: int | None = None) -> np.ndarray:
        """(R,) int64: the impressions of the split that are positives, in order of time; cut as `user_rows`."""
        examples: Examples = getattr(self, split)
        return self._choice(np.flatnonzero(examples.labels[:, 0] > 0), max_requests)

    def positives(self, split: str, users: np.ndarray) -> list[np.ndarray]:
        """Per user of ``users`` (R,) int64, ascending: the int32 item rows of their positives in the split,
        distinct and ascending."""
        examples: Examples = getattr(self, split)
        own = (examples.labels[:, 0] > 0) & np.isin(examples.user_key, users)
        pairs = np.unique(np.stack([examples.user_key[own], examples.item_row[own]], axis=1), axis=0)
        items = np.split(pairs[:, 1].astype(np.int32), np.searchsorted(pairs[:, 0], users)[1:])
        return items if len(users) else []

    def _choice(self, values: np.ndarray, most: int | None) -> np.ndarray:
        if most is None or len(values) <= most:
            return values
        chosen = np.random.default_rng([self.seed, 3]).choice(len(values), most, replace=False)
        return values[np.sort(chosen)]


def load_dataset(
    schema: Schema,
    data_section: Mapping[str, Any],
    split_section: Mapping[str, Any],
    base_dir: Path,
    seed: int,
    progress: bool = True,
) -> Dataset:
    """The data set of a recipe's `data:` and `split:` sections; paths start from ``base_dir``.

    Raises DataError, SchemaError and FeatureError.
    """
    split = Split.from_dict(split_section)
    return build_dataset(schema, recipe_tables(schema, data_section, base_dir), split, seed, progress)


def recipe_tables(schema: Schema, data_section: Mapping[str, Any], base_dir: Path) -> LogTables:
    """The tables of a recipe's `data:` section; paths start from ``base_dir``. Raises DataError."""
    if "adapter" in data_section:
        from .adapters import adapt

        return adapt(schema, data_section, base_dir)
    known = (*TABLES, "unknown_items", "history_by")
    for key in data_section:
        if key not in known:
            raise DataError(f"data.{key}: unknown key, expected adapter, or of {', '.join(known)}")
    for key, value in data_section.items():
        if not isinstance(value or "", str):
            raise DataError(f"data.{key}: got {value!r}, expected text")
    paths = {name: base_dir / data_section[name] for name in TABLES if data_section.get(name)}
    return load_tables(
        schema, paths, data_section.get("unknown_items", "refuse"), data_section.get("history_by")
    )


def build_dataset(
    schema: Schema, tables: LogTables, split: Split, seed: int, progress: bool = False
) -> Dataset:
    """Check, split, derive histories, fit on the train split, encode. Raises DataError and FeatureError."""
    log = check_tables(tables)
    parts = split.assign(log)
    if tables.unordered:
        # There is no other time: the splits follow each other.
        log = replace(log, time=parts.astype(np.int64))
    users = UserFeatures(schema, log)
    order = np.argsort(log.time, kind="stable")
    rows_of = [order[parts[order] == part] for part in range(len(NAMES))]

    neighbours = _Neighbours(schema, log, rows_of[TRAIN])
    item_raw = _item_rows(schema, log) | neighbours.raw(None)
    transform = FeatureTransform.fit(schema, users.to_fit(rows_of[TRAIN]), item_raw, log.item_keys)
    with tqdm(total=len(order), desc="encode", unit="row", delay=1.0, disable=not progress) as bar:
        train, valid, test = (encode_examples(transform, users, log, rows, bar) for rows in rows_of)
    if neighbours.features:
        train = replace(train, fold=fold_of(log.group[rows_of[TRAIN]]))
    return Dataset(
        schema,
        transform,
        transform.encode_items(item_raw),
        tuple(transform.encode_items(item_raw | raw) for raw in neighbours.folds()),
        log.item_keys,
        np.bincount(train.item_row[train.labels[:, schema.drawn_task] > 0], minlength=len(log.item_keys)),
        _first_times(log),
        train,
        valid,
        test,
        lambda split, rows: users.raw(rows_of[NAMES.index(split)][rows]),
        lambda split, rows, task: users.history(task).whole(rows_of[NAMES.index(split)][rows]),
        seed=seed,
        notes=(*log.tables.notes, *users.notes),
        simulated=log.tables.simulated,
        attributes=read_attributes(schema, log.tables.items, log.tables.where("items")),
        unordered=tables.unordered,
    )


class UserFeatures:
    """Raw user features of any impressions: columns of the impressions or of the users, derived histories.

    ``earlier``: number of a task -> (impressions (R,), L) -> keys (R, L) int64 of the last L items that the user's
    history holds then, oldest first, then KEY_MISSING; None takes the histories that the log itself has.
    """

    def __init__(self, schema: Schema, log: Log, earlier: Callable[[int], EarlierKeys] | None = None) -> None:
        self.log = log
        self.notes: list[str] = []
        self.of_impression: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}  # values, and of which row
        self.of_user: dict[str, np.ndarray] = {}  # the last row is that of a user who is not in the table
        self.derived: dict[str, tuple[EarlierKeys, int]] = {}
        self.features = {f.name: f for f in schema.user_features}
        self._histories: dict[int, Histories] = {}
        names = [task.name for task in schema.tasks]
        for feature in schema.user_features:
            if feature.derive_from is not None:
                keys = (earlier or self._keys)(names.index(feature.derive_from))
                self.derived[feature.name] = (keys, feature.length)
            else:
                self._read(feature)
        if self.of_user and (log.user_row < 0).any():
            absent = np.unique(log.user_key[log.user_row < 0])
            self.notes.append(f"{len(absent)} users are not in the users table: their features are missing")

    def _read(self, feature: Feature) -> None:
        tables = self.log.tables
        if feature.name in tables.impressions.column_names or tables.users is None:
            where = tables.where("impressions")
            values, of = coded_column(tables.impressions, feature.name, where, "user feature")
            self.of_impression[feature.name] = wire_rows(values, feature, where), of
            return
        where = tables.where("users")
        use = f"user feature; {tables.where('impressions')} lacks it too"
        values = column(tables.users, feature.name, where, use)
        rows = [wire_rows(values, feature, where), missing_rows(feature, 1)]
        self.of_user[feature.name] = np.concatenate(rows)

    def history(self, task: int) -> Histories:
        """The histories of a task's positives, made when first asked for."""
        if task not in self._histories:
            log = self.log
            hit = log.labels[:, task] > 0
            of_others = log.time == TRAIN if log.tables.unordered else None
            self._histories[task] = Histories(log.group, log.time, log.item_row, hit, of_others)
        return self._histories[task]

    def _keys(self, task: int) -> EarlierKeys:
        def keys(rows: np.ndarray, length: int) -> np.ndarray:
            items = histories.rows(rows, length)
            return np.where(items < 0, KEY_MISSING, self.log.item_keys[items])

        histories = self.history(task)
        return keys

    def raw(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Wire arrays of the impressions ``rows``, by feature name."""
        found = self._declared(rows, self.features)
        return found | {name: keys(rows, length) for name, (keys, length) in self.derived.items()}

    def to_fit(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """As `raw` without the features `of: item`, whose ids are the item table's."""
        found = self._declared(rows, [f.name for f in self.features.values() if f.encoding != "item"])
        return found or {name: missing_rows(self.features[name], 0) for name in self.derived}

    def _declared(self, rows: np.ndarray, names: Iterable[str]) -> dict[str, np.ndarray]:
        found = {}
        for name in names:
            if name in self.of_impression:
                values, of = self.of_impression[name]
                found[name] = values[rows if of is None else of[rows]]
            elif name in self.of_user:
                found[name] = self.of_user[name][self.log.user_row[rows]]
        return found


class _Neighbours:
    """Item features derived from the train positives (``rows`` of the log)."""

    def __init__(self, schema: Schema, log: Log, rows: np.ndarray) -> None:
        self.features = [f for f in schema.item_features if f.derive_from is not None]
        self.tasks = [task.name for task in schema.tasks]
        self.log, self.rows = log, rows

    def raw(self, without: int | None) -> dict[str, np.ndarray]:
        """Wire arrays (V, L) by feature name, of all groups or ``without`` those of a fold."""
        found = {}
        for feature in self.features:
            log, rows = self.log, self.rows
            rows = rows[log.labels[rows, self.tasks.index(str(feature.derive_from))] > 0]
            if without is not None:
                rows = rows[fold_of(log.group[rows]) != without]
            items = len(log.item_keys)
            nearest = neighbours(
                log.group[rows], log.time[rows], log.item_row[rows], items, feature.length,
                ordered=not log.tables.unordered,
            )  # fmt: skip
            found[feature.name] = np.where(nearest < 0, KEY_MISSING, log.item_keys[nearest])
        return found

    def folds(self) -> list[dict[str, np.ndarray]]:
        """`raw` without fold 0, 1, ...; empty when no feature is derived."""
        return [self.raw(fold) for fold in range(FOLDS)] if self.features else []


def _first_times(log: Log) -> np.ndarray:
    first = np.full(len(log.item_keys), np.iinfo(np.int64).max)
    np.minimum.at(first, log.item_row, log.time)
    return first


def _item_rows(schema: Schema, log: Log) -> dict[str, np.ndarray]:
    """Wire arrays of all items."""
    return item_wire(schema, log.tables.items, log.tables.where("items"), log.item_keys)


def item_wire(schema: Schema, items: pa.Table, where: str, keys: np.ndarray) -> dict[str, np.ndarray]:
    """Wire arrays of a table of items (``where`` names it in errors) with these keys (V,) int64, but for features that
    are derived. A feature `of: item` of one id that has no column is the item's own key."""
    raw = {}
    for feature in schema.item_features:
        if feature.derive_from is not None:
            continue
        own = feature.encoding == "item" and feature.kind == "sparse" and feature.length == 1
        if own and feature.name not in items.column_names:
            raw[feature.name] = keys[:, None]
        else:
            values = column(items, feature.name, where, "item feature")
            raw[feature.name] = wire_rows(values, feature, where)
    return raw


def encode_examples(
    transform: FeatureTransform, users: UserFeatures, log: Log, rows: np.ndarray, bar: Any = None
) -> Examples:
    """Encode the impressions ``rows`` in chunks: raw keys take many times the memory of ids."""
    layout = transform.schema.layout("user")
    dense = np.empty((len(rows), layout.dense_width), np.float32)
    ids = np.empty((len(rows), layout.ids_width), np.int32)
    for start in range(0, len(rows), ENCODE_ROWS):
        chunk = slice(start, start + ENCODE_ROWS)
        encoded = transform.encode_users(users.raw(rows[chunk]))
        dense[chunk], ids[chunk] = encoded.dense, encoded.ids
        if bar is not None:
            bar.update(len(encoded))
    return Examples(
        Encoded(dense, ids), log.item_row[rows], log.labels[rows], log.time[rows], log.user_key[rows],
        np.full(len(rows), -1, np.int8),
    )  # fmt: skip
