"""From columns of a table to NumPy: keys, labels, times, and the raw wire rows of a feature, without a loop
over rows. Every DataError names table, column and row (counted from 0), what was got and what was expected.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hsnn_core.errors import DataError
from hsnn_core.keys import KEY_MISSING, KeyType, stable_key
from hsnn_core.schema import Feature


def column(table: pa.Table, name: str, where: str, use: str) -> pa.Array:
    """The column as one array. Raises DataError when it is not there; ``use`` says what it is needed for."""
    whole = _one_array(table, name, where, use)
    return whole.dictionary_decode() if pa.types.is_dictionary(whole.type) else whole


def _one_array(table: pa.Table, name: str, where: str, use: str) -> pa.Array:
    if name not in table.column_names:
        raise DataError(
            f"{where}: column {name!r} is missing ({use}); columns there: {', '.join(table.column_names)}"
        )
    values = table.column(name)
    whole = values.combine_chunks() if values.num_chunks != 1 else values.chunk(0)
    if isinstance(whole, pa.ChunkedArray):  # a column without rows has no chunk to combine
        whole = pa.array([], type=values.type)
    return whole


def coded_column(table: pa.Table, name: str, where: str, use: str) -> tuple[pa.Array, np.ndarray | None]:
    """The column as its distinct values and where each row's stands among them, (R,) int64, when it is
    dictionary-encoded without nulls; else as `column`, and None. What many rows share is then held once."""
    whole = _one_array(table, name, where, use)
    if not pa.types.is_dictionary(whole.type):
        return whole, None
    if whole.null_count:
        return whole.dictionary_decode(), None
    return whole.dictionary, np.asarray(whole.indices).astype(np.int64)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def text_keys(values: pa.Array) -> np.ndarray:
    """`stable_key` of every string, int64, hashed once per distinct string. Nulls become KEY_MISSING."""
    coded = values.dictionary_encode()
    keys = np.array([stable_key(text) for text in coded.dictionary.to_pylist()] + [KEY_MISSING], np.int64)
    return keys[np.asarray(pc.fill_null(coded.indices, len(keys) - 1))]


def keys_of(values: pa.Array, name: str, where: str) -> np.ndarray:
    """Keys of users or items (R,) int64: integers as they are, strings as `stable_key`; none missing."""
    if values.null_count:
        raise DataError(
            f"{where}: column {name!r}, row {first(values.is_null())}: the key is missing; "
            "every row needs one"
        )
    if is_text(values.type):
        return text_keys(values)
    if not pa.types.is_integer(values.type):
        raise DataError(f"{where}: column {name!r}: got {values.type}, expected integer or string keys")
    return np.asarray(_whole(values, f"{where}: column {name!r}"))


def labels_of(values: pa.Array, name: str, where: str) -> np.ndarray:
    """Labels (R,) float32, each 0 or 1."""
    kind = values.type
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"{where}: column {name!r}: got {kind}, expected labels 0 or 1")
    numbers = np.asarray(pc.fill_null(values.cast(pa.float64(), safe=False), np.nan))
    wrong = (numbers != 0) & (numbers != 1)
    if wrong.any():
        row = first(wrong)
        raise DataError(
            f"{where}: column {name!r}, row {row}: got {shown(values, row)}, expected a label 0 or 1"
        )
    return numbers.astype(np.float32)


def times_of(values: pa.Array, name: str, where: str) -> np.ndarray:
    """Times (R,) int64: integers as they are, dates and timestamps as milliseconds since 1970."""
    if values.null_count:
        raise DataError(f"{where}: column {name!r}, row {first(values.is_null())}: the time is missing")
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        # Sub-millisecond digits are cut: events of one millisecond count as simultaneous.
        return np.asarray(values.cast(pa.timestamp("ms"), safe=False).cast(pa.int64()))
    if not pa.types.is_integer(values.type):
        raise DataError(f"{where}: column {name!r}: got {values.type}, expected an integer or a timestamp")
    return np.asarray(_whole(values, f"{where}: column {name!r}"))


def _whole(values: pa.Array, what: str) -> pa.Array:
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(f"{what}: {error}; expected whole numbers of 64 bits") from None


def wire_rows(values: pa.Array, feature: Feature, where: str) -> np.ndarray:
    """The feature's raw wire rows: dense (R, dim) float32, others (R, length) int64 padded with KEY_MISSING.

    Null is missing. A sparse row keeps its first ids, a sequence its last ones.
    """
    if feature.kind == "dense":
        return _dense_rows(values, feature, where)
    rows = _key_rows(values, feature, where)
    if feature.encoding == "range":
        outside = (rows != KEY_MISSING) & ((rows < 0) | (rows >= feature.size))
        if outside.any():
            row = first(outside.any(axis=1))
            raise DataError(
                f"{where}: column {feature.name!r}, row {row}: got {rows[row][outside[row]][0]}, expected "
                f"0 to {feature.size - 1} (the schema says range: {feature.size})"
            )
    return rows


def _key_rows(values: pa.Array, feature: Feature, where: str) -> np.ndarray:
    if not is_list(values.type):
        keys = typed_keys(values, feature.name, feature.type, where)
        rows = missing_rows(feature, len(keys))
        rows[:, 0] = keys
        return rows
    lengths = np.asarray(pc.fill_null(pc.list_value_length(values), 0)).astype(np.int64)
    flat = pc.list_flatten(values)
    of_row = np.repeat(np.arange(len(lengths)), lengths)
    if flat.null_count:
        row = of_row[first(flat.is_null())]
        raise DataError(f"{where}: column {feature.name!r}, row {row}: null inside a list; leave it out")
    keys = typed_keys(flat, feature.name, feature.type, where)
    place = np.arange(len(keys)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    if feature.kind == "sequence":
        place -= np.repeat(np.maximum(lengths - feature.length, 0), lengths)
    kept = (place >= 0) & (place < feature.length)
    rows = missing_rows(feature, len(lengths))
    rows[of_row[kept], place[kept]] = keys[kept]
    return rows


def missing_rows(feature: Feature, rows: int) -> np.ndarray:
    """Wire rows of a feature that is missing: the default, or no keys."""
    if feature.kind == "dense":
        return np.full((rows, feature.dim), feature.default, np.float32)
    return np.full((rows, feature.length), KEY_MISSING, np.int64)


def typed_keys(values: pa.Array, name: str, key_type: KeyType, where: str) -> np.ndarray:
    """Keys of a column of features or attributes (n,) int64, of the declared type; null is KEY_MISSING."""
    fits = is_text(values.type) if key_type == "string" else pa.types.is_integer(values.type)
    if not fits and not pa.types.is_null(values.type):
        raise DataError(
            f"{where}: column {name!r}: got {values.type}, expected {key_type} keys "
            f"(the schema says type: {key_type})"
        )
    if key_type == "string":
        return text_keys(values.cast(pa.string()))
    return np.asarray(pc.fill_null(_whole(values, f"{where}: column {name!r}"), int(KEY_MISSING)))


def _dense_rows(values: pa.Array, feature: Feature, where: str) -> np.ndarray:
    rows = missing_rows(feature, len(values))
    there = np.asarray(values.is_valid())
    if is_list(values.type):
        lengths = np.asarray(pc.fill_null(pc.list_value_length(values), feature.dim))
        if (lengths != feature.dim).any():
            row = first(lengths != feature.dim)
            raise DataError(
                f"{where}: column {feature.name!r}, row {row}: got {lengths[row]} numbers, "
                f"expected {feature.dim}"
            )
        numbers = _numbers(pc.list_flatten(values), feature, where).reshape(-1, feature.dim)
    elif feature.dim > 1:
        raise DataError(
            f"{where}: column {feature.name!r}: got {values.type}, expected lists of {feature.dim} numbers"
        )
    else:
        numbers = _numbers(values.drop_null(), feature, where)[:, None]
    rows[there] = numbers
    wrong = ~np.isfinite(rows).all(axis=1)
    if wrong.any():
        row = first(wrong)
        raise DataError(
            f"{where}: column {feature.name!r}, row {row}: got {shown(values, row)}, "
            "expected finite numbers; leave missing values empty (null)"
        )
    return rows


def _numbers(values: pa.Array, feature: Feature, where: str) -> np.ndarray:
    kind = values.type
    if pa.types.is_null(kind):
        return np.zeros(0, np.float32)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{where}: column {feature.name!r}: got {kind}, expected numbers (kind: dense)")
    with np.errstate(over="ignore"):
        return np.asarray(pc.fill_null(values.cast(pa.float64(), safe=False), np.nan)).astype(np.float32)


def first(mask: Any) -> int:
    """The number of the first row that the mask holds for."""
    return int(np.argmax(np.asarray(mask)))


def shown(values: pa.Array, row: int) -> str:
    """A value as error messages show it."""
    value = values[row].as_py()
    return "nothing (null)" if value is None else repr(value)
