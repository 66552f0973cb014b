"""The schema: the one declaration that training, serving, the client and the index layout follow.

Ids, in every id space: 0 is padding or missing, 1 is unknown, values start at 2. Raw keys, as tables and
requests carry them, are int64: integers as they are, strings as `stable_key`; KEY_MISSING is padding.

    name: ads
    keys: {user: user_id, item: item_id, time: timestamp}
    tasks: [{name: click}, {name: conversion, weight: 0.5, given: click}]
    features:
      user:
        age:      {kind: dense, default: 0.0}
        country:  {kind: sparse, vocab: 300, type: string}
        history:  {kind: sequence, of: item, length: 50, from: click}
      item:
        item:     {kind: sparse, of: item}
        category: {kind: sparse, hash: 1000, max: 4}
    interactions:
      topics: {user: history, item: category, matches: 4}
      seen:   {user: history, item: item}
    eligibility:                                    # optional: which requests may return an item
      market:  {kind: set, type: string, max: 30}   # item: up to `max` keys, none: open to all; request: up to `ask`
      running: {kind: range, from: start_time, until: end_time, default: now}   # from <= value < until
      paused:  {kind: flag}                         # set: never returned
      owner:   {kind: key}                          # one per item; a request may exclude some
    bid: bid                                        # optional: the column of what items bid
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .errors import FeatureError, SchemaError, SchemaMismatch
from .keys import KEY_MISSING, KeyType, keys_of, shortened
from .keys import stable_key as stable_key
from .schema_eligibility import EXCLUDED_ITEMS, Attribute, WireTensor

Owner = Literal["user", "item"]
Kind = Literal["dense", "sparse", "sequence"]
Encoding = Literal["vocab", "hash", "range", "item"]

OWNERS: tuple[Owner, ...] = ("user", "item")
ITEM_SPACE = "item"
ID_PADDING, ID_UNKNOWN, ID_FIRST = 0, 1, 2


@dataclass(frozen=True)
class Feature:
    """One feature of a user or an item.

    ``dim`` and ``default`` belong to dense features. The others turn keys of ``type`` into ids: ``encoding``
    with ``size`` (number of values; 0 for the item space), at most ``length`` ids per row. ``derive_from``
    names the task whose earlier positives fill a history, or from whose positives in train an item's neighbours are
    found; ``same_as`` the feature whose id space is shared.
    """

    name: str
    owner: Owner
    kind: Kind
    dim: int = 1
    default: float = 0.0
    encoding: Encoding | None = None
    size: int = 0
    length: int = 0
    type: KeyType = "int"
    derive_from: str | None = None
    same_as: str | None = None

    @property
    def space(self) -> str:
        """The id space: ids of two features can match only when their spaces are the same."""
        return ITEM_SPACE if self.encoding == "item" else self.same_as or self.name

    def to_dict(self) -> dict[str, Any]:
        """The entry as written in a schema file, every setting spelt out."""
        if self.kind == "dense":
            return {"kind": self.kind, "dim": self.dim, "default": self.default}
        entry: dict[str, Any] = {"kind": self.kind}
        if self.encoding == "item":
            entry["of"] = ITEM_SPACE
        else:
            entry[str(self.encoding)] = self.size
        entry["type"] = self.type
        entry["max" if self.kind == "sparse" else "length"] = self.length
        if self.derive_from is not None:
            entry["from"] = self.derive_from
        if self.same_as is not None:
            entry["same_as"] = self.same_as
        return entry


@dataclass(frozen=True)
class Task:
    """A 0/1 label column: ``weight`` in the loss, a mean over the task's own pairs; ``rank`` as the exponent of its
    probability in ranking. ``given``: the task without whose label of 1 the own one means nothing (a click, given
    an impression); None: every pair has one, and an item that was drawn as a negative has a 0."""

    name: str
    weight: float
    rank: float
    given: str | None = None

    def to_dict(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": self.name, "weight": self.weight, "rank": self.rank}
        # Only where it is set: a schema without it keeps the hash it always had.
        return entry if self.given is None else entry | {"given": self.given}


@dataclass(frozen=True)
class Interaction:
    """A crossing of a user feature with an item feature (I2IF), returning at most ``matches`` ids.

    ``through``: the user's ids are items, and it is the terms of those items that are matched. ``fade``: what an
    occurrence in the user's sequence weighs relative to the one after it; 1: all weigh the same. ``members``: a node is
    crossed by what the user's items among all its items weigh, not by its representative alone. ``via``: the item
    feature that lists what the user's items stand for, first the most telling; it is then never ``through``.
    """

    name: str
    user: str
    item: str
    matches: int
    through: bool
    fade: float = 1.0
    members: bool = False
    via: str | None = None

    @property
    def item_features(self) -> tuple[str, ...]:
        """The item features whose terms are read."""
        return (self.item,) if self.via is None else (self.item, self.via)

    def to_dict(self) -> dict[str, Any]:
        """The entry as written in a schema file."""
        entry: dict[str, Any] = {"user": self.user, "item": self.item, "matches": self.matches}
        if self.via is not None:
            entry["via"] = self.via
        if self.fade != 1.0:
            entry["fade"] = self.fade
        return entry | {"nodes": "members"} if self.members else entry


@dataclass(frozen=True)
class Slot:
    """Columns ``start:stop`` of a packed tensor belong to the feature."""

    feature: Feature
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """How one owner's encoded features are packed: dense (R, dense_width) float32, ids (R, ids_width)
    int32."""

    dense_slots: tuple[Slot, ...]
    slots: tuple[Slot, ...]

    @property
    def dense_width(self) -> int:
        return self.dense_slots[-1].stop if self.dense_slots else 0

    @property
    def ids_width(self) -> int:
        return self.slots[-1].stop if self.slots else 0


@dataclass(frozen=True)
class Schema:
    """A checked schema; make one with `load_schema`, `from_dict` or `from_json`.

    Features, tasks and interactions keep the order of declaration: it is the order of the packed tensors.
    Feature names are unique over users and items. ``time_key`` is None when the data has no order in time.
    ``eligibility``: the attributes of items that decide which requests may return them; ``bid``: the item table's
    column with what an item bids, None when items have no bids.
    """

    name: str
    user_key: str
    item_key: str
    time_key: str | None
    tasks: tuple[Task, ...]
    user_features: tuple[Feature, ...]
    item_features: tuple[Feature, ...]
    interactions: tuple[Interaction, ...]
    eligibility: tuple[Attribute, ...] = ()
    bid: str | None = None

    @classmethod
    def from_dict(cls, raw: Any) -> Schema:
        """The schema of plain dicts and lists. Raises SchemaError naming the dotted path that is wrong."""
        from .schema_parsing import parse_schema

        return parse_schema(raw)

    @classmethod
    def from_json(cls, text: str) -> Schema:
        """The inverse of `to_json`. Raises SchemaError."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SchemaError(
                f"schema: not valid JSON ({error}); expected what Schema.to_json wrote"
            ) from None
        return cls.from_dict(raw)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, every setting spelt out; `from_dict` gives the same schema back."""
        keys = {"user": self.user_key, "item": self.item_key}
        if self.time_key is not None:
            keys["time"] = self.time_key
        entries: dict[str, Any] = {
            "name": self.name,
            "keys": keys,
            "tasks": [task.to_dict() for task in self.tasks],
            "features": {owner: {f.name: f.to_dict() for f in self.features_of(owner)} for owner in OWNERS},
            "interactions": {i.name: i.to_dict() for i in self.interactions},
        }
        # Only where they are declared: a schema without them keeps the hash it always had.
        if self.eligibility:
            entries["eligibility"] = {attribute.name: attribute.to_dict() for attribute in self.eligibility}
        if self.bid is not None:
            entries["bid"] = self.bid
        return entries

    def to_json(self) -> str:
        """The canonical text, whose order is the order of declaration."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits that stand for everything the schema says, order included."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()[:16]

    def features_of(self, owner: Owner) -> tuple[Feature, ...]:
        return self.user_features if owner == "user" else self.item_features

    @property
    def features(self) -> tuple[Feature, ...]:
        """All features: the users', then the items'."""
        return self.user_features + self.item_features

    @property
    def rank(self) -> np.ndarray:
        """(T,) float32: the exponent of each task's probability in ranking."""
        return np.array([task.rank for task in self.tasks], np.float32)

    @property
    def given(self) -> np.ndarray:
        """(T,) int64: the place of the task that each task is given, -1 for none."""
        places = {task.name: place for place, task in enumerate(self.tasks)}
        return np.array([-1 if task.given is None else places[task.given] for task in self.tasks], np.int64)

    @property
    def drawn_task(self) -> int:
        """The first task that is given none. Items are drawn as negatives of all such tasks, by how often this one was
        positive, and hard ones by its logit."""
        return int(np.flatnonzero(self.given < 0)[0])

    def feature(self, name: str) -> Feature:
        """The feature of that name, of either owner. Raises FeatureError that lists the known ones."""
        for feature in self.features:
            if feature.name == name:
                return feature
        raise FeatureError(
            f"feature {name!r} is unknown; expected one of {', '.join(f.name for f in self.features)}"
        )

    def layout(self, owner: Owner) -> Layout:
        """The packed layout of the owner's encoded features, in order of declaration."""
        features = self.features_of(owner)
        return Layout(
            tuple(_slots([(f, f.dim) for f in features if f.kind == "dense"])),
            tuple(_slots([(f, f.length) for f in features if f.kind != "dense"])),
        )

    def user_wire(self) -> list[WireTensor]:
        """One raw tensor per user feature: dense (dim,) FP32, others (length,) INT64 keys, padded at the end
        with KEY_MISSING."""
        return [_wire(feature) for feature in self.user_features]

    def item_wire(self) -> list[WireTensor]:
        """As `user_wire`, of the items."""
        return [_wire(feature) for feature in self.item_features]

    def context_wire(self) -> list[WireTensor]:
        """The tensors that a request may carry beside `user_wire`, one row per user: of a set INT64 (ask,), of a
        range FP64 (1,), of a key the excluded ones INT64 (-1,); and ``exclude_items`` INT64 (-1,), raw item keys.
        KEY_MISSING is padding, NaN no value."""
        return [*(a.wire() for a in self.eligibility if a.kind != "flag"), EXCLUDED_ITEMS]

    @property
    def has_attributes(self) -> bool:
        """Whether items carry anything beside their features: eligibility attributes or a bid."""
        return bool(self.eligibility) or self.bid is not None

    @property
    def item_key_type(self) -> KeyType:
        """Of the items' own keys: that of the features made of them, int where there are none."""
        return next((f.type for f in self.features if f.encoding == "item"), "int")


def load_schema(path: str | Path) -> Schema:
    """The schema in a YAML file. Raises SchemaError naming the file and the dotted path that is wrong."""
    import yaml

    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SchemaError(f"schema {path}: no such file") from None
    except (
        yaml.YAMLError,
        UnicodeDecodeError,
        RecursionError,
        ValueError,
    ) as error:  # ValueError: a date of no calendar
        raise SchemaError(f"schema {path}: not valid YAML: {error}") from None
    try:
        return Schema.from_dict(raw)
    except SchemaError as error:
        raise SchemaError(f"schema {path}: {error}") from None


def first_difference(a: Schema, b: Schema) -> str | None:
    """Where two schemas first differ, e.g. "features.user.age.dim: 1 != 2"; None when they are the same."""
    return next(_differences("", a.to_dict(), b.to_dict()), None)


def check_same(ours: Schema, theirs: Schema) -> None:
    """Raises SchemaMismatch with both hashes and the first difference."""
    difference = first_difference(ours, theirs)
    if difference is not None:
        raise SchemaMismatch(
            f"schemas differ: ours is {ours.hash}, theirs {theirs.hash}; first difference (ours != theirs): "
            f"{difference}"
        )


def encode_row_values(feature: Feature, value: Any) -> np.ndarray:
    """One raw value as its wire row: dense (dim,) float32, others (length,) int64 keys.

    None is missing: the default, or no keys. A sparse value is one key or a list of keys, of which the first
    ``length`` are kept; a sequence is a list, most recent last, of which the last ``length`` are kept.
    Raises FeatureError naming the feature, what was got and what is expected.
    """
    if feature.kind == "dense":
        return _dense_row(feature, value)
    row = np.full(feature.length, KEY_MISSING, dtype=np.int64)
    keys = keys_of(f"feature {feature.name!r}", feature.type, value, feature.kind)
    keys = keys[-feature.length :] if feature.kind == "sequence" else keys[: feature.length]
    row[: len(keys)] = keys
    return row


def _dense_row(feature: Feature, value: Any) -> np.ndarray:
    if value is None:
        return np.full(feature.dim, feature.default, dtype=np.float32)
    numbers = np.asarray(value)
    if numbers.dtype.kind not in "biuf" or numbers.shape not in _dense_shapes(feature.dim):
        wanted = "a number" if feature.dim == 1 else f"a list of {feature.dim} numbers"
        raise FeatureError(f"feature {feature.name!r}: got {shortened(value)}, expected {wanted} (dense)")
    with np.errstate(over="ignore"):
        row = numbers.astype(np.float32).reshape(feature.dim)
    if not np.isfinite(row).all():
        raise FeatureError(
            f"feature {feature.name!r}: got {shortened(value)}, expected finite float32 numbers; "
            "leave the feature out (or None) when it is missing"
        )
    return row


def _dense_shapes(dim: int) -> tuple[tuple[int, ...], ...]:
    return ((), (1,)) if dim == 1 else ((dim,),)


def _slots(widths: list[tuple[Feature, int]]) -> Iterator[Slot]:
    start = 0
    for feature, width in widths:
        yield Slot(feature, start, start + width)
        start += width


def _wire(feature: Feature) -> WireTensor:
    if feature.kind == "dense":
        return WireTensor(feature.name, "FP32", (feature.dim,))
    return WireTensor(feature.name, "INT64", (feature.length,))


def _differences(path: str, a: Any, b: Any) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            below = f"{path}.{key}" if path else str(key)
            if key not in a or key not in b:
                yield f"{below}: " + ("present != absent" if key in a else "absent != present")
            else:
                yield from _differences(below, a[key], b[key])
        if list(a) != list(b):
            yield f"{path}: order ({', '.join(a)}) != ({', '.join(b)})"
    elif isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            yield f"{path}: {len(a)} entries != {len(b)} entries"
        for number, (left, right) in enumerate(zip(a, b)):
            yield from _differences(f"{path}.{number}", left, right)
    elif a != b or type(a) is not type(b):
        yield f"{path}: {a!r} != {b!r}"
