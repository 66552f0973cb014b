"""Rows of an item table -> item updates, with the columns that the schema names, as training reads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, date, datetime, time
from typing import Any

from hsnn_core.errors import DataError
from hsnn_core.schema import ITEM_SPACE, Schema

_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")
SEPARATOR = "|"  # between the values of a list in a text column
SEQUENCE, DELETED = "sequence", "deleted"


class ItemRows:
    """Reads the rows of one table.

    The item's key is in the schema's key column; features, attributes and the bid in columns of their names (a range
    in its two). A column `sequence` has the update's sequence number, a true value in a column `deleted` makes it a
    delete, unless these are names of the schema. All else is left out, and remembered in ``unused``."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.unused: set[str] = set()
        self._features = {feature.name: feature for feature in schema.item_features}
        self._attributes = {name: a for a in schema.eligibility for name in a.columns}
        self._bid = {schema.bid} if schema.bid is not None else set()
        named = {schema.item_key, *self._features, *self._attributes, *self._bid}
        self._own = {SEQUENCE, DELETED} - named
        self.columns: set[str] = named | self._own
        optional = {
            f.name
            for f in schema.item_features
            if f.derive_from is not None
            or (f.encoding == ITEM_SPACE and f.kind == "sparse" and f.length == 1)
        }
        self._required = sorted(named - optional)

    def check(self, columns: Collection[str], where: str) -> None:
        """DataError unless these are columns that an upsert needs: it says all that is known of an item."""
        missing = [name for name in self._required if name not in columns]
        if missing:
            raise DataError(
                f"{where}: no column {', '.join(missing)}, got {', '.join(sorted(columns))}; an upsert replaces all "
                "that is known of an item, so every column of the schema is needed (empty where a value is unknown)"
            )

    def update(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The update in a row of typed values; None is missing. What is wrong with a value the server will say."""
        key = row.get(self.schema.item_key)
        update: dict[str, Any] = {} if key is None else {"id": key}
        if SEQUENCE in self._own and row.get(SEQUENCE) is not None:
            update[SEQUENCE] = row[SEQUENCE]
        if DELETED in self._own and row.get(DELETED):
            return update | {DELETED: True}
        self.unused |= row.keys() - self.columns
        update["features"] = {name: row[name] for name in self._features if row.get(name) is not None}
        eligibility: dict[str, Any] = {}
        for attribute in self.schema.eligibility:
            values = [_seconds(row.get(name)) for name in attribute.columns]
            if any(value is not None for value in values):
                value = values if attribute.kind == "range" else values[0]
                eligibility[attribute.name] = _flag(value) if attribute.kind == "flag" else value
        if eligibility:
            update["eligibility"] = eligibility
        if self._bid and row.get(str(self.schema.bid)) is not None:
            update["bid"] = row[str(self.schema.bid)]
        return update

    def typed(self, row: Mapping[str, str | None]) -> dict[str, Any]:
        """A row of texts (CSV) with the types of the schema: empty is None, lists are separated by `|`. Text that is
        not of its type stays text."""
        return {name: self._typed(name, text) for name, text in row.items() if text}

    def _typed(self, name: str, text: str) -> Any:
        feature = self._features.get(name)
        if feature is not None:
            number = float if feature.kind == "dense" else int
            text_keys = feature.kind != "dense" and feature.type == "string"
            if max(feature.length, feature.dim) > 1:
                return [part if text_keys else _number(number, part) for part in text.split(SEPARATOR)]
            return text if text_keys else _number(number, text)
        attribute = self._attributes.get(name)
        if attribute is not None:
            if attribute.kind == "set":
                parts = text.split(SEPARATOR)
                return parts if attribute.type == "string" else [_number(int, part) for part in parts]
            if attribute.kind == "range":
                return _number(float, text)
            if attribute.kind == "flag" or attribute.type == "string":
                return text
            return _number(int, text)
        if name == self.schema.item_key:
            return text if self.schema.item_key_type == "string" else _number(int, text)
        if name in self._bid:
            return _number(float, text)
        if name in self._own:
            return _number(int, text) if name == SEQUENCE else _flag(text)
        return text


def is_update(row: Any, schema: Schema) -> bool:
    """Whether an object of a JSON line is an update as the server takes it rather than a row of an item table."""
    if not isinstance(row, Mapping):
        return True
    entries = {"id", SEQUENCE, DELETED, "features", "eligibility", "bid"}
    return schema.item_key not in row or (set(row) <= entries and bool({"features", DELETED} & set(row)))


def _number(kind: type[int] | type[float], text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text


def _flag(value: Any) -> Any:
    if isinstance(value, str) and value.lower() in (*_TRUE, *_FALSE):
        return value.lower() in _TRUE
    return bool(value) if value in (0, 1) else value


def _seconds(value: Any) -> Any:
    """Dates and times as seconds since 1970, those without a zone in UTC, as in the item table."""
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return value
