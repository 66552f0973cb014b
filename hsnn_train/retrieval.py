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
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import SearchResult, search
from hsnn_train.data.dataset import Dataset
from hsnn_train.data.requests import evaluation_requests

from .batches import IndexState
from .hsnn import HSNN
from .metrics import ndcg_at, recall_at, search_recall
from .recipe import Recipe
from .runner import TorchRunner

RECALL_AT = (10, 20, 50, 100, 500, 1000)
NDCG_AT = (10, 20)
USERS_PER_CALL = 16


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
    """Recall@K and NDCG@K of the layer-wise search over the whole corpus at the recipe's widths, the exhaustive
    twin's beside it, search recall, and per layer the share of true items whose ancestor the beam kept.

    Requests and the items that are candidates for each of them (`search.candidates`, for the search and its twin
    alike) are those of `hsnn_train.data.requests`; they are sampled by the recipe's seed. ``positives_dropped``
    are those that were no candidates, ``requests_dropped`` had no others. Without any request: requests 0 and
    these counts, no more.
    """
    requests = evaluation_requests(dataset, split, recipe.search.candidates, recipe.search.requests)
    wanted = [dataset.item_keys[rows] for rows in requests.wanted]
    corpus = corpus_of(model, dataset, state)
    scorer = LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, TorchRunner(model))
    rank = recipe.schema.rank
    widths = list(recipe.search.widths[: model.layers - 1])
    k = min(recipe.search.max_k, requests.items)
    report: dict[str, Any] = {
        "requests": len(requests),
        "requests_dropped": requests.asked - len(requests),
        "positives": requests.positives,
        "positives_dropped": requests.positives - sum(map(len, wanted)),
        "candidates": recipe.search.candidates,
        "widths": widths,
        "corpus": requests.items,
    }
    if not wanted:
        return report
    found, exact = [], []
    eligible, seconds = 0, 0.0
    for start in tqdm(range(0, len(requests), USERS_PER_CALL), desc="retrieve", disable=not progress):
        part = slice(start, start + USERS_PER_CALL)
        users, candidates, allowed = requests.asked_of(part, corpus.index)
        eligible += int(candidates.sum())
        began = time.perf_counter()
        found.append(search(corpus.index, scorer, users, widths, k, rank, allowed, adapt=False))
        seconds += time.perf_counter() - began
        if model.layers > 1:
            # Its traces name every node of every layer per request; nobody reads them, and they fill memory.
            exact.append(replace(exhaustive(corpus.index, scorer, users, k, rank, allowed), layers=()))
    if model.layers == 1:
        exact = found  # without a beam the search is exhaustive itself
    ks = [n for n in RECALL_AT if n <= k]
    for name, results in (("search", found), ("exhaustive", exact)):
        ids, valid = _stack(results)
        report[name] = {f"recall@{n}": recall_at(ids, valid, wanted, n) for n in ks} | {
            f"ndcg@{n}": ndcg_at(ids, valid, wanted, n) for n in NDCG_AT if n <= k
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
    report["candidates_per_request"] = eligible / len(requests)
    report["scored_share"] = sum(int(r.layers[-1].candidates.sum()) for r in found) / eligible
    report["seconds_per_request"] = seconds / len(requests)
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
