"""Evaluation (paper §4): NE and calibration per layer and task, index health, and what `retrieval` reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hsnn_core.errors import DataError
from hsnn_core.schema import Schema
from hsnn_train.data.dataset import Dataset, Examples

from . import losses
from .batches import BatchMaker, IndexState, step_rng
from .checkpoint import without_nan
from .device import moved
from .ensemble import LayerEnsemble
from .hsnn import HSNN
from .metrics import calibration, normalised_entropy
from .recipe import Recipe
from .refresh import index_vectors
from .retrieval import retrieval
from .trainer import evaluation_batches

EVAL_BATCH = 1024


@dataclass(frozen=True)
class Pointwise:
    """Ensemble logits (N, S, T) of S labelled pairs, their labels (S, T), whether these tell anything (S, T) bool
    (`losses.told`) and, where parts are asked for, what the ensembles were given: MoNN logits (N, S, T) and the dense
    crossings that each layer's ensemble reads, N times (S, D)."""

    logits: np.ndarray
    labels: np.ndarray
    told: np.ndarray
    monn: np.ndarray | None = None
    crossings: tuple[np.ndarray, ...] = ()


@torch.inference_mode()
def pointwise(
    model: HSNN,
    batches: BatchMaker,
    examples: Examples,
    state: IndexState,
    seed: int,
    limit: int = 200_000,
    progress: str = "",
    parts: bool = False,
) -> Pointwise:
    """Logits of every layer for held-out impressions (and sampled negatives where training has them), with the
    hard codes that serving uses. At most ``limit`` examples, chosen by seed.
    ``parts``: those of `Pointwise`. ``progress`` names a progress bar. Raises DataError when there are no examples."""
    if not len(examples):
        raise DataError("no impressions to evaluate on: this split is empty; change the recipe's split:")
    model.eval()
    given = torch.from_numpy(batches.schema.given)
    rows = np.arange(len(examples.item_row))
    if len(rows) > limit:
        rows = np.sort(np.random.default_rng([seed, 4]).choice(rows, limit, replace=False))
    logits, labels, told, monn = [], [], [], []
    crossed: list[list[np.ndarray]] = [[] for _ in model.ensemble]
    starts = range(0, len(rows), EVAL_BATCH)
    for number, start in enumerate(tqdm(starts, desc=progress, disable=not progress)):
        batch = batches.make(
            examples, rows[start : start + EVAL_BATCH], state, step_rng(seed + 1_000_000, number)
        )
        out = model(moved(batch, model.device), None)
        chosen = batch.pairs.labelled.bool()
        logits.append(np.stack([layer.cpu()[chosen].numpy() for layer in out.logits]))
        labels.append(batch.pairs.labels[chosen].numpy())
        told.append(losses.told(batch.pairs.labels, batch.pairs.labelled, given)[chosen].bool().numpy())
        if not parts:
            continue
        monn.append(np.stack([layer.cpu()[chosen].numpy() for layer in out.monn]))
        for layer, ensemble in enumerate(model.ensemble):
            assert isinstance(ensemble, LayerEnsemble)
            dense = batch.pairs.cross_dense[layer] if ensemble.reads_crossings else None
            read = torch.empty(*chosen.shape, 0) if dense is None else dense
            crossed[layer].append(read[chosen].numpy())
    return Pointwise(
        np.concatenate(logits, axis=1),
        np.concatenate(labels),
        np.concatenate(told),
        np.concatenate(monn, axis=1) if parts else None,
        tuple(np.concatenate(of_layer) for of_layer in crossed) if parts else (),
    )


def base_rates(labels: np.ndarray, schema: Schema, negatives: int) -> np.ndarray:
    """Mean label per task of the training impressions, ``labels`` (S, T), and of the ``negatives`` drawn for each; of a
    task that is given another, of the impressions where the other's label is 1. (T,) float64: the constant NE divides
    by; NaN for a task without any label."""
    rates = labels.mean(0, dtype=np.float64) / (1 + negatives)
    for task in np.flatnonzero(schema.given >= 0):
        told = labels[:, schema.given[task]] > 0
        rates[task] = labels[told, task].mean(dtype=np.float64) if told.any() else np.nan
    return rates


def pointwise_report(values: Pointwise, rates: np.ndarray, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """NE and calibration, one row per layer and task. NE is null where the base rate makes it undefined, both where the
    task has no label."""
    rows = []
    for layer in range(len(values.logits)):
        for t, task in enumerate(tasks):
            told = values.told[:, t]
            z, y = values.logits[layer, told, t], values.labels[told, t]
            ne = normalised_entropy(z, y, float(rates[t])) if told.any() and 0 < rates[t] < 1 else None
            rows.append(
                {
                    "layer": layer + 1,
                    "task": task,
                    "ne": ne,
                    "calibration": calibration(z, y) if told.any() else None,
                }
            )
    return rows


def health_report(model: HSNN, dataset: Dataset, state: IndexState, alpha: float) -> list[dict[str, Any]]:
    """Index health of every index layer: its codewords, and the nodes (paths) that exist."""
    if model.lti is None:
        return []
    v = torch.from_numpy(index_vectors(model, dataset.items)).to(model.device)
    rows = []
    for layer, health in enumerate(model.lti.health(v, state.paths, alpha), start=1):
        nodes = len(np.unique(state.paths[:, :layer], axis=0))
        rows.append({"layer": layer, **asdict(health), "occupancy": health.occupancy, "nodes": nodes,
                     "collapsed": health.collapsed})  # fmt: skip
    return rows


def evaluate(
    model: HSNN,
    dataset: Dataset,
    recipe: Recipe,
    state: IndexState,
    split: str = "test",
    progress: bool = True,
) -> dict[str, Any]:
    """Everything the evaluation reports, as plain JSON values; what is undefined (no positives) is None.

    Raises DataError when the split is empty.
    """
    t = recipe.train
    batches = evaluation_batches(dataset, recipe)
    tasks = [task.name for task in recipe.schema.tasks]
    examples: Examples = getattr(dataset, split)
    rates = base_rates(dataset.train.labels, recipe.schema, t.negatives)
    hard = pointwise(model, batches, examples, state, t.seed, progress="evaluate" if progress else "")
    report: dict[str, Any] = {
        "split": split,
        "rows": {name: len(getattr(dataset, name).item_row) for name in ("train", "valid", "test")},
        "items": len(dataset.item_keys),
        "base_rates": dict(zip(tasks, map(float, rates))),
        "pointwise": pointwise_report(hard, rates, tasks),
        "index": health_report(model, dataset, state, t.max_alpha),
    }
    report["retrieval"] = retrieval(model, dataset, recipe, state, split, progress)
    plain: dict[str, Any] = without_nan(report)
    return plain
