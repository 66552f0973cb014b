"""Which items a request may return: the request's context, and packed bitmaps of the items' attributes.

What the kinds of attributes mean is said in `schema_eligibility`. Letters: R items, B users.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from .errors import FeatureError
from .item_attributes import ItemAttributes, Sets
from .keys import KEY_MISSING
from .schema import Schema
from .schema_eligibility import EXCLUDED_ITEMS, WireTensor, encode_context

# Bitmaps kept per attribute: of a million items, 8 MB.
KEPT = 64
# Items from which on a range's bitmap is made of a near one: comparing fewer takes a quarter of a millisecond.
MOVED_FROM = 1 << 16
# A bitmap is made of a near one when at most one item in so many changes between the two.
_MOVED_SHARE = 64


@dataclass(frozen=True, eq=False)
class Context:
    """What B users' requests say about eligibility, by attribute name.

    ``sets`` (B, ask) int64 and ``excluded`` (B, n) int64 keys, KEY_MISSING is padding; ``ranges`` (B,) float64, NaN
    for none. An attribute that is not there is asked for by nobody.
    """

    users: int
    sets: Mapping[str, np.ndarray]
    ranges: Mapping[str, np.ndarray]
    excluded: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return self.users

    @classmethod
    def from_wire(cls, schema: Schema, tensors: Mapping[str, np.ndarray], users: int, now: float) -> Context:
        """Of a request's tensors (those of `Schema.context_wire` but for ``exclude_items``; any may be left out) for
        B ``users``.

        ``now``: the clock in seconds, which ranges with `default: now` take where a user has no value, **rounded
        down to whole seconds**, so that all requests of a second share one cached bitmap: an item starts and stops
        up to a second late. Raises FeatureError naming the tensor, what was got and what is expected.
        """
        known = {a.wire().name: a for a in schema.eligibility if a.kind != "flag"}
        sets, ranges, excluded = {}, {}, {}
        for name, values in tensors.items():
            if name not in known:
                raise FeatureError(
                    f"unknown request tensor {name!r}, expected one of {', '.join(known) or 'none'}"
                )
            attribute = known[name]
            checked_context(values, attribute.wire(), users)
            if attribute.kind == "set":
                sets[attribute.name] = values
            elif attribute.kind == "key":
                excluded[attribute.name] = values
            else:
                if np.isinf(values).any():
                    raise FeatureError(
                        f"{name}: got {values[np.isinf(values)][0]}, expected finite numbers, or NaN for none"
                    )
                ranges[attribute.name] = values[:, 0]
        second = float(math.floor(now))
        for attribute in schema.eligibility:
            if attribute.now:
                given = ranges.get(attribute.name, np.full(users, np.nan))
                ranges[attribute.name] = np.where(np.isnan(given), second, given)
        return cls(users, sets, ranges, excluded)

    @classmethod
    def from_rows(
        cls,
        schema: Schema,
        contexts: Sequence[Mapping[str, Any]],
        now: float,
        excluded: Sequence[Mapping[str, Any]] | None = None,
    ) -> Context:
        """Of raw values per user, see `encode_context`."""
        none: list[Mapping[str, Any]] = [{} for _ in contexts]
        tensors = encode_context(schema, contexts, excluded or none, [()] * len(contexts))
        tensors.pop(EXCLUDED_ITEMS.name, None)
        return cls.from_wire(schema, tensors, len(contexts), now)


def checked_context(values: np.ndarray, tensor: WireTensor, users: int) -> None:
    """Refuse (FeatureError) an array that is not the `WireTensor` of B ``users``."""
    dtype = np.dtype(np.float64 if tensor.datatype == "FP64" else np.int64)
    width = tensor.shape[0]
    if (
        values.dtype != dtype
        or values.ndim != 2
        or len(values) != users
        or width not in (-1, values.shape[1])
    ):
        wanted = "any number" if width < 0 else width
        raise FeatureError(
            f"{tensor.name}: got {values.dtype} of shape {values.shape}, expected {dtype} of shape ({users}, {wanted})"
        )


class AttributeBitmaps:
    """Which of R items a user may get, as bits; built once, shared by threads.

    Bits are packed as by ``np.packbits(..., bitorder="little")``: item r is bit r % 8 of byte r // 8, and bits beyond
    R are 0. Per attribute the last `KEPT` bitmaps are kept, of set keys and of range values, so that a request costs
    a few operations on R / 8 bytes; a bitmap that is not there is made from postings (sets, keys), or (ranges) from
    that of a near number, by the items that start or end in between: the next second's costs what changes in it.
    """

    def __init__(self, attributes: ItemAttributes) -> None:
        self.items = len(attributes)
        live = np.ones(self.items, bool)
        for flag in attributes.flags.values():
            live &= ~flag
        self._live = _packed(live)
        self._sets = {name: _SetBitmaps(sets) for name, sets in attributes.sets.items()}
        self._ranges = {name: _RangeBitmaps(bounds) for name, bounds in attributes.ranges.items()}
        self._keys = {
            name: _Postings(keys, np.arange(len(keys), dtype=np.int32))
            for name, keys in attributes.keys.items()
        }

    def matching(self, context: Context, user: int) -> np.ndarray:
        """(ceil(R / 8),) uint8, the caller's own: the items that the user of that number may get."""
        bits = self._live.copy()
        for name, of_set in self._sets.items():
            asked = context.sets.get(name)
            bits &= of_set.matching(() if asked is None else asked[user])
        for name, of_range in self._ranges.items():
            values = context.ranges.get(name)
            bits &= of_range.matching(math.nan if values is None else float(values[user]))
        for name, postings in self._keys.items():
            excluded = context.excluded.get(name)
            for key in () if excluded is None else np.unique(excluded[user]):
                if key != KEY_MISSING:
                    clear_bits(bits, postings.rows(int(key)))
        return bits


class _SetBitmaps:
    """Items that are open to all, and per key those or its own."""

    def __init__(self, sets: Sets) -> None:
        counts = np.diff(sets.ptr)
        self._open = counts == 0
        self._open_bits = _packed(self._open)
        self._postings = _Postings(sets.keys, np.repeat(np.arange(len(counts), dtype=np.int32), counts))
        self._kept = _Kept(self._of_key)

    def matching(self, keys: Iterable[int]) -> np.ndarray:
        """Shared and read-only."""
        found = self._open_bits
        for key in keys:
            if key != KEY_MISSING and int(key) in self._postings:
                bits = self._kept(int(key))
                found = bits if found is self._open_bits else found | bits
        return found

    def _of_key(self, key: float) -> np.ndarray:
        mask = self._open.copy()
        mask[self._postings.rows(int(key))] = True
        return _packed(mask)


class _RangeBitmaps:
    """Items whose range holds a number."""

    def __init__(self, bounds: np.ndarray) -> None:
        self._start, self._until = (np.ascontiguousarray(side) for side in bounds.T)
        self._unbounded = _packed(np.isneginf(self._start) & np.isposinf(self._until))
        self._kept = _Kept(self._of_value)
        # Each bound's rows in its ascending order, of the items that any number can get.
        self._orders: list[tuple[np.ndarray, np.ndarray]] = []
        if len(bounds) >= MOVED_FROM:
            some = self._start < self._until
            self._orders = [(side, _ordered(side, some)) for side in (self._start, self._until)]

    def matching(self, value: float) -> np.ndarray:
        """Shared and read-only; NaN is no number."""
        return self._unbounded if math.isnan(value) else self._kept(value)

    def _of_value(self, value: float) -> np.ndarray:
        near = self._kept.nearest(value) if self._orders else None
        if near is not None:
            other, bits = near
            low, high = sorted((other, value))
            crossed = [
                order[slice(*(bisect_right(order, at, key=side.__getitem__) for at in (low, high)))]
                for side, order in self._orders
            ]
            if _MOVED_SHARE * sum(map(len, crossed)) <= len(self._start):
                return _flipped(bits, np.concatenate(crossed))
        return _packed((self._start <= value) & (value < self._until))


class _Postings:
    """The rows of every key: keys (n,) int64 and their rows (n,) int32."""

    def __init__(self, keys: np.ndarray, rows: np.ndarray) -> None:
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
        self._rows = rows[order]
        self._keys, self._ptr = ordered[starts], np.append(starts, len(keys))

    def __contains__(self, key: int) -> bool:
        return len(self.rows(key)) > 0

    def rows(self, key: int) -> np.ndarray:
        """(n,) int32 ascending; none of a key that no item has."""
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return self._rows[:0]
        return self._rows[self._ptr[at] : self._ptr[at + 1]]


class _Kept:
    """The last `KEPT` bitmaps that ``make`` made."""

    def __init__(self, make: Callable[[float], np.ndarray]) -> None:
        self._make = make
        self._lock, self._making = Lock(), Lock()
        self._bits: OrderedDict[float, np.ndarray] = OrderedDict()

    def __call__(self, value: float) -> np.ndarray:
        bits = self._known(value)
        if bits is not None:
            return bits
        # Who needs a bitmap that is being made waits for it; who needs one that is there does not.
        with self._making:
            bits = self._known(value)
            if bits is None:
                bits = self._make(value)
                with self._lock:
                    self._bits[value] = bits
                    if len(self._bits) > KEPT:
                        self._bits.popitem(last=False)
        return bits

    def nearest(self, value: float) -> tuple[float, np.ndarray] | None:
        """The kept value next to this one, and its bitmap; None when none is kept."""
        with self._lock:
            if not self._bits:
                return None
            near = min(self._bits, key=lambda known: abs(known - value))
            return near, self._bits[near]

    def _known(self, value: float) -> np.ndarray | None:
        with self._lock:
            if value not in self._bits:
                return None
            self._bits.move_to_end(value)
            return self._bits[value]


def clear_bits(bits: np.ndarray, rows: np.ndarray) -> None:
    """Clear the bits of these rows (n,) int, ascending, in packed ``bits``, in place."""
    if len(rows):
        at = rows >> 3
        starts = np.flatnonzero(np.concatenate([[True], at[1:] != at[:-1]]))
        bits[at[starts]] &= ~np.bitwise_or.reduceat(np.uint8(1) << (rows & 7).astype(np.uint8), starts)


def _ordered(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """(n,) int32: the rows ``among`` (R,) bool whose values (R,) are finite, by ascending value."""
    rows = np.flatnonzero(among & np.isfinite(values)).astype(np.int32)
    return rows[np.argsort(values[rows])]


def _flipped(bits: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A copy of packed ``bits`` with the bit of each row (n,) turned once for every time that it is named."""
    flipped = bits.copy()
    np.bitwise_xor.at(flipped, rows >> 3, np.uint8(1) << (rows & 7).astype(np.uint8))
    flipped.flags.writeable = False
    return flipped


def _packed(mask: np.ndarray) -> np.ndarray:
    bits = np.packbits(mask, bitorder="little")
    bits.flags.writeable = False
    return bits
