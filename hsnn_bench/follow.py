"""`hsnn bench follow`: what following a stream gives over a model that stands still.

The recipe's log is cut in time. A model is trained on the first part, then follows the rest, file by file; each file is
predicted before it is learnt from, by the model that follows and by the one as it was after the first part. Both
see the same histories, which go on, so what differs is the weights and the index alone.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from tqdm import tqdm

from hsnn_cli.commands_training import load_data, train_and_evaluate
from hsnn_cli.provenance import commit, machine
from hsnn_cli.tables import table
from hsnn_core.errors import SchemaError
from hsnn_core.files import write_bytes
from hsnn_train.checkpoint import write_json
from hsnn_train.data.columns import column, times_of
from hsnn_train.data.dataset import recipe_tables
from hsnn_train.follow import Follower
from hsnn_train.recipe import Recipe, load_recipe

from .plots import following

RESULTS = Path("docs/results")
BASE_SPLIT = {
    "by": "time",
    "fractions": [0.9, 0.1, 0.0],
}  # of the first part: the rest of the log is the test


def run_follow(data: str, files: int = 12, share: float = 0.5, results: Path = RESULTS) -> dict[str, Any]:
    """Measure, and write follow-<data>.{json,md,png} into ``results``; returns the report.

    Raises SchemaError for numbers out of range and for a log without times.
    """
    if files < 1 or not 0 < share < 1:
        raise SchemaError(
            f"--files, --share: got {files} and {share:g}, expected at least 1 and a share between 0 and 1"
        )
    recipe = load_recipe(data)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hsnn-follow-") as folder:
        base, simulated, rows = _cut(recipe, Path(folder), files, share)
        dataset = load_data(base)
        train_and_evaluate(base, dataset, Path(folder) / "run", evaluate=False)
        found = _compare(Path(folder))
    tasks = [task.name for task in recipe.schema.tasks]
    report: dict[str, Any] = {
        "data": recipe.name, "simulated": simulated, "seed": recipe.train.seed, "tasks": tasks,
        "command": f"hsnn bench follow --data {data} --files {files} --share {share:g}",
        "trained_first": rows, "files": found,
        "mean": {
            task: {kind: float(np.mean([row[kind][task]["ne"] for row in found])) for kind in ("still", "follows")}
            for task in tasks
        },
        "better": {
            task: sum(row["follows"][task]["ne"] < row["still"][task]["ne"] for row in found) for task in tasks
        },
        "machine": machine(), "commit": commit(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    path = results / f"follow-{recipe.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    following(report, path.with_suffix(".png"))
    write_bytes(path.with_suffix(".md"), _page(report).encode())
    return report


def _cut(recipe: Recipe, folder: Path, files: int, share: float) -> tuple[Recipe, bool, int]:
    """The log as tables of its first ``share`` and a stream of the rest: the recipe of the first part, whether the log
    is simulated, and how many impressions the first part has."""
    schema = recipe.schema
    log = recipe_tables(schema, recipe.data, recipe.base)
    if schema.time_key is None or log.unordered:
        raise SchemaError(f"recipe {recipe.name}: its log has no times (keys.time); a stream goes on in time")
    times = times_of(
        column(log.impressions, schema.time_key, "impressions", "keys.time"), schema.time_key, "impressions"
    )
    impressions = log.impressions.take(np.argsort(times, kind="stable"))
    first = round(share * len(impressions))
    names = {"impressions": impressions[:first], "items": log.items, "users": log.users}
    kept: dict[str, Any] = {name: f"{name}.parquet" for name, part in names.items() if part is not None}
    for name in kept:
        pyarrow.parquet.write_table(names[name], folder / f"{name}.parquet")
    (folder / "stream").mkdir()
    ends = np.linspace(first, len(impressions), files + 1).astype(int)
    for number, (start, stop) in enumerate(itertools.pairwise(ends)):
        pyarrow.parquet.write_table(impressions[start:stop], folder / "stream" / f"{number:04d}.parquet")
    data = kept | {"unknown_items": "drop"} | ({"history_by": log.history_by} if log.history_by else {})
    return replace(recipe, data=data, split=BASE_SPLIT, base=folder), log.simulated, first


def _compare(folder: Path) -> list[dict[str, Any]]:
    """Per file NE and calibration of the item layer by task, of the model that stands still and of the other."""
    follower = Follower(folder / "stream", folder / "live", folder / "run")
    model, state = copy.deepcopy(follower.model), follower.state
    rows = []
    for name in tqdm(follower.waiting(), desc="follow", unit="file"):
        found = follower.read(name)
        if found is None:
            continue
        still = follower.validate(found, model, state)
        row, _ = follower.take(name)
        assert row is not None
        rows.append(
            {"impressions": row["impressions"], "still": _last(still), "follows": _last(row["pointwise"])}
        )
    return rows


def _last(pointwise: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    layer = pointwise[-1]["layer"]
    return {
        row["task"]: {"ne": row["ne"], "calibration": row["calibration"]}
        for row in pointwise
        if row["layer"] == layer
    }


def _page(report: dict[str, Any]) -> str:
    tasks = report["tasks"]
    rows = [
        [
            number,
            row["impressions"],
            *(row[kind][task]["ne"] for task in tasks for kind in ("still", "follows")),
        ]
        for number, row in enumerate(report["files"], start=1)
    ]
    rows.append(
        ["mean", "", *(report["mean"][task][kind] for task in tasks for kind in ("still", "follows"))]
    )
    header = [
        "file",
        "impressions",
        *(f"{task}, {kind}" for task in tasks for kind in ("stands still", "follows")),
    ]
    better = ", ".join(f"{task} {report['better'][task]}" for task in tasks)
    return (
        f"# Following a stream: {report['data']}{' (simulated)' if report['simulated'] else ''}\n\n"
        f"`{report['command']}`\n\nNE of the item layer on each file of the stream before it was learnt from, by the "
        f"model as it was after the first {report['trained_first']:,} impressions and by the one that follows. In the "
        f"first file both are the same; of the {len(report['files']) - 1} others following is better in: {better}.\n\n"
        f"```\n{table(header, rows)}\n```\n\n"
        f"![NE by file](follow-{report['data']}.png)\n\n"
        f"Seed {report['seed']}; one thread; {report['machine']}; commit {report['commit']}; {report['date']}.\n"
    )
