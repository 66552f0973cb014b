"""The part of the schema that says which requests may return an item, and the tensors a request says it with.

    kind    an item has                             a request gives                    it is eligible when
    set     up to `max` keys; none: open to all     up to `ask` keys                   one is the item's, or it is open
    range   two numbers; a missing one: unbounded   a number; with `default: now` the  from <= number < until
                                                    server's clock, seconds
    flag    true or false                           nothing                            it is not set
    key     one key or none                         any number of keys to exclude      its key is none of them

Without a key or a number a request gets the items that are open to all and unbounded.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .errors import FeatureError
from .keys import KEY_MISSING, KeyType, keys_of, one_key, shortened

if TYPE_CHECKING:
    from .schema import Schema

AttributeKind = Literal["set", "range", "flag", "key"]


@dataclass(frozen=True)
class WireTensor:
    """A raw tensor of a request; ``shape`` without the batch axis."""

    name: str
    datatype: Literal["FP32", "FP64", "INT64"]
    shape: tuple[int, ...]


EXCLUDED_ITEMS = WireTensor("exclude_items", "INT64", (-1,))


@dataclass(frozen=True)
class Attribute:
    """An eligibility attribute of items.

    ``type`` belongs to sets and keys, ``max`` and ``ask`` to sets (keys of an item and of a request), ``start``,
    ``until`` (the item table's columns) and ``now`` (the clock is the default) to ranges. The others are read from
    the column of their own name.
    """

    name: str
    kind: AttributeKind
    type: KeyType = "int"
    max: int = 1
    ask: int = 1
    start: str = ""
    until: str = ""
    now: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the item table that it is read from."""
        return (self.start, self.until) if self.kind == "range" else (self.name,)

    def to_dict(self) -> dict[str, Any]:
        """The entry as written in a schema file, every setting spelt out."""
        if self.kind == "range":
            entry = {"kind": self.kind, "from": self.start, "until": self.until}
            return entry | {"default": "now"} if self.now else entry
        if self.kind == "set":
            return {"kind": self.kind, "type": self.type, "max": self.max, "ask": self.ask}
        return {"kind": self.kind, "type": self.type} if self.kind == "key" else {"kind": self.kind}

    def wire(self) -> WireTensor:
        """The tensor with a request's values of it; flags have none."""
        if self.kind == "range":
            return WireTensor(f"context_{self.name}", "FP64", (1,))
        if self.kind == "set":
            return WireTensor(f"context_{self.name}", "INT64", (self.ask,))
        return WireTensor(f"exclude_{self.name}", "INT64", (-1,))


def encode_context(
    schema: Schema,
    contexts: Sequence[Mapping[str, Any]],
    excluded: Sequence[Mapping[str, Any]],
    items: Sequence[Iterable[Any]],
) -> dict[str, np.ndarray]:
    """What B users' requests say beside the users' features: every tensor of `Schema.context_wire`, or none where no
    user says anything. Not only those with a value: Triton hands over together only requests with the same tensors.

    Per user: ``contexts`` {set: a key or keys, range: a number}, ``excluded`` {key attribute: keys}, ``items`` raw
    item keys (integers; strings where items have string keys) that must not come back. Raises FeatureError naming
    the user's place, the attribute, what was got and what is expected.
    """
    values: dict[str, list[Any]] = {tensor.name: [] for tensor in schema.context_wire()}
    asked = {a.name: a for a in schema.eligibility if a.kind in ("set", "range")}
    keyed = {a.name: a for a in schema.eligibility if a.kind == "key"}
    for user, (context, barred, own) in enumerate(zip(contexts, excluded, items, strict=True)):
        try:
            _check_names("context", context, asked)
            _check_names("exclude", barred, keyed)
            for attribute in asked.values():
                values[attribute.wire().name].append(_asked(attribute, context.get(attribute.name)))
            for attribute in keyed.values():
                what = f"exclude: attribute {attribute.name!r}"
                keys = keys_of(what, attribute.type, barred.get(attribute.name), "key")
                values[attribute.wire().name].append(keys)
            values[EXCLUDED_ITEMS.name].append([_item_key(schema, key) for key in own])
        except FeatureError as error:
            raise FeatureError(f"user {user}: {error}") from None
    if not any(len(row) for rows in values.values() for row in rows):
        return {}
    return {tensor.name: _packed(tensor, values[tensor.name]) for tensor in schema.context_wire()}


def _check_names(argument: str, given: Mapping[str, Any], known: Mapping[str, Attribute]) -> None:
    if not isinstance(given, Mapping):
        raise FeatureError(f"{argument}: got {shortened(given)}, expected a dict of attribute name -> value")
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise FeatureError(
                f"{argument}: unknown attribute {name!r}, expected among {sorted(known)}{hint}"
            )


def _asked(attribute: Attribute, value: Any) -> Sequence[Any] | np.ndarray:
    what = f"context: attribute {attribute.name!r}"
    if attribute.kind == "set":
        keys = keys_of(what, attribute.type, value, "set")
        if len(keys) > attribute.ask:
            raise FeatureError(
                f"{what}: got {len(keys)} keys, expected at most {attribute.ask} (the schema says ask: {attribute.ask})"
            )
        return keys
    if value is None:
        return []
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise FeatureError(f"{what}: got {shortened(value)}, expected a finite number (range)")
    return [float(value)]


def _item_key(schema: Schema, key: Any) -> int:
    """Item keys come back from a search as integers, also where they were strings; both may be excluded."""
    string = isinstance(key, str) and schema.item_key_type == "string"
    return one_key("exclude_items", "string" if string else "int", key)


def _packed(tensor: WireTensor, rows: Sequence[Sequence[Any]]) -> np.ndarray:
    width = tensor.shape[0] if tensor.shape[0] > 0 else max(len(row) for row in rows)
    missing, dtype = (np.nan, np.float64) if tensor.datatype == "FP64" else (KEY_MISSING, np.int64)
    packed = np.full((len(rows), width), missing, dtype)
    for row, values in enumerate(rows):
        packed[row, : len(values)] = values
    return packed
