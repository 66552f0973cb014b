"""Evaluation (paper §4): NE and calibration per layer and task, Recall@K over the whole corpus through the search
that serves, search recall against the exhaustive twin, and index health."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hsnn_core.corpus import Corpus, build_corpus
from hsnn_core.errors import DataError
from hsnn_core.exhaustive import exhaustive
from hsnn_core.features import Encoded
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import SearchResult, search
from hsnn_train.data.dataset import Dataset, Examples

from .batches import BatchMaker, IndexState, step_rng
from .checkpoint import without_nan
from .hsnn import HSNN
from .lti import index_health
from .metrics import calibration, ndcg_at, normalised_entropy, recall_at, search_recall
from .recipe import Recipe
from .refresh import index_vectors
from .runner import TorchRunner
from .trainer import make_batches

RECALL_AT = (10, 50, 100, 500, 1000)
EVAL_BATCH = 1024


@dataclass(frozen=True)
class Pointwise:
    """Ensemble logits (N, S, T) of S labelled pairs and their labels (S, T)."""

    logits: np.ndarray
    labels: np.ndarray


@torch.inference_mode()
def pointwise(
    model: HSNN,
    batches: BatchMaker,
    examples: Examples,
    state: IndexState,
    seed: int,
    alpha: float | None = None,
    limit: int = 200_000,
    progress: str = "",
) -> Pointwise:
    """Logits of every layer for held-out impressions (and sampled negatives where training has them), with the
    hard codes that serving uses, or softly at ``alpha``. At most ``limit`` examples, chosen by seed.
    ``progress`` names a progress bar. Raises DataError when there are no examples."""
    if not len(examples):
        raise DataError("no impressions to evaluate on: this split is empty; change the recipe's split:")
    model.eval()
    rows = np.arange(len(examples.item_row))
    if len(rows) > limit:
        rows = np.sort(np.random.default_rng([seed, 4]).choice(rows, limit, replace=False))
    logits, labels = [], []
    parts = range(0, len(rows), EVAL_BATCH)
    for number, start in enumerate(tqdm(parts, desc=progress, disable=not progress)):
        batch = batches.make(
            examples, rows[start : start + EVAL_BATCH], state, step_rng(seed + 1_000_000, number)
        )
        out = model(batch, alpha)
        chosen = batch.labelled.bool()
        logits.append(np.stack([layer[chosen].numpy() for layer in out.logits]))
        labels.append(batch.labels[chosen].numpy())
    return Pointwise(np.concatenate(logits, axis=1), np.concatenate(labels))


def base_rates(dataset: Dataset, negatives: int) -> np.ndarray:
    """Mean label per task of the training pairs, sampled negatives included, (T,): the constant NE divides by."""
    rates: np.ndarray = dataset.train.labels.mean(0, dtype=np.float64) / (1 + negatives)
    return rates


def pointwise_report(values: Pointwise, rates: np.ndarray, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """NE and calibration, one row per layer and task. NE is null where the base rate makes it undefined."""
    rows = []
    for layer in range(len(values.logits)):
        for t, task in enumerate(tasks):
            z, y = values.logits[layer, :, t], values.labels[:, t]
            ne = normalised_entropy(z, y, float(rates[t])) if 0 < rates[t] < 1 else None
            rows.append({"layer": layer + 1, "task": task, "ne": ne, "calibration": calibration(z, y)})
    return rows


@torch.no_grad()
def calibrate(model: HSNN, values: Pointwise) -> None:
    """Shift every layer's and task's ensemble bias so that the predicted mean of ``values`` (a validation split)
    equals the observed mean: the one correction that no ranking notices."""
    for layer, ensemble in enumerate(model.ensemble):
        for t in range(model.tasks):
            z = values.logits[layer, :, t].astype(np.float64)
            observed = float(values.labels[:, t].mean(dtype=np.float64))
            if 0.0 < observed < 1.0:
                ensemble.bias[t] += _shift(z, observed)  # type: ignore[index, operator]


def _shift(logits: np.ndarray, observed: float) -> float:
    """delta with mean sigmoid(logits + delta) = observed, by bisection."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        if float(np.mean(1 / (1 + np.exp(-(logits + middle))))) < observed:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def corpus_of(model: HSNN, dataset: Dataset, state: IndexState) -> Corpus:
    """The searchable corpus of a model as it stands, by the code that export uses, over the torch item tower."""
    return build_corpus(
        dataset.schema, dataset.transform, dataset.items, dataset.item_keys, TorchRunner(model).item_tower,
        model.codebooks(), model.codeword_projection(),
        paths=state.paths if model.index.method == "hierarchy" else None,
    )  # fmt: skip


def retrieval(
    model: HSNN,
    dataset: Dataset,
    recipe: Recipe,
    state: IndexState,
    split: str = "test",
    progress: bool = False,
) -> dict[str, Any]:
    """Recall@K and NDCG@10 of the layer-wise search over the whole corpus at the recipe's widths, the exhaustive
    twin's beside it, search recall, and per layer the share of true items whose ancestor the beam kept.

    Users are sampled by the recipe's seed. Without a user who has a positive in the split: requests 0, no more.
    """
    users, wanted_rows = dataset.relevant(split, recipe.search.requests)
    wanted = [dataset.item_keys[rows] for rows in wanted_rows]
    corpus = corpus_of(model, dataset, state)
    scorer = LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, TorchRunner(model))
    rank = recipe.schema.rank
    widths = list(recipe.search.widths[: model.layers - 1])
    k = min(recipe.search.max_k, len(dataset.item_keys))
    report: dict[str, Any] = {"requests": len(wanted), "widths": widths, "corpus": len(dataset.item_keys)}
    if not wanted:
        return report
    found, exact = [], []
    seconds = 0.0
    for start in tqdm(range(0, len(wanted), 16), desc="retrieve", disable=not progress):
        part = Encoded(users.dense[start : start + 16], users.ids[start : start + 16])
        began = time.perf_counter()
        found.append(search(corpus.index, scorer, part, widths, k, rank))
        seconds += time.perf_counter() - began
        # Its traces name every node of every layer per request; nobody reads them, and they would fill memory.
        exact.append(replace(exhaustive(corpus.index, scorer, part, k, rank), layers=()))
    ks = [n for n in RECALL_AT if n <= k]
    for name, results in (("search", found), ("exhaustive", exact)):
        ids, valid = _stack(results)
        report[name] = {f"recall@{n}": recall_at(ids, valid, wanted, n) for n in ks} | {
            "ndcg@10": ndcg_at(ids, valid, wanted, 10)
        }
    report["search_recall"] = {f"@{n}": _search_recall_at(found, exact, n) for n in ks}
    report["per_layer"] = [
        {
            "layer": layer,
            "true_item_kept": kept_share(corpus, layer, found, wanted),
            "exhaustive_top_kept": {
                f"@{n}": kept_share(corpus, layer, found, _tops(exact, n)) for n in ks if n in (10, 100)
            },
        }
        for layer in range(1, model.layers)
    ]
    report["scored_share"] = _scored_share(found, corpus)
    report["seconds_per_request"] = seconds / len(wanted)
    return report


def kept_share(
    corpus: Corpus, layer: int, found: Sequence[SearchResult], items: Sequence[np.ndarray]
) -> float:
    """Recall of the beam above the items: the share of ``items`` (external ids, per request) whose ancestor at
    ``layer`` is among the nodes the search kept there, averaged over requests that have any."""
    order = np.argsort(corpus.index.item_ids)
    ancestors = corpus.index.ancestors(layer)
    kept = [nodes for result in found for nodes in result.layers[layer - 1].nodes]
    shares = []
    for nodes, wanted in zip(kept, items):
        if len(wanted):
            position = order[np.searchsorted(corpus.index.item_ids, wanted, sorter=order)]
            shares.append(float(np.isin(ancestors[position], nodes).mean()))
    return float(np.mean(shares)) if shares else float("nan")


def _tops(results: Sequence[SearchResult], k: int) -> list[np.ndarray]:
    """Per request its first k item ids."""
    ids, valid = _stack(results)
    return [row[: min(k, count)] for row, count in zip(ids, valid)]


def _stack(results: Sequence[SearchResult]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([r.item_ids for r in results]), np.concatenate([r.valid for r in results])


def _search_recall_at(found: Sequence[SearchResult], exact: Sequence[SearchResult], k: int) -> float:
    ids, valid = _stack(found)
    best, best_valid = _stack(exact)
    return search_recall(ids[:, :k], np.minimum(valid, k), best[:, :k], np.minimum(best_valid, k))


def _scored_share(found: Sequence[SearchResult], corpus: Corpus) -> float:
    """Share of the items that the item layer scored, averaged over requests."""
    scored = np.concatenate([np.asarray(r.layers[-1].candidates) for r in found])
    return float(scored.mean() / corpus.index.items)


def health_report(model: HSNN, dataset: Dataset, state: IndexState, alpha: float) -> list[dict[str, Any]]:
    """Index health of every index layer: its codewords, and the nodes (paths) that exist."""
    if model.lti is None:
        return []
    v = torch.from_numpy(index_vectors(model, dataset.items))
    with torch.inference_mode():
        soft = model.lti.eval()(v, alpha).mapping
    rows = []
    for layer, size in enumerate(model.lti.sizes, start=1):
        hard = torch.from_numpy(state.paths[:, layer - 1].astype(np.int64))
        health = index_health(hard, size, soft[layer - 1])
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
    batches = make_batches(dataset, recipe)
    tasks = [task.name for task in recipe.schema.tasks]
    examples: Examples = getattr(dataset, split)
    rates = base_rates(dataset, t.negatives)
    hard = pointwise(model, batches, examples, state, t.seed, progress="evaluate" if progress else "")
    report: dict[str, Any] = {
        "split": split,
        "rows": {name: len(getattr(dataset, name).item_row) for name in ("train", "valid", "test")},
        "items": len(dataset.item_keys),
        "base_rates": dict(zip(tasks, map(float, rates))),
        "pointwise": pointwise_report(hard, rates, tasks),
        "index": health_report(model, dataset, state, t.max_alpha),
    }
    if recipe.model.index == "joint" and model.lti is not None:
        name = "evaluate, soft index" if progress else ""
        soft = pointwise(model, batches, examples, state, t.seed, alpha=t.max_alpha, progress=name)
        report["pointwise_soft"] = pointwise_report(soft, rates, tasks)
    report["retrieval"] = retrieval(model, dataset, recipe, state, split, progress)
    plain: dict[str, Any] = without_nan(report)
    return plain
