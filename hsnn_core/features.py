"""From raw keys and numbers to the packed tensors that the networks read; learnt once on the training data.

Raw arrays are one per feature, as on the wire: dense (R, dim) float32, others (R, length) int64 keys padded
at the end with KEY_MISSING. Encoded: all dense columns standardised and packed, all ids packed
(`Schema.layout`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .errors import FeatureError, FormatError
from .schema import (
    ID_FIRST,
    ID_PADDING,
    ID_UNKNOWN,
    ITEM_SPACE,
    KEY_MISSING,
    OWNERS,
    Feature,
    Owner,
    Schema,
)

# Standard deviations; far outside anything learnt, and still finite in fp16 after a few layers.
DENSE_LIMIT = np.float32(1000.0)
ENCODE_CHUNK = 1 << 18
# A vocabulary keeps a table of at most this many entries per key.
TABLE_SPAN = 8

Raw = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Encoded:
    """R rows of one owner: ``dense`` (R, dense_width) float32, ``ids`` (R, ids_width) int32."""

    dense: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def tensors(self, owner: Owner) -> dict[str, np.ndarray]:
        """The tower's inputs by name, e.g. user_dense and user_ids; only those that have columns."""
        named = {f"{owner}_dense": self.dense, f"{owner}_ids": self.ids}
        return {name: array for name, array in named.items() if array.shape[1]}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The learnt values of one id space: ``keys`` (n,) int64 ascending, ``ids`` (n,) int32 their ids."""

    keys: np.ndarray
    ids: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray) -> Vocabulary:
        """keys (n,) int64, all different: the first gets id 2, the next 3, and so on."""
        order = np.argsort(keys, kind="stable")
        return cls(keys[order], (order + ID_FIRST).astype(np.int32))

    def __len__(self) -> int:
        return len(self.keys)

    def encode(self, keys: np.ndarray) -> np.ndarray:
        """Keys of any shape, int64 -> ids of that shape, int32: padding 0, unknown 1."""
        ids = np.empty(keys.shape, dtype=np.int32)
        flat_keys, flat_ids = keys.reshape(-1), ids.reshape(-1)
        for start in range(0, keys.size, ENCODE_CHUNK):
            part = slice(start, start + ENCODE_CHUNK)
            flat_ids[part] = self._look_up(flat_keys[part])
        return ids

    def _look_up(self, keys: np.ndarray) -> np.ndarray:
        if len(self.keys) == 0:
            ids = np.full(keys.shape, ID_UNKNOWN, dtype=np.int32)
        elif self._table is not None:
            nearest = np.clip(keys, self.keys[0], self.keys[-1])
            ids = self._table[nearest - self.keys[0]]
            ids[nearest != keys] = ID_UNKNOWN
        else:
            at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
            ids = np.where(self.keys[at] == keys, self.ids[at], np.int32(ID_UNKNOWN))
        ids[keys == KEY_MISSING] = ID_PADDING
        return ids

    @cached_property
    def _table(self) -> np.ndarray | None:
        """Id by key - smallest key, when the keys lie close together: an order faster than the search."""
        span = int(self.keys[-1]) - int(self.keys[0]) + 1
        if span > TABLE_SPAN * len(self.keys):
            return None
        table = np.full(span, ID_UNKNOWN, dtype=np.int32)
        table[self.keys - self.keys[0]] = self.ids
        return table


@dataclass(frozen=True, eq=False)
class FeatureTransform:
    """The fitted transform: ``vocabularies`` per id space, ``dense_mean`` and ``dense_std`` (D,) float32 per
    owner."""

    schema: Schema
    vocabularies: Mapping[str, Vocabulary]
    dense_mean: Mapping[Owner, np.ndarray]
    dense_std: Mapping[Owner, np.ndarray]

    @classmethod
    def fit(cls, schema: Schema, user_raw: Raw, item_raw: Raw, item_keys: np.ndarray) -> FeatureTransform:
        """Learn from the training rows of the users and the rows of the item table.

        A vocabulary holds the ``size`` most frequent keys (ties: the smaller key), the most frequent first;
        the item space is ``item_keys`` (V,) int64 in the order of the table. Raises FeatureError as
        `encode_users`, and when item keys repeat.
        """
        item_keys = np.asarray(item_keys)
        if item_keys.ndim != 1 or item_keys.dtype != np.int64 or (item_keys == KEY_MISSING).any():
            raise FeatureError(
                f"item keys: got {item_keys.dtype} of shape {item_keys.shape}, expected int64 (V,) with none "
                "missing"
            )
        raws = {"user": _checked(schema, "user", user_raw), "item": _checked(schema, "item", item_raw)}
        keys: dict[str, list[np.ndarray]] = {}
        sizes: dict[str, int] = {}
        for feature in schema.features:
            if feature.encoding == "vocab":
                sizes[feature.space] = feature.size
                if feature.name in raws[feature.owner]:
                    keys.setdefault(feature.space, []).append(raws[feature.owner][feature.name].ravel())
        vocabularies = {
            space: Vocabulary.of(_most_frequent(keys.get(space, []), size)) for space, size in sizes.items()
        }
        items = Vocabulary.of(item_keys)
        if (items.keys[1:] == items.keys[:-1]).any():
            twice = items.keys[1:][items.keys[1:] == items.keys[:-1]][0]
            raise FeatureError(f"item keys: {twice} occurs more than once, expected every item once")
        vocabularies[ITEM_SPACE] = items
        mean, std = {}, {}
        for owner in OWNERS:
            mean[owner], std[owner] = _dense_statistics(schema, owner, raws[owner])
        return cls(schema, vocabularies, mean, std)

    def cardinality(self, space: str) -> int:
        """Number of ids of the space, padding and unknown included."""
        if space in self.vocabularies:
            return ID_FIRST + len(self.vocabularies[space])
        for feature in self.schema.features:
            if feature.space == space and feature.encoding is not None:
                return ID_FIRST + feature.size
        raise FeatureError(f"id space {space!r} is unknown; expected that of a sparse or sequence feature")

    def encode_users(self, raw: Raw) -> Encoded:
        """Raw arrays of R users, by feature name. A feature left out is missing in all rows.

        Ids that repeat within a row of a sparse feature are dropped, and ids have no gaps. Raises
        FeatureError naming the feature, what was got and what is expected: unknown name, dtype, shape, NaN,
        a key outside its declared range.
        """
        return self._encode("user", raw)

    def encode_items(self, raw: Raw) -> Encoded:
        """As `encode_users`, for items."""
        return self._encode("item", raw)

    def _encode(self, owner: Owner, raw: Raw) -> Encoded:
        raw = _checked(self.schema, owner, raw)
        rows = len(next(iter(raw.values())))
        layout = self.schema.layout(owner)
        dense = np.empty((rows, layout.dense_width), dtype=np.float32)
        for slot in layout.dense_slots:
            dense[:, slot.start : slot.stop] = raw.get(slot.feature.name, slot.feature.default)
        with np.errstate(over="ignore"):
            dense -= self.dense_mean[owner]
            dense /= self.dense_std[owner]
        np.clip(dense, -DENSE_LIMIT, DENSE_LIMIT, out=dense)
        ids = np.zeros((rows, layout.ids_width), dtype=np.int32)
        for slot in layout.slots:
            if slot.feature.name in raw:
                ids[:, slot.start : slot.stop] = self._ids(slot.feature, raw[slot.feature.name])
        return Encoded(dense, ids)

    def _ids(self, feature: Feature, keys: np.ndarray) -> np.ndarray:
        if feature.space in self.vocabularies:
            ids = self.vocabularies[feature.space].encode(keys)
        else:
            missing = keys == KEY_MISSING
            if feature.encoding == "range":
                outside = ~missing & ((keys < 0) | (keys >= feature.size))
                if outside.any():
                    raise FeatureError(
                        f"feature {feature.name!r}: got key {keys[outside][0]} in row "
                        f"{np.nonzero(outside)[0][0]}, expected 0..{feature.size - 1} (range: {feature.size})"
                    )
            ids = (keys % feature.size + ID_FIRST).astype(np.int32)
            ids[missing] = ID_PADDING
        return without_gaps(without_repeats(ids) if feature.kind == "sparse" else ids)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Named arrays for an array file."""
        arrays = {}
        for space, vocabulary in self.vocabularies.items():
            arrays[f"vocabulary.{space}.keys"] = vocabulary.keys
            arrays[f"vocabulary.{space}.ids"] = vocabulary.ids
        for owner in OWNERS:
            arrays[f"dense.{owner}.mean"] = self.dense_mean[owner]
            arrays[f"dense.{owner}.std"] = self.dense_std[owner]
        return arrays

    @classmethod
    def from_arrays(cls, schema: Schema, arrays: Raw) -> FeatureTransform:
        """The inverse of `to_arrays`; views, no copies. Raises FormatError when the arrays do not fit the
        schema."""
        vocabularies = {}
        for space in sorted({f.space for f in schema.features if f.encoding == "vocab"} | {ITEM_SPACE}):
            keys = _array(arrays, f"vocabulary.{space}.keys", np.int64, None)
            ids = _array(arrays, f"vocabulary.{space}.ids", np.int32, len(keys))
            if (keys[1:] <= keys[:-1]).any() or not np.array_equal(
                np.sort(ids), np.arange(len(ids)) + ID_FIRST
            ):
                raise FormatError(
                    f"transform: vocabulary {space}: expected ascending keys, and each id from {ID_FIRST} to "
                    f"{len(ids) + ID_FIRST - 1} once; the file is damaged, export the snapshot again"
                )
            vocabularies[space] = Vocabulary(keys, ids)
        mean, std = {}, {}
        for owner in OWNERS:
            width = schema.layout(owner).dense_width
            mean[owner] = _array(arrays, f"dense.{owner}.mean", np.float32, width)
            std[owner] = _array(arrays, f"dense.{owner}.std", np.float32, width)
            if not (
                np.isfinite(mean[owner]).all() and np.isfinite(std[owner]).all() and (std[owner] > 0).all()
            ):
                raise FormatError(
                    f"transform: dense.{owner}: expected finite means and deviations above 0; the file is damaged, "
                    "export the snapshot again"
                )
        return cls(schema, vocabularies, mean, std)


def without_repeats(ids: np.ndarray) -> np.ndarray:
    """ids (R, L) with every repetition within a row set to 0; the first one stays."""
    if ids.shape[1] < 2:
        return ids
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = ID_PADDING
    cleaned = np.empty_like(ids)
    np.put_along_axis(cleaned, order, ordered, axis=1)
    return cleaned


def without_gaps(ids: np.ndarray) -> np.ndarray:
    """ids (R, L) with the zeros of every row moved to its end, the order of the others kept."""
    empty = ids == ID_PADDING
    gaps = (empty[:, :-1] & ~empty[:, 1:]).any(axis=1)
    if gaps.any():
        order = np.argsort(empty[gaps], axis=1, kind="stable")
        ids = ids.copy()
        ids[gaps] = np.take_along_axis(ids[gaps], order, axis=1)
    return ids


def _checked(schema: Schema, owner: Owner, raw: Raw) -> dict[str, np.ndarray]:
    """The arrays, each checked against its feature; there is at least one and they have the same rows."""
    features = {feature.name: feature for feature in schema.features_of(owner)}
    rows: int | None = None
    for name, array in raw.items():
        feature = features.get(name)
        if feature is None:
            raise FeatureError(f"unknown {owner} feature {name!r}, expected one of {', '.join(features)}")
        dense = feature.kind == "dense"
        dtype, width = (np.float32, feature.dim) if dense else (np.int64, feature.length)
        if not isinstance(array, np.ndarray) or array.dtype != dtype:
            got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise FeatureError(f"feature {name!r}: got {got}, expected {np.dtype(dtype)} ({feature.kind})")
        if array.ndim != 2 or array.shape[1] != width:
            raise FeatureError(f"feature {name!r}: got shape {array.shape}, expected (rows, {width})")
        if rows is not None and len(array) != rows:
            raise FeatureError(f"feature {name!r}: got {len(array)} rows, expected {rows} as in the others")
        rows = len(array)
        if dense and not np.isfinite(array).all():
            row = np.nonzero(~np.isfinite(array))[0][0]
            raise FeatureError(
                f"feature {name!r}: got {array[row].tolist()} in row {row}, expected finite numbers"
            )
    if rows is None:
        raise FeatureError(f"no {owner} feature was given, expected at least one of {', '.join(features)}")
    return dict(raw)


def _most_frequent(parts: list[np.ndarray], size: int) -> np.ndarray:
    keys = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    distinct, counts = np.unique(keys[keys != KEY_MISSING], return_counts=True)
    # Stable over ascending keys, so ties go to the smaller key.
    return distinct[np.argsort(-counts, kind="stable")[:size]]


def _dense_statistics(schema: Schema, owner: Owner, raw: Raw) -> tuple[np.ndarray, np.ndarray]:
    layout = schema.layout(owner)
    mean, std = np.zeros(layout.dense_width), np.ones(layout.dense_width)
    for slot in layout.dense_slots:
        values = raw.get(slot.feature.name)
        if values is None or len(values) == 0:
            mean[slot.start : slot.stop] = slot.feature.default
            continue
        mean[slot.start : slot.stop] = values.mean(axis=0, dtype=np.float64)
        std[slot.start : slot.stop] = values.std(axis=0, dtype=np.float64)
    # What float32 cannot tell from a constant is one; dividing by its noise would blow up the next new value.
    std[std <= 1e-7 * np.abs(mean)] = 1.0
    tiny = np.finfo(np.float32).tiny
    return mean.astype(np.float32), np.maximum(std, tiny).astype(np.float32)


def _array(arrays: Raw, name: str, dtype: type, length: int | None) -> np.ndarray:
    if name not in arrays:
        raise FormatError(f"transform: array {name} is missing; got {', '.join(sorted(arrays))}")
    array = np.asarray(arrays[name])
    if array.dtype != dtype or array.ndim != 1 or (length is not None and len(array) != length):
        wanted = "(n,)" if length is None else f"({length},)"
        raise FormatError(
            f"transform: array {name} is {array.dtype} of shape {array.shape}, expected {np.dtype(dtype)} of "
            f"shape {wanted}"
        )
    return array
