"""Changes of single items, as clients send them and the item log keeps them.

An upsert is the whole new state of an item, a delete ends it; of two updates of one item the one with the higher
sequence number is the newer, in whatever order they arrive:

    {"id": 17, "sequence": 9, "features": {"price": 2.5}, "eligibility": {"country": ["IT"]}, "bid": 0.7}
    {"id": 17, "sequence": 10, "deleted": true}

Features are raw, as `encode_row_values` reads them, attributes and bids as `ItemAttributes.from_rows` does. A sparse
feature `of: item` of one id that is left out is the item's own id, as in the item table.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import FeatureError
from .item_attributes import ItemAttributes
from .keys import KEY_MISSING, shortened, stable_key
from .schema import ITEM_SPACE, Feature, Schema, encode_row_values

# Clocks in nanoseconds stay far below it until the year 2116; what lies above is no clock and no counter.
MAX_SEQUENCE = 2**62
MAX_BYTES = 1 << 20  # of one update's JSON
# What became of an update, by its number on the wire. Refused: not valid. Failed: it could not be written now.
STATUSES = APPLIED, STALE, REFUSED, FAILED = "applied", "stale", "refused", "failed"
_UPSERT = ("id", "sequence", "deleted", "features", "eligibility", "bid")
_DELETE = ("id", "sequence", "deleted")


@dataclass(frozen=True)
class Update:
    """One change of one item: its state as of ``sequence``.

    ``item``: the external id, int64. ``features``: raw values by feature name, ``eligibility``: raw values by
    attribute name, ``bid`` > 0, None: the default; a deleted item has none of them."""

    item: int
    sequence: int
    deleted: bool = False
    features: Mapping[str, Any] = field(default_factory=dict)
    eligibility: Mapping[str, Any] = field(default_factory=dict)
    bid: float | None = None

    def to_json(self) -> str:
        """One line of JSON; the same text for the same update. `from_json` gives the update back."""
        raw: dict[str, Any] = {"id": self.item, "sequence": self.sequence}
        if self.deleted:
            raw["deleted"] = True
        else:
            raw["features"] = self.features
            if self.eligibility:
                raw["eligibility"] = self.eligibility
            if self.bid is not None:
                raw["bid"] = self.bid
        return json.dumps(raw, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Update:
        """An update that `to_json` wrote, without another check of its values against the schema. FeatureError for a
        text that it did not write: the log was damaged."""
        try:
            raw = json.loads(text)
            update = cls(
                raw["id"],
                raw["sequence"],
                raw.get("deleted", False),
                raw.get("features", {}),
                raw.get("eligibility", {}),
                raw.get("bid"),
            )
            parts = (update.features, update.eligibility)
            if all(type(n) is int for n in (update.item, update.sequence)) and all(map(_is_mapping, parts)):
                return update
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        raise FeatureError(f"update in the item log: got {shortened(text)}, expected what HSNN wrote there")


def parse_update(schema: Schema, raw: Any) -> Update:
    """The update in JSON (text or bytes) or as the mapping read from it, with every value checked against the schema.

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
            raise FeatureError(f"deleted: got {shortened(deleted)}, expected true or false")
        _known("entry", raw, _DELETE if deleted else _UPSERT, " of a delete" if deleted else "")
        if deleted:
            return Update(item, sequence, deleted=True)
        features = _part(raw, "features")
        _check_features(schema, item, features)
        eligibility, bid = _part(raw, "eligibility"), raw.get("bid")
        ItemAttributes.from_rows(schema, [eligibility], [bid])
    except FeatureError as error:
        raise FeatureError(f"item {item}: {error}") from None
    except (ValueError, OverflowError) as error:  # lists of lists of unequal length, text that is no Unicode
        raise FeatureError(f"item {item}: {error}; expected the values that the schema declares") from None
    return Update(item, sequence, False, features, eligibility, bid)


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


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


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
            f"update: got {shortened(raw)}, expected an object with id, sequence and features (or deleted: true)"
        )
    return raw


def _item(schema: Schema, raw: Mapping[str, Any]) -> int:
    if "id" not in raw:
        raise FeatureError(f"id: missing, got {shortened(sorted(map(str, raw)))}; expected the item's id")
    value = raw["id"]
    types = {feature.type for feature in schema.features if feature.encoding == ITEM_SPACE}
    if isinstance(value, str) and types != {"int"}:
        try:
            return stable_key(value)
        except UnicodeEncodeError:
            raise FeatureError(f"id: got {shortened(value)}, expected text that is Unicode") from None
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) < value < 2**63:
        return value
    wanted = "an integer of 64 bits above -2**63" + ("" if types == {"int"} else ", or a string")
    raise FeatureError(f"id: got {shortened(value)} ({type(value).__name__}), expected {wanted}")


def _sequence(raw: Mapping[str, Any]) -> int:
    if "sequence" not in raw:
        raise FeatureError(
            "sequence: missing, expected a whole number that grows with every update of the item"
        )
    value = raw["sequence"]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEQUENCE:
        raise FeatureError(
            f"sequence: got {shortened(value)} ({type(value).__name__}), expected a whole number from 0 to 2**62, "
            "such as a counter or a clock in microseconds"
        )
    return value


def _part(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise FeatureError(f"{name}: got {shortened(value)}, expected an object of names and values")
    return dict(value)


def _check_features(schema: Schema, item: int, given: Mapping[str, Any]) -> None:
    features = {feature.name: feature for feature in schema.item_features}
    _known("item feature", given, list(features))
    for name, value in given.items():
        row = encode_row_values(features[name], value)
        if features[name].encoding == "range":
            _check_range(features[name], row)
        if name == ITEM_SPACE and value is not None and row[0] != item:
            raise FeatureError(
                f"feature {name!r}: got {shortened(value)}, expected the item's own id as in `id`; leave it out"
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
                f"unknown {what} {shortened(name)}{where}, expected one of {', '.join(known) or 'none'}{hint}"
            )
