"""The tiny world as a finished run on files, and what comes after it as a stream of files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from tiny_world import recipe, tables

from hsnn_train.data.dataset import load_dataset
from hsnn_train.trainer import Trainer

BASE_ROWS, FILE_ROWS = 900, 100


def write_base(
    folder: Path,
    positives: bool = False,
    model: dict | None = None,
    schema: dict | None = None,
    **train: object,
) -> Path:
    """Tables of the first impressions, or of their clicks alone, and a run trained on them; returns the run."""
    log = tables()
    first = log.impressions[:BASE_ROWS]
    written = {"impressions": clicks(first) if positives else first, "users": log.users, "items": log.items}
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in written.items():
        pa.parquet.write_table(table, folder / f"{name}.parquet")
    made = recipe(train={"max_steps": 6, **train}, model=model or {}, schema=schema or {})
    made = replace(made, data={name: f"{name}.parquet" for name in written}, base=folder)
    data = load_dataset(made.schema, made.data, made.split, made.base, seed=1, progress=False)
    Trainer(made, data, folder / "run", progress=False).train()
    return folder / "run"


def clicks(table: pa.Table) -> pa.Table:
    """The impressions that were clicked."""
    return table.filter(pa.array(np.asarray(table["click"]) == 1))


def later(number: int) -> pa.Table:
    """The impressions of the stream's file ``number``, from 0."""
    start = BASE_ROWS + FILE_ROWS * number
    return tables().impressions[start : start + FILE_ROWS]


def arrive(stream: Path, table: pa.Table, name: str) -> None:
    """A file appears by rename."""
    stream.mkdir(exist_ok=True)
    pa.parquet.write_table(table, stream / ".aside")
    (stream / ".aside").rename(stream / name)


def with_column(table: pa.Table, name: str, values: object) -> pa.Table:
    """The table with other values in a column."""
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def grown_items(folder: Path, new_key: int, without: int) -> None:
    """The items table with a further item, and without one."""
    items = pa.parquet.read_table(folder / "items.parquet")
    kept = items.filter(pa.array(np.asarray(items["item_id"]) != without))
    new = with_column(items[:1], "item_id", [new_key]).cast(items.schema)
    pa.parquet.write_table(pa.concat_tables([new, kept]), folder / "aside")
    (folder / "aside").rename(folder / "items.parquet")
