"""What decides which requests may return an item, and what it bids: raw values, columns, arrays of a file.

What the kinds of attributes mean is said in `schema_eligibility`. Letter: R items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .errors import FeatureError, FormatError
from .keys import KEY_MISSING, keys_of, shortened
from .schema import Schema
from .schema_eligibility import Attribute

PREFIX = "eligibility."
BIDS = f"{PREFIX}bids"


class Sets(NamedTuple):
    """A set attribute of R items: the keys of item r are ``keys[ptr[r]:ptr[r + 1]]``; ptr (R + 1,) int64, keys (n,)
    int64. An item without any is open to all."""

    ptr: np.ndarray
    keys: np.ndarray

    def take(self, rows: np.ndarray) -> Sets:
        """The sets of these rows (n,), in their order."""
        counts = np.diff(self.ptr)[rows]
        ptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        at = np.repeat(self.ptr[rows] - ptr[:-1], counts) + np.arange(ptr[-1])
        return Sets(ptr, self.keys[at])


@dataclass(frozen=True, eq=False)
class ItemAttributes:
    """Eligibility attributes and bids of R items, by row; each mapping has the schema's attributes of its kind.

    ``sets``: see `Sets`; ``ranges`` (R, 2) float64, -inf and inf where unbounded; ``flags`` (R,) bool; ``keys`` (R,)
    int64, KEY_MISSING for none; ``bids`` (R,) float32, 1 where the schema has none. Raises FormatError when an array
    does not fit.
    """

    schema: Schema
    sets: Mapping[str, Sets]
    ranges: Mapping[str, np.ndarray]
    flags: Mapping[str, np.ndarray]
    keys: Mapping[str, np.ndarray]
    bids: np.ndarray

    def __post_init__(self) -> None:
        rows = len(self.bids)
        _check(BIDS, self.bids, np.float32, (rows,))
        for attribute in self.schema.eligibility:
            name = attribute.name
            where = f"{PREFIX}{name}"
            if attribute.kind == "set":
                ptr, keys = self.sets[name]
                _check(f"{where}.ptr", ptr, np.int64, (rows + 1,))
                _check(f"{where}.keys", keys, np.int64, (int(ptr[-1]),))
            elif attribute.kind == "range":
                _check(f"{where}.range", self.ranges[name], np.float64, (rows, 2))
            elif attribute.kind == "flag":
                _check(f"{where}.flag", self.flags[name], np.bool_, (rows,))
            else:
                _check(f"{where}.key", self.keys[name], np.int64, (rows,))

    def __len__(self) -> int:
        return len(self.bids)

    @classmethod
    def from_rows(
        cls, schema: Schema, rows: Sequence[Mapping[str, Any]], bids: Sequence[Any] | None = None
    ) -> ItemAttributes:
        """Of raw values, as an item update has them: {set: keys, range: [from, until], flag: bool, key: key}.

        None, or left out: open to all, unbounded, not set, no key; a bid of None is 1. Raises FeatureError naming
        the attribute, what was got and what is expected.
        """
        by_name: dict[str, list[Any]] = {attribute.name: [] for attribute in schema.eligibility}
        for row in rows:
            if not isinstance(row, Mapping):
                raise FeatureError(
                    f"eligibility: got {shortened(row)}, expected a mapping of attribute names to values"
                )
            for name in row:
                if name not in by_name:
                    known = ", ".join(by_name) or "none: the schema has no eligibility section"
                    raise FeatureError(f"eligibility: unknown attribute {name!r}, expected one of {known}")
            for attribute in schema.eligibility:
                by_name[attribute.name].append(_READ[attribute.kind](attribute, row.get(attribute.name)))
        sets = {}
        for name in _named(schema, "set"):
            ptr = np.concatenate([[0], np.cumsum([len(keys) for keys in by_name[name]], dtype=np.int64)])
            keys = [key for keys in by_name[name] for key in keys]
            sets[name] = Sets(ptr.astype(np.int64), np.array(keys, np.int64))
        prices = [_bid(schema, bid) for bid in ([None] * len(rows) if bids is None else bids)]
        return cls(
            schema,
            sets,
            {n: np.array(by_name[n], np.float64).reshape(-1, 2) for n in _named(schema, "range")},
            {n: np.array(by_name[n], bool) for n in _named(schema, "flag")},
            {n: np.array(by_name[n], np.int64) for n in _named(schema, "key")},
            np.array(prices, np.float32),
        )

    def take(self, rows: np.ndarray) -> ItemAttributes:
        """Of these rows (n,) int, in their order."""
        return ItemAttributes(
            self.schema,
            {name: sets.take(rows) for name, sets in self.sets.items()},
            {name: values[rows] for name, values in self.ranges.items()},
            {name: values[rows] for name, values in self.flags.items()},
            {name: values[rows] for name, values in self.keys.items()},
            self.bids[rows],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[ItemAttributes]) -> ItemAttributes:
        """All rows of the parts (at least one), which have one schema."""
        first = parts[0]
        sets = {}
        for name in first.sets:
            counts = [np.diff(part.sets[name].ptr) for part in parts]
            ptr = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
            sets[name] = Sets(ptr, np.concatenate([part.sets[name].keys for part in parts]))
        return cls(
            first.schema,
            sets,
            {name: np.concatenate([part.ranges[name] for part in parts]) for name in first.ranges},
            {name: np.concatenate([part.flags[name] for part in parts]) for name in first.flags},
            {name: np.concatenate([part.keys[name] for part in parts]) for name in first.keys},
            np.concatenate([part.bids for part in parts]),
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Named arrays for an array file, all under ``eligibility.``."""
        arrays = {BIDS: self.bids}
        for name, (ptr, keys) in self.sets.items():
            arrays |= {f"{PREFIX}{name}.ptr": ptr, f"{PREFIX}{name}.keys": keys}
        for kind, values in (("range", self.ranges), ("flag", self.flags), ("key", self.keys)):
            arrays |= {f"{PREFIX}{name}.{kind}": array for name, array in values.items()}
        return arrays

    @classmethod
    def from_arrays(cls, schema: Schema, arrays: Mapping[str, np.ndarray]) -> ItemAttributes | None:
        """The inverse of `to_arrays`, views; None when the schema declares neither attributes nor a bid. Raises
        FormatError when an array is missing or does not fit."""
        if not schema.has_attributes:
            return None

        def named(kind: str, suffix: str) -> dict[str, np.ndarray]:
            return {n: _array(arrays, f"{PREFIX}{n}.{suffix}") for n in _named(schema, kind)}

        ptr, keys = named("set", "ptr"), named("set", "keys")
        return cls(
            schema,
            {name: Sets(ptr[name], keys[name]) for name in ptr},
            named("range", "range"),
            named("flag", "flag"),
            named("key", "key"),
            _array(arrays, BIDS),
        )


def _named(schema: Schema, kind: str) -> list[str]:
    return [attribute.name for attribute in schema.eligibility if attribute.kind == kind]


def _read_set(attribute: Attribute, value: Any) -> list[int]:
    what = f"attribute {attribute.name!r}"
    keys = sorted({int(key) for key in keys_of(what, attribute.type, value, "set")})
    if len(keys) > attribute.max:
        # Cutting the rest off would narrow or widen what somebody paid for.
        raise FeatureError(
            f"{what}: got {len(keys)} keys, expected at most {attribute.max} (the schema says max: {attribute.max})"
        )
    return keys


def _read_range(attribute: Attribute, value: Any) -> tuple[float, float]:
    what = f"attribute {attribute.name!r}"
    if value is None:
        return -math.inf, math.inf
    if not isinstance(value, list | tuple | np.ndarray) or len(value) != 2:
        raise FeatureError(f"{what}: got {shortened(value)}, expected [from, until], null where unbounded")
    bounds = [-math.inf, math.inf]
    for side, number in enumerate(value):
        if number is not None:
            real = isinstance(number, int | float | np.number) and not isinstance(number, bool)
            if not real or not math.isfinite(number):
                raise FeatureError(
                    f"{what}: got {shortened(value)}, expected two finite numbers, null where unbounded"
                )
            bounds[side] = float(number)
    if bounds[0] > bounds[1]:
        raise FeatureError(f"{what}: got {shortened(value)}, expected from <= until")
    return bounds[0], bounds[1]


def _read_flag(attribute: Attribute, value: Any) -> bool:
    if value is not None and not isinstance(value, bool | np.bool_):
        raise FeatureError(f"attribute {attribute.name!r}: got {shortened(value)}, expected true or false")
    return bool(value)


def _read_key(attribute: Attribute, value: Any) -> int:
    keys = keys_of(f"attribute {attribute.name!r}", attribute.type, value, "key")
    if len(keys) > 1:
        raise FeatureError(f"attribute {attribute.name!r}: got {shortened(value)}, expected one key or none")
    return int(keys[0]) if len(keys) else int(KEY_MISSING)


_READ: Mapping[str, Callable[[Attribute, Any], Any]] = {
    "set": _read_set,
    "range": _read_range,
    "flag": _read_flag,
    "key": _read_key,
}


def _bid(schema: Schema, value: Any) -> float:
    if value is None:
        return 1.0
    if schema.bid is None:
        raise FeatureError(f"bid: got {shortened(value)}, expected none: the schema declares no bid")
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    with np.errstate(over="ignore", under="ignore"):
        number = np.float32(value) if real else np.float32(np.nan)
    if not (np.isfinite(number) and number > 0):
        raise FeatureError(
            f"bid: got {shortened(value)}, expected a finite number above 0 that float32 can hold"
        )
    return float(number)


def _check(name: str, array: np.ndarray, dtype: Any, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise FormatError(
            f"{name}: got {array.dtype} of shape {array.shape}, expected {np.dtype(dtype)} of shape {shape}"
        )


def _array(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        raise FormatError(
            f"array {name} is missing, which the schema's eligibility section or bid asks for; export again"
        )
    return np.asarray(arrays[name])
