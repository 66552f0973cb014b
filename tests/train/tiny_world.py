"""A small world with structure: clicks depend on the user's group, the item's category and the history."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from hsnn_core.schema import Schema
from hsnn_train.data.tables import LogTables
from hsnn_train.recipe import recipe_from_dict

SCHEMA = {
    "name": "tiny",
    "keys": {"user": "user_id", "item": "item_id", "time": "t"},
    "tasks": [{"name": "click"}, {"name": "conversion", "weight": 0.5}],
    "features": {
        "user": {
            "age": {"kind": "dense"},
            "group": {"kind": "sparse", "range": 4},
            "history": {"kind": "sequence", "of": "item", "length": 5, "from": "click"},
        },
        "item": {
            "item": {"kind": "sparse", "of": "item"},
            "category": {"kind": "sparse", "vocab": 20, "max": 2},
            "shop": {"kind": "sparse", "vocab": 8},
            "price": {"kind": "dense"},
            "next": {"kind": "sparse", "of": "item", "max": 4, "from": "click"},
        },
    },
    "interactions": {
        "topics": {"user": "history", "item": "category"},
        "seen": {"user": "history", "item": "item", "nodes": "members"},
        "led": {
            "user": "history",
            "via": "next",
            "item": "item",
            "matches": 1,
            "fade": 0.8,
            "nodes": "members",
        },
    },
}


class Bar:
    """A progress bar that nobody sees."""

    def set_description(self, text: str) -> None:
        pass


def tables(users: int = 60, items: int = 120, rows: int = 1500, seed: int = 0) -> LogTables:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(10 * items)[:items]
    category = rng.integers(0, 12, items)
    group = rng.integers(0, 4, users)
    u, i = rng.integers(0, users, rows), rng.integers(0, items, rows)
    p = 1 / (1 + np.exp(1.5 - 3.0 * (category[i] % 4 == group[u])))
    click = (rng.random(rows) < p).astype(np.int64)
    impressions = pa.table(
        {
            "user_id": u, "item_id": ids[i], "t": np.arange(rows),
            "click": click, "conversion": click * (rng.random(rows) < 0.4),
        }
    )  # fmt: skip
    people = pa.table({"user_id": np.arange(users), "age": rng.random(users), "group": group})
    things = pa.table(
        {
            "item_id": ids, "category": [[int(c), int(c) // 4 + 12] for c in category],
            "shop": category % 8, "price": rng.random(items),
        }
    )  # fmt: skip
    return LogTables(Schema.from_dict(SCHEMA), impressions, people, things)


def recipe(**sections: dict):
    raw = {
        "schema": SCHEMA,
        "data": {},
        "model": {"layers": ["small", "small", "two_tower_xs"], "codebooks": [6, 3], "pool": 3},
        "train": {
            "max_steps": 24,
            "batch_size": 64,
            "refresh_steps": 5,
            "checkpoint_steps": 1000,
            "lr": 0.01,
        },
        "search": {"widths": [4, 8], "k": 10, "max_k": 50, "requests": 40},
    }
    for name, values in sections.items():
        raw[name] = {**raw[name], **values}
    return recipe_from_dict(raw, "tiny", Path())
