"""The item table's columns that decide who may get an item, and what it bids -> `ItemAttributes`."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hsnn_core.errors import DataError
from hsnn_core.item_attributes import ItemAttributes, Sets
from hsnn_core.schema import Schema
from hsnn_core.schema_eligibility import Attribute

from .columns import column, first, is_list, shown, typed_keys


def read_attributes(schema: Schema, items: pa.Table, where: str) -> ItemAttributes | None:
    """Of a table of items (``where`` names it in errors); None when the schema declares none.

    A set is a column of keys or of lists of keys; a range two columns of numbers, or of timestamps, which count as
    seconds since 1970; a flag true or false (or 1 and 0). Null is open to all, unbounded, not set, no key, a bid of 1.
    Raises DataError naming table, column and row.
    """
    if not schema.has_attributes:
        return None
    sets: dict[str, Sets] = {}
    ranges: dict[str, np.ndarray] = {}
    flags: dict[str, np.ndarray] = {}
    keys: dict[str, np.ndarray] = {}
    for attribute in schema.eligibility:
        name = attribute.name
        columns = [column(items, c, where, f"eligibility.{name}") for c in attribute.columns]
        if attribute.kind == "set":
            sets[name] = _sets(columns[0], attribute, where)
        elif attribute.kind == "range":
            ranges[name] = _bounds(columns, attribute, where)
        elif attribute.kind == "flag":
            flags[name] = _flags(columns[0], name, where)
        else:
            keys[name] = typed_keys(columns[0], name, attribute.type, where)
    return ItemAttributes(schema, sets, ranges, flags, keys, _bids(schema, items, where))


def _sets(values: pa.Array, attribute: Attribute, where: str) -> Sets:
    name = attribute.name
    if is_list(values.type):
        counts = np.asarray(pc.fill_null(pc.list_value_length(values), 0)).astype(np.int64)
        flat = pc.list_flatten(values)
        if flat.null_count:
            row = np.repeat(np.arange(len(counts)), counts)[first(flat.is_null())]
            raise DataError(f"{where}: column {name!r}, row {row}: null inside a list; leave it out")
    else:
        counts = np.asarray(values.is_valid()).astype(np.int64)
        flat = values.drop_null()
    if (counts > attribute.max).any():
        row = first(counts > attribute.max)
        raise DataError(
            f"{where}: column {name!r}, row {row}: got {counts[row]} keys, expected at most {attribute.max} "
            f"(the schema says max: {attribute.max})"
        )
    ptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Sets(ptr, typed_keys(flat, name, attribute.type, where))


def _bounds(columns: list[pa.Array], attribute: Attribute, where: str) -> np.ndarray:
    names = attribute.columns
    sides = [_numbers(values, name, where) for values, name in zip(columns, names)]
    bounds = np.stack(
        [np.where(np.isnan(sides[0]), -np.inf, sides[0]), np.where(np.isnan(sides[1]), np.inf, sides[1])], 1
    )
    wrong = bounds[:, 0] > bounds[:, 1]
    if wrong.any():
        row = first(wrong)
        raise DataError(
            f"{where}: columns {names[0]!r} and {names[1]!r}, row {row}: got {bounds[row].tolist()}, expected "
            "from <= until"
        )
    return bounds


def _numbers(values: pa.Array, name: str, where: str) -> np.ndarray:
    """(R,) float64, NaN where null."""
    kind = values.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        micro = values.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
        return np.asarray(pc.fill_null(micro.cast(pa.float64(), safe=False), np.nan)) / 1e6
    if pa.types.is_null(kind):
        return np.full(len(values), np.nan)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"{where}: column {name!r}: got {kind}, expected numbers or timestamps")
    numbers = np.asarray(pc.fill_null(values.cast(pa.float64(), safe=False), np.nan))
    wrong = ~np.isfinite(numbers) & np.asarray(values.is_valid())
    if wrong.any():
        raise DataError(
            f"{where}: column {name!r}, row {first(wrong)}: got {shown(values, first(wrong))}, expected finite "
            "numbers; leave missing values empty (null)"
        )
    return numbers


def _flags(values: pa.Array, name: str, where: str) -> np.ndarray:
    if pa.types.is_boolean(values.type) or pa.types.is_null(values.type):
        return np.asarray(pc.fill_null(values.cast(pa.bool_()), False))
    numbers = (
        np.asarray(pc.fill_null(values, 0)) if pa.types.is_integer(values.type) else np.full(len(values), 2)
    )
    if not np.isin(numbers, (0, 1)).all():
        row = first(~np.isin(numbers, (0, 1)))
        raise DataError(
            f"{where}: column {name!r}, row {row}: got {shown(values, row)}, expected true or false"
        )
    return numbers.astype(bool)


def _bids(schema: Schema, items: pa.Table, where: str) -> np.ndarray:
    if schema.bid is None:
        return np.ones(items.num_rows, np.float32)
    values = column(items, schema.bid, where, "bid")
    numbers = _numbers(values, schema.bid, where)
    with np.errstate(over="ignore", under="ignore"):
        bids = np.where(np.isnan(numbers), 1.0, numbers).astype(np.float32)
    wrong = ~(np.isfinite(bids) & (bids > 0))
    if wrong.any():
        row = first(wrong)
        raise DataError(
            f"{where}: column {schema.bid!r}, row {row}: got {shown(values, row)}, expected a bid above 0 that float32 "
            "can hold"
        )
    return bids
