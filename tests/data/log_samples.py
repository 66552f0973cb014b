"""A tiny log of two users and three items, and its schema."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from hsnn_core.schema import Schema
from hsnn_train.data.tables import LogTables

SCHEMA: dict[str, Any] = {
    "name": "tiny",
    "keys": {"user": "user_id", "item": "item_id", "time": "time"},
    "tasks": [{"name": "click"}, {"name": "buy"}],
    "features": {
        "user": {
            "age": {"kind": "dense", "default": 30.0},
            "hour": {"kind": "sparse", "range": 24},
            "history": {"kind": "sequence", "of": "item", "length": 2, "from": "click"},
        },
        "item": {
            "item": {"kind": "sparse", "of": "item"},
            "topics": {"kind": "sparse", "vocab": 10, "max": 2, "type": "string"},
        },
    },
    "interactions": {"topics": {"user": "history", "item": "topics", "matches": 2}},
}


def schema(**changes: Any) -> Schema:
    """The tiny schema, with top-level sections replaced."""
    return Schema.from_dict({**SCHEMA, **changes})


def impressions(**changes: Any) -> pa.Table:
    """Six impressions; user 1 clicks 10, 20 and 30, user 2 clicks 10. A column that is None is removed."""
    columns: dict[str, Any] = {
        "user_id": [1, 2, 1, 1, 2, 1],
        "item_id": [10, 10, 20, 30, 20, 30],
        "time": [100, 110, 120, 130, 140, 150],
        "hour": [1, 2, 3, 4, 5, 6],
        "click": [1, 1, 1, 0, 0, 1],
        "buy": [0, 1, 0, 0, 0, 1],
    }
    columns.update(changes)
    return pa.table({name: values for name, values in columns.items() if values is not None})


def users(**changes: Any) -> pa.Table:
    return pa.table({"user_id": [2, 1], "age": [50.0, 20.0], **changes})


def items(**changes: Any) -> pa.Table:
    return pa.table({"item_id": [30, 10, 20], "topics": [["x"], ["x", "y"], None], **changes})


def tables(**changes: Any) -> LogTables:
    """The tiny log; any field of LogTables may be replaced."""
    fields = {"schema": schema(), "impressions": impressions(), "users": users(), "items": items()}
    return LogTables(**{**fields, **changes})
