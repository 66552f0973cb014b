"""`hsnn bench throughput`: what learning the index jointly costs training.

The same model is trained for the same steps with the index learnt jointly (LTI) and with k-means beside it, turn by
turn in one process. A time is that of a whole training, refreshes and k-means included; with a pool both begin
where the index's losses do, for before that the two do the same.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hsnn_cli.commands_training import load_data
from hsnn_cli.provenance import commit, machine
from hsnn_cli.tables import table
from hsnn_core.errors import SchemaError
from hsnn_core.files import write_bytes
from hsnn_train.checkpoint import write_json
from hsnn_train.data.dataset import Dataset
from hsnn_train.recipe import Recipe, load_recipe
from hsnn_train.trainer import Trainer

from .ours import changed

RESULTS = Path("docs/results")
METHODS = {"joint": "JOIM with LTI", "kmeans": "the same model, k-means index"}


def run_throughput(data: str, steps: int = 60, rounds: int = 5, results: Path = RESULTS) -> dict[str, Any]:
    """Measure, and write throughput-<data>.{json,md} into ``results``; returns the report.

    Raises SchemaError for numbers below 1 and for a recipe without learnt codebooks.
    """
    for name, value in (("--steps", steps), ("--rounds", rounds)):
        if value < 1:
            raise SchemaError(f"{name}: got {value}, expected at least 1")
    recipe = load_recipe(data)
    if not recipe.model.codebooks:
        raise SchemaError(f"recipe {recipe.name}: has no model.codebooks, so no index is learnt")
    dataset = load_data(recipe)
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    with tqdm(total=rounds * len(METHODS), desc="throughput", unit="training") as bar:
        for _ in range(rounds):
            for method in METHODS:
                seconds[method].append(_training(recipe, dataset, method, steps))
                bar.update()
    ratios = [alone / joint for joint, alone in zip(seconds["joint"], seconds["kmeans"])]
    impressions = steps * recipe.train.batch_size
    report: dict[str, Any] = {
        "data": recipe.name, "simulated": dataset.simulated, "layers": list(recipe.model.layers),
        "seed": recipe.train.seed,
        "command": f"hsnn bench throughput --data {data} --steps {steps} --rounds {rounds}",
        "rows": [
            {"method": method, "label": label, "seconds": seconds[method],
             "impressions_per_second": impressions / float(np.median(seconds[method]))}
            for method, label in METHODS.items()
        ],
        "ratio": float(np.median(ratios)), "ratio_range": [min(ratios), max(ratios)],
        "machine": machine(), "commit": commit(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    path = results / f"throughput-{recipe.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    write_bytes(path.with_suffix(".md"), _page(report).encode())
    return report


def _training(recipe: Recipe, dataset: Dataset, method: str, steps: int) -> float:
    """Seconds of one training of ``steps`` steps, into a folder that is removed."""
    changes = {"model.index": method, "train.max_steps": steps, "train.init_at": 0.0, "train.held": 0.0}
    with tempfile.TemporaryDirectory(prefix="hsnn-throughput-") as folder:
        trainer = Trainer(changed(recipe, changes), dataset, Path(folder), progress=False)
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began


def _page(report: dict[str, Any]) -> str:
    low, high = report["ratio_range"]
    rows = [[row["label"], row["impressions_per_second"]] for row in report["rows"]]
    rounds = len(report["rows"][0]["seconds"])
    return (
        f"# Training throughput with the index learnt jointly: {report['data']}"
        f"{' (simulated)' if report['simulated'] else ''}\n\n"
        f"`{report['command']}`\n\n```\n{table(['training', 'impressions per second, median'], rows)}\n```\n\n"
        f"JOIM over the same model without LTI: **{report['ratio']:.3f}** (median of {rounds} pairs, {low:.3f} to "
        f"{high:.3f}).\n\nLayers {', '.join(report['layers'])}; seed {report['seed']}; one thread; "
        f"{report['machine']}; commit {report['commit']}; {report['date']}.\n"
    )
