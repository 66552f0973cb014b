"""Retrieval over the whole corpus (paper §4): Recall@K and NDCG@K through the search that serves, search recall against
the exhaustive twin, and what the beam kept at every layer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from hsnn_core.corpus import Corpus, build_corpus
from hsnn_core.exhaustive import exhaustive
from hsnn_core.features import Encoded
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import SearchResult, search
from hsnn_train.data.dataset import Dataset

from .batches import IndexState
from .hsnn import HSNN
from .metrics import ndcg_at, recall_at, search_recall
from .recipe import Recipe
from .runner import TorchRunner

RECALL_AT = (10, 50, 100, 500, 1000)


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
