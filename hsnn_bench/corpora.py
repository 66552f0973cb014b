"""Corpora of any size from the simulated ads world of a run: its own ads first, then grown ones, encoded, in files.

A smaller corpus is the beginning of a larger one, so corpora of several sizes share their files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from export.stream_index import write_items
from hsnn_core.errors import DataError
from hsnn_train.checkpoint import Run
from hsnn_train.data.attributes import read_attributes
from hsnn_train.data.dataset import item_wire
from hsnn_train.data.synthetic import WorldConfig, grown_ads, world_of

PART = 1 << 17  # grown ads of one file


def world_config(data: Mapping[str, Any]) -> WorldConfig:
    """The world of a recipe's data section. Raises DataError when it is not a simulated one."""
    if data.get("adapter") != "synthetic":
        raise DataError(
            f"data.adapter: got {data.get('adapter')!r}, expected 'synthetic': only a simulated world can be grown"
        )
    return WorldConfig(**data.get("options", {}))


def corpus_files(run: Run, items: int, folder: Path, progress: bool = True) -> list[Path]:
    """Files of ``items`` encoded items under ``folder`` (see `stream_index`); those that are there are kept.

    Raises DataError for fewer items than the run was trained on.
    """
    config = world_config(run.recipe.data)
    own = len(run.item_ids)
    if items < own:
        raise DataError(f"a corpus of {items} items, expected at least the {own} that the run was trained on")
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "items-own.hsnn"]
    if not files[0].exists():
        write_items(files[0], run.items, run.item_ids, run.attributes)
    world = world_of(config)
    key = run.schema.item_key
    with tqdm(total=items - own, desc="items", unit="items", unit_scale=True, disable=not progress) as bar:
        for part, start in enumerate(range(0, items - own, PART)):
            count = min(PART, items - own - start)
            path = folder / (f"items-{part:05d}.hsnn" if count == PART else f"items-{part:05d}-{count}.hsnn")
            files.append(path)
            if not path.exists():
                table = grown_ads(world, config, part, PART).slice(0, count)
                ids = table.column(key).to_numpy()
                where = f"grown ads, part {part}"
                raw = item_wire(run.schema, table, where, ids)
                attributes = read_attributes(run.schema, table, where)
                write_items(path, run.transform.encode_items(raw), ids, attributes)
            bar.update(count)
    return files
