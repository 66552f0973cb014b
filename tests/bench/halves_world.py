"""A small log of two groups of users, each of which visits the items of its own half."""

import numpy as np
import pyarrow as pa

from hsnn_core.schema import Schema
from hsnn_train.data.tables import LogTables

SCHEMA = {
    "name": "halves",
    "keys": {"user": "user", "item": "item", "time": "t"},
    "tasks": [{"name": "visit"}],
    "features": {
        "user": {"history": {"kind": "sequence", "of": "item", "length": 6, "from": "visit"}},
        "item": {"item": {"kind": "sparse", "of": "item"}},
    },
}


def log(users: int = 40, items: int = 24, visits: int = 8) -> LogTables:
    """Every user visits ``visits`` distinct items of the half of their parity, in random order."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(users), visits)
    item = np.concatenate([2 * rng.permutation(items // 2)[:visits] + u % 2 for u in range(users)])
    impressions = pa.table(
        {"user": user, "item": item, "t": np.arange(len(user)), "visit": np.ones_like(user)}
    )
    return LogTables(Schema.from_dict(SCHEMA), impressions, None, pa.table({"item": np.arange(items)}))
