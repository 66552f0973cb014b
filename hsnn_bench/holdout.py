"""The data that tuning sees: validation requests, never test.

Most recipes have a validation split. A split published without one (Gowalla) lends a share of every user's train
positives to validation; the test impressions are left out altogether.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from hsnn_core.errors import DataError
from hsnn_train.data.adapters import adapt
from hsnn_train.data.columns import column, keys_of
from hsnn_train.data.dataset import Dataset, build_dataset, load_dataset
from hsnn_train.data.splits import Split
from hsnn_train.data.tables import LogTables
from hsnn_train.recipe import Recipe

SHARE = 0.1


def tuning_dataset(recipe: Recipe, seed: int) -> Dataset:
    """The recipe's data set when its split has a valid part, else `held_out` of its tables.

    Raises DataError where there is neither: only a split `by: column` of an adapter's log without time can lend.
    """
    dataset = load_dataset(recipe.schema, recipe.data, recipe.split, recipe.base, recipe.train.seed)
    if (dataset.valid.labels[:, 0] > 0).any():
        return dataset
    split = Split.from_dict(recipe.split)
    if split.by != "column" or recipe.schema.time_key is not None or "adapter" not in recipe.data:
        raise DataError(
            "tuning: the split has no positives in valid; change the recipe's split: to one that has, for example "
            "{by: time, fractions: [0.8, 0.1, 0.1]}"
        )
    tables = held_out(adapt(recipe.schema, recipe.data, recipe.base), split, SHARE, seed)
    return build_dataset(recipe.schema, tables, split, recipe.train.seed)


def held_out(tables: LogTables, split: Split, share: float, seed: int) -> LogTables:
    """The train impressions of a log divided by column, ``share`` of every user's (rounded down) moved to valid
    at random. They stand last, for without a time column the order of the rows is that of time, and a
    validation request's history is to hold all that is left in train.
    """
    schema, where = tables.schema, tables.where("impressions")
    parts = np.asarray(column(tables.impressions, split.column, where, "split.column").to_pylist())
    impressions = tables.impressions.filter(pa.array(parts == "train"))
    if not impressions.num_rows:
        raise DataError(f"{where}: column {split.column!r} has no train")
    users = keys_of(column(impressions, schema.user_key, where, "keys.user"), schema.user_key, where)
    order = np.lexsort((np.random.default_rng([seed, 5]).random(len(users)), users))
    _, start, count = np.unique(users[order], return_index=True, return_counts=True)
    rank = np.arange(len(users)) - np.repeat(start, count)
    lent = np.empty(len(users), bool)
    lent[order] = rank < np.repeat((share * count).astype(np.int64), count)
    names = pa.array(np.where(lent, "valid", "train").tolist(), pa.string())
    at = impressions.column_names.index(split.column)
    divided = impressions.set_column(at, split.column, names)
    divided = divided.take(pa.array(np.argsort(lent, kind="stable")))
    return replace(tables, impressions=divided)
