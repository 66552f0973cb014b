"""The two-tower's own deployment: approximate nearest neighbours by Faiss over its item vectors.

Exhaustive inner products, an inverted file (IVF) and a navigable small-world graph (HNSW). The approximate ones
are tuned on validation requests: of the settings that find at least ``target`` of the exhaustive top K, the one
of the least time per request. Requests are answered one by one on one thread, as a server would.

Letters: R requests, V items, d width, K results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import faiss as faiss_module
import numpy as np

from hsnn_core.errors import DataError
from hsnn_train.metrics import search_recall

from .requests import CHUNK, best_rows, everything

faiss: Any = faiss_module  # its type hints lack half of what it has
GRAPH_EFFORT = 200  # efConstruction
_SCORES = 1 << 27  # in memory at once, of several requests


@dataclass(frozen=True)
class Queries:
    """R requests: ``vectors`` (R, d) float32; ``eligible`` as that of `Requests`."""

    vectors: np.ndarray
    eligible: Callable[[slice], np.ndarray | None] = everything


@dataclass(frozen=True)
class Twin:
    """How one index did.

    Attributes:
        name: exhaustive, ivf or hnsw. settings: of the index and the search.
        recall: share of the exhaustive top K that it found, averaged over requests.
        microseconds: time per request, the median; without making the filter.
        scored_share: share of the V items whose inner product was taken, an IVF's centroids counted as items.
        found: (R, K) int32 item rows, best first. valid: (R,) int64 that count.
    """

    name: str
    settings: dict[str, int]
    recall: float
    microseconds: float
    scored_share: float
    found: np.ndarray
    valid: np.ndarray


def exhaustive(items: np.ndarray, queries: Queries, k: int) -> Twin:
    """All V inner products of items (V, d) float32 by Faiss's flat index. Raises DataError for other shapes."""
    _check(items, queries, k)
    index = flat_index(items)
    found, valid, microseconds, _ = _answer(index, queries, k, _flat)
    return Twin("exhaustive", {}, 1.0, microseconds, 1.0, found, valid)


def flat_index(items: np.ndarray) -> Any:
    """Faiss's index that takes all inner products, over items (V, d) float32."""
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items)
    return index


def approximate(
    name: str,
    items: np.ndarray,
    tuning: Queries,
    queries: Queries,
    k: int,
    target: float = 0.95,
    seed: int = 1,
) -> Twin:
    """An "ivf" or "hnsw" index over items (V, d) float32, its settings chosen on ``tuning``, measured on ``queries``.

    When no setting reaches ``target`` on the tuning requests, the one of the best recall is taken. Raises
    DataError for another name and for other shapes.
    """
    _check(items, queries, k)
    index, settings = tuned_index(name, items, tuning, k, target, seed)
    found, valid, microseconds, scored = _answer(index, queries, k, partial(_search, name, settings))
    recall = search_recall(found, valid, *_exact(items, queries, k))
    share = scored / (len(queries.vectors) * len(items))
    if name == "ivf":
        share += settings["nlist"] / len(items)
    return Twin(name, settings, recall, microseconds, share, found, valid)


def tuned_index(
    name: str, items: np.ndarray, tuning: Queries, k: int, target: float = 0.95, seed: int = 1
) -> tuple[Any, dict[str, int]]:
    """The Faiss index of `approximate` and its settings, those of the search included ("nprobe", "efSearch")."""
    if name not in ("ivf", "hnsw"):
        raise DataError(f"Faiss index {name!r}: expected ivf or hnsw")
    _check(items, tuning, k)
    exact = _exact(items, tuning, k)
    tried: list[tuple[bool, float, float, Any, dict[str, int]]] = []
    for index, ladder in _ivfs(items, seed) if name == "ivf" else _graphs(items, k):
        for settings in ladder:
            found, valid, microseconds, _ = _answer(index, tuning, k, partial(_search, name, settings))
            recall = search_recall(found, valid, *exact)
            tried.append((recall >= target, recall, microseconds, index, settings))
            if recall >= target:
                break  # a wider search of this index is only slower
    reached = [entry for entry in tried if entry[0]]
    chosen = min(reached, key=lambda entry: entry[2]) if reached else max(tried, key=lambda entry: entry[1])
    return chosen[3], chosen[4]


def _ivfs(items: np.ndarray, seed: int) -> Iterator[tuple[Any, list[dict[str, int]]]]:
    """Inverted files of around sqrt(V) lists, each with its search settings from narrow to all lists."""
    root = len(items) ** 0.5
    for nlist in sorted({max(1, round(root * factor)) for factor in (0.5, 1.0, 2.0)}):
        quantizer = faiss.IndexFlatIP(items.shape[1])
        index = faiss.IndexIVFFlat(quantizer, items.shape[1], nlist, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = seed
        index.cp.min_points_per_centroid = 1  # small corpora are no reason to warn
        index.train(items)
        index.add(items)
        widths = sorted({min(nlist, w) for w in _ladder(1, nlist)})
        yield index, [{"nlist": nlist, "nprobe": width} for width in widths]


def _graphs(items: np.ndarray, k: int) -> Iterator[tuple[Any, list[dict[str, int]]]]:
    """Graphs of several degrees, each with its search settings from narrow to wide."""
    for degree in (16, 32):
        index = faiss.IndexHNSWFlat(items.shape[1], degree, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = GRAPH_EFFORT
        index.add(items)
        yield index, [{"M": degree, "efSearch": width} for width in _ladder(k, 32 * k)]


def _ladder(low: int, high: int) -> list[int]:
    """Whole numbers from low to high, each about 1.4 times the one before."""
    steps = [low]
    while steps[-1] < high:
        steps.append(min(high, max(steps[-1] + 1, round(steps[-1] * 1.4))))
    return steps


def _flat(selector: Any) -> Any:
    return None if selector is None else faiss.SearchParameters(sel=selector)


def _search(name: str, settings: dict[str, int], selector: Any) -> Any:
    extra = {} if selector is None else {"sel": selector}
    if name == "ivf":
        return faiss.SearchParametersIVF(nprobe=settings["nprobe"], **extra)
    return faiss.SearchParametersHNSW(efSearch=settings["efSearch"], **extra)


def _answer(
    index: Any, queries: Queries, k: int, parameters: Callable[[Any], Any]
) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Rows (R, K) int32, valid (R,), median microseconds per request, inner products taken in all."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    faiss.cvar.indexIVF_stats.reset()
    faiss.cvar.hnsw_stats.reset()
    requests = len(queries.vectors)
    found = np.full((requests, k), -1, np.int64)
    seconds = np.zeros(requests)
    try:
        for r in range(requests):
            mask = queries.eligible(slice(r, r + 1))
            selector = None
            if mask is not None:
                selector = faiss.IDSelectorBitmap(np.packbits(mask[0], bitorder="little"))
            asked = parameters(selector)
            began = time.perf_counter()
            _, found[r : r + 1] = index.search(queries.vectors[r : r + 1], k, params=asked)
            seconds[r] = time.perf_counter() - began
    finally:
        faiss.omp_set_num_threads(threads)
    scored = int(faiss.cvar.indexIVF_stats.ndis + faiss.cvar.hnsw_stats.ndis)
    valid = (found >= 0).sum(1)  # Faiss fills up with -1 behind what it found
    rows = np.maximum(found, 0).astype(np.int32)
    return rows, valid, float(np.median(seconds) * 1e6), scored


def _exact(items: np.ndarray, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
    step = max(1, min(CHUNK, _SCORES // len(items)))
    parts = [slice(start, start + step) for start in range(0, len(queries.vectors), step)]
    best = [best_rows(queries.vectors[part] @ items.T, queries.eligible(part), k) for part in parts]
    return np.concatenate([rows for rows, _ in best]), np.concatenate([valid for _, valid in best])


def _check(items: np.ndarray, queries: Queries, k: int) -> None:
    vectors = queries.vectors
    for name, array in (("items", items), ("vectors", vectors)):
        if array.ndim != 2 or array.dtype != np.float32 or array.shape[1] != items.shape[-1]:
            raise DataError(
                f"{name}: got {array.dtype} of shape {array.shape}, expected float32 (n, {items.shape[-1]})"
            )
    if not len(vectors):
        raise DataError("vectors: no requests to search for")
    if not 1 <= k <= len(items):
        raise DataError(f"k: got {k}, expected 1..{len(items)}, the number of items")
