"""Changes of single items, as clients send them and the item log keeps them.

An upsert is the whole new state of an item, a delete ends it; of two updates of one item the one with the higher
sequence number is the newer, in whatever order they arrive:

    {"id": 17, "sequence": 9, "features": {"category": [4], "price": 2.5}, "bid": 0.7}
    {"id": 17, "sequence": 10, "deleted": true}

Features are raw, as `encode_row_values` reads them. A sparse feature `of: item` of one id that is left out is the
item's own id, as in the item table.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import FeatureError
from .schema import ITEM_SPACE, KEY_MISSING, Feature, Schema, encode_row_values, stable_key

# Clocks in nanoseconds stay far below it until the year 2116; what lies above is no clock and no counter.
MAX_SEQUENCE = 2**62
MAX_BYTES = 1 << 20  # of one update's JSON
DEFAULT_BID = 1.0
_UPSERT = ("id", "sequence", "deleted", "features", "eligibility", "bid")
_DELETE = ("id", "sequence", "deleted")


@dataclass(frozen=True)
class Update:
    """One change of one item: its state as of ``sequence``.

    ``item``: the external id, int64. ``features``: raw values by feature name, ``eligibility``: raw values by
    attribute name, ``bid`` > 0; a deleted item has none of them."""

    item: int
    sequence: int
    deleted: bool = False
    features: Mapping[str, Any] = field(default_factory=dict)
    eligibility: Mapping[str, Any] = field(default_factory=dict)
    bid: float = DEFAULT_BID

    def to_json(self) -> str:
        """One line of JSON; the same text for the same update. `from_json` gives the update back."""
        raw: dict[str, Any] = {"id": self.item, "sequence": self.sequence}
        if self.deleted:
            raw["deleted"] = True
        else:
            raw |= {"features": self.features, "eligibility": self.eligibility, "bid": self.bid}
        return json.dumps(raw, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Update:
        """An update that `to_json` wrote, without another check of its values."""
        raw = json.loads(text)
        return cls(
            raw["id"],
            raw["sequence"],
            raw.get("deleted", False),
            raw.get("features", {}),
            raw.get("eligibility", {}),
            raw.get("bid", DEFAULT_BID),
        )


def parse_update(schema: Schema, raw: Any) -> Update:
    """The update in a mapping, or in its JSON (text or bytes), with every value checked against the schema.

    An id may be an integer of 64 bits or, unless the schema's item keys are integers, a string (its `stable_key` is
    kept). Raises FeatureError with the item's id, the entry, what was got and what is expected: a bad id or sequence,
    unknown entries, features or attributes, values of another type, NaN, keys outside their declared range.
    """
    raw = _mapping(raw)
    item = _item(schema, raw)
    try:
        sequence = _sequence(raw)
        deleted = raw.get("deleted", False)
        if not isinstance(deleted, bool):
            raise FeatureError(f"deleted: got {_short(deleted)}, expected true or false")
        _known("entry", raw, _DELETE if deleted else _UPSERT, " of a delete" if deleted else "")
        if deleted:
            return Update(item, sequence, deleted=True)
        features = _part(raw, "features")
        _check_features(schema, item, features)
        eligibility, bid = _part(raw, "eligibility"), _bid(raw)
        update = Update(item, sequence, False, features, eligibility, bid)
        _check_attributes(schema, update)
    except FeatureError as error:
        raise FeatureError(f"item {item}: {error}") from None
    return update


def item_wire_rows(schema: Schema, updates: Sequence[Update]) -> dict[str, np.ndarray]:
    """Raw wire tensors of the items of R upserts, by feature: dense (R, dim) float32, others (R, length) int64.

    What an update leaves out is missing, but for the item's own id. For `FeatureTransform.encode_items`."""
    tensors: dict[str, np.ndarray] = {}
    for feature in schema.item_features:
        dense, own = feature.kind == "dense", _is_own_id(feature)
        width, dtype = (feature.dim, np.float32) if dense else (feature.length, np.int64)
        rows = np.empty((len(updates), width), dtype)
        for row, update in enumerate(updates):
            value = update.features.get(feature.name)
            rows[row] = update.item if own and value is None else encode_row_values(feature, value)
        tensors[feature.name] = rows
    return tensors


def _check_attributes(schema: Schema, update: Update) -> None:
    """Refuse eligibility attributes and bids that the schema does not declare, and values that are not theirs."""
    # The schema declares none yet: whatever JSON can hold is kept.
    try:
        update.to_json()
    except (TypeError, ValueError) as error:
        raise FeatureError(
            f"eligibility: {error}; expected values that JSON can hold, finite numbers"
        ) from None


def _mapping(raw: Any) -> Mapping[str, Any]:
    if isinstance(raw, str | bytes):
        if len(raw) > MAX_BYTES:
            raise FeatureError(f"update: got {len(raw)} bytes of JSON, expected at most {MAX_BYTES}")
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise FeatureError(
                f"update: not valid JSON ({error}); expected an object like "
                '{"id": 17, "sequence": 9, "features": {...}}'
            ) from None
    if not isinstance(raw, Mapping):
        raise FeatureError(
            f"update: got {_short(raw)}, expected an object with id, sequence and features (or deleted: true)"
        )
    return raw


def _item(schema: Schema, raw: Mapping[str, Any]) -> int:
    if "id" not in raw:
        raise FeatureError(f"id: missing, got {_short(sorted(map(str, raw)))}; expected the item's id")
    value = raw["id"]
    types = {feature.type for feature in schema.features if feature.encoding == ITEM_SPACE}
    if isinstance(value, str) and types != {"int"}:
        return stable_key(value)
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) < value < 2**63:
        return value
    wanted = "an integer of 64 bits above -2**63" + ("" if types == {"int"} else ", or a string")
    raise FeatureError(f"id: got {_short(value)} ({type(value).__name__}), expected {wanted}")


def _sequence(raw: Mapping[str, Any]) -> int:
    if "sequence" not in raw:
        raise FeatureError(
            "sequence: missing, expected a whole number that grows with every update of the item"
        )
    value = raw["sequence"]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEQUENCE:
        raise FeatureError(
            f"sequence: got {_short(value)} ({type(value).__name__}), expected a whole number from 0 to 2**62, "
            "such as a counter or a clock in microseconds"
        )
    return value


def _part(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise FeatureError(f"{name}: got {_short(value)}, expected an object of names and values")
    return dict(value)


def _bid(raw: Mapping[str, Any]) -> float:
    value = raw.get("bid")
    if value is None:
        return DEFAULT_BID
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= float(np.finfo(np.float32).max) or not math.isfinite(value):
        raise FeatureError(f"bid: got {_short(value)}, expected a finite number above 0")
    return float(value)


def _check_features(schema: Schema, item: int, given: Mapping[str, Any]) -> None:
    features = {feature.name: feature for feature in schema.item_features}
    _known("item feature", given, list(features))
    for name, value in given.items():
        row = encode_row_values(features[name], value)
        if features[name].encoding == "range":
            _check_range(features[name], row)
        if name == ITEM_SPACE and value is not None and row[0] != item:
            raise FeatureError(
                f"feature {name!r}: got {_short(value)}, expected the item's own id as in `id`; leave it out"
            )


def _check_range(feature: Feature, keys: np.ndarray) -> None:
    keys = keys[keys != KEY_MISSING]
    outside = keys[(keys < 0) | (keys >= feature.size)]
    if len(outside):
        raise FeatureError(
            f"feature {feature.name!r}: got key {outside[0]}, expected 0..{feature.size - 1} (range: {feature.size})"
        )


def _is_own_id(feature: Feature) -> bool:
    """Whether the feature, where it is left out, is the item's own id."""
    one_item = feature.encoding == ITEM_SPACE and feature.kind == "sparse" and feature.length == 1
    return one_item and feature.derive_from is None


def _known(what: str, given: Iterable[Any], known: Sequence[str], where: str = "") -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise FeatureError(
                f"unknown {what} {_short(name)}{where}, expected one of {', '.join(known) or 'none'}{hint}"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
