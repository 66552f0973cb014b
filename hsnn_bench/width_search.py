"""Beam widths for a wanted search recall at the lowest cost, by measuring: what `hsnn tune` does.

A grid of widths, every layer's a ladder of powers of two up to its nodes, is looked over with few requests, and the
points around the target are measured with all of them; `narrowed` goes on between the powers of two. A request's
exhaustive top K is found once; a point then costs one search per request. In the measurement a request goes through
all points before the next, so a machine that slows down slows all alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from tqdm import tqdm

from hsnn_core.errors import SearchError
from hsnn_core.features import Encoded
from hsnn_core.index import HierarchicalIndex
from hsnn_core.item_filter import ItemFilter
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import search

from .oracle import best_items

PILOT = 4  # requests that look over the whole grid
MARGIN = 0.02  # of recall, below the target, that the pilot may be wrong by
FINALISTS = 8
STEP = 16  # `narrowed` ends a bisection at one part in so many

NewFilter = Callable[[], ItemFilter | None]


def _no_filter() -> None:
    """Every user may get every item."""


@dataclass(frozen=True)
class Point:
    """Widths with what was measured: mean search recall, milliseconds per request (median, 10th and 90th percentile)
    and candidates per layer (mean). ``best``: nothing measured is both cheaper and better (the Pareto front)."""

    widths: tuple[int, ...]
    recall: float
    ms: float
    p10: float
    p90: float
    candidates: tuple[float, ...]
    best: bool = False


def grid(index: HierarchicalIndex, k: int, least: int = 8) -> list[tuple[int, ...]]:
    """Widths to try: per layer powers of two from ``least`` to all nodes; no layer keeps fewer nodes than the one
    above, and the last can be expected to hold ``k`` items. All nodes, the exact search, is among them."""
    ladders = []
    for layer in range(1, index.layers):
        nodes = index.nodes(layer)
        steps = [2**power for power in range(64) if least <= 2**power < nodes]
        ladders.append([*steps, nodes])
    points = [
        widths
        for widths in itertools.product(*ladders)
        if all(above <= below for above, below in itertools.pairwise(widths))
        and widths[-1] * index.items >= min(k, index.items) * index.nodes(index.layers - 1)
    ]
    return sorted(points, key=lambda widths: _expected(index, widths))


def _expected(index: HierarchicalIndex, widths: Sequence[int]) -> float:
    """Candidates of a search with these widths, were all nodes equally full."""
    total = 0.0
    for layer, width in enumerate(widths, start=1):
        total += width * index.nodes(layer + 1) / index.nodes(layer)
    return total


def exact_tops(
    index: HierarchicalIndex,
    scorer: LayerScorer,
    users: Encoded,
    k: int,
    rank: np.ndarray,
    progress: bool = True,
) -> list[np.ndarray]:
    """Per user the item ids of the exhaustive top ``k``."""
    rows = tqdm(range(len(users)), desc="exhaustive", unit="request", disable=not progress)
    return [best_items(index, scorer, _one(users, row), k, rank) for row in rows]


def measure(
    index: HierarchicalIndex,
    scorer: LayerScorer,
    users: Encoded,
    tops: Sequence[np.ndarray],
    k: int,
    rank: np.ndarray,
    points: Sequence[tuple[int, ...]],
    progress: bool = True,
    new_filter: NewFilter = _no_filter,
) -> list[Point]:
    """Every point on every user, the points of one user after each other. ``new_filter``: makes a search's filter,
    which counts as part of it."""
    recall = np.empty((len(points), len(users)))
    seconds = np.empty_like(recall)
    candidates = np.empty((len(points), len(users), index.layers))
    for widths in points:  # the first search of a kind is slower than the others
        search(index, scorer, _one(users, 0), widths, k, rank, new_filter())
    for row in tqdm(range(len(users)), desc="widths", unit="request", disable=not progress):
        user = _one(users, row)
        for place, widths in enumerate(points):
            began = perf_counter()
            found = search(index, scorer, user, widths, k, rank, new_filter())
            seconds[place, row] = perf_counter() - began
            recall[place, row] = np.isin(tops[row], found.item_ids[0, : found.valid[0]]).mean()
            candidates[place, row] = [layer.candidates[0] for layer in found.layers]
    low, middle, high = np.percentile(1000 * seconds, [10, 50, 90], axis=1)
    measured = [
        Point(widths, float(recall[n].mean()), float(middle[n]), float(low[n]), float(high[n]),
              tuple(map(float, candidates[n].mean(axis=0))))
        for n, widths in enumerate(points)
    ]  # fmt: skip
    return [Point(**{**vars(point), "best": _on_front(point, measured)}) for point in measured]


def find(
    index: HierarchicalIndex,
    scorer: LayerScorer,
    users: Encoded,
    k: int,
    rank: np.ndarray,
    target_recall: float,
    target_ms: float | None = None,
    progress: bool = True,
    tops: Sequence[np.ndarray] | None = None,
    new_filter: NewFilter = _no_filter,
) -> tuple[Point, list[Point]]:
    """The cheapest point that reaches ``target_recall`` (and ``target_ms``), and all that were measured.

    ``tops``: the users' exhaustive top K, of what ``new_filter`` (see `measure`) lets through; None: found here,
    without a filter. Few requests find the part of the grid that matters; the points around the target are measured on
    all. Raises SearchError with the nearest point when nothing reaches the target, and for a flat index.
    """
    if index.layers == 1:
        raise SearchError("a flat index has no widths to tune, expected one of at least two layers")
    if not 0 < target_recall <= 1:
        raise SearchError(f"target recall {target_recall}, expected above 0 and at most 1")
    if tops is None:
        tops = exact_tops(index, scorer, users, k, rank, progress)
    few = Encoded(users.dense[:PILOT], users.ids[:PILOT])
    pilot = _pilot(index, scorer, few, tops, k, rank, target_recall + MARGIN, progress, new_filter)
    near = sorted((p for p in pilot if p.recall >= target_recall - MARGIN), key=lambda p: p.ms)[:FINALISTS]
    front = [p for p in pilot if _on_front(p, pilot)]
    chosen = list(dict.fromkeys(p.widths for p in (*front, *near)))
    points = measure(index, scorer, users, tops, k, rank, chosen, progress, new_filter)
    good = [p for p in points if p.recall >= target_recall and (target_ms is None or p.ms <= target_ms)]
    if not good:
        exact_enough = [p for p in points if p.recall >= target_recall]
        closest = (
            min(exact_enough, key=lambda p: p.ms) if exact_enough else max(points, key=lambda p: p.recall)
        )
        wanted = f"recall {target_recall}" + ("" if target_ms is None else f" in {target_ms} ms")
        raise SearchError(
            f"no widths reach {wanted}; nearest: widths {list(closest.widths)} with recall {closest.recall:.4f} in "
            f"{closest.ms:.2f} ms; lower the target, or train a finer index"
        )
    return min(good, key=lambda p: p.ms), sorted(points, key=lambda p: p.ms)


def narrowed(
    index: HierarchicalIndex,
    scorer: LayerScorer,
    users: Encoded,
    tops: Sequence[np.ndarray],
    k: int,
    rank: np.ndarray,
    widths: Sequence[int],
    target_recall: float,
    new_filter: NewFilter = _no_filter,
) -> tuple[int, ...]:
    """``widths`` that reach ``target_recall``, each in turn, the last first, bisected down to the fewest nodes that
    still do, to one part in `STEP`: so corpora are compared at one recall, not at the next powers of two above it."""
    found = list(widths)
    for place in reversed(range(len(found))):
        low, high = 0, found[place]
        if place == len(found) - 1:  # the last layer's nodes should hold K items, as in `grid`
            low = min(k, index.items) * index.nodes(place + 1) // index.items
        while high - low > max(1, high // STEP):
            found[place] = (low + high) // 2
            (point,) = measure(index, scorer, users, tops, k, rank, [tuple(found)], False, new_filter)
            low, high = (low, found[place]) if point.recall >= target_recall else (found[place], high)
        found[place] = high
    return tuple(found)


def _pilot(
    index: HierarchicalIndex,
    scorer: LayerScorer,
    users: Encoded,
    tops: Sequence[np.ndarray],
    k: int,
    rank: np.ndarray,
    enough: float,
    progress: bool,
    new_filter: NewFilter,
) -> list[Point]:
    """The grid, a ladder of the last layer's widths at a time, each climbed until its recall is ``enough``: what is
    above costs more and is not wanted."""
    points: list[Point] = []
    by_ladder = sorted(grid(index, k))
    with tqdm(total=len(by_ladder), desc="pilot", unit="widths", disable=not progress) as bar:
        for _, ladder in itertools.groupby(by_ladder, key=lambda widths: widths[:-1]):
            reached = 0.0
            for widths in ladder:
                if reached < min(enough, 1.0):
                    points += measure(index, scorer, users, tops, k, rank, [widths], False, new_filter)
                    reached = points[-1].recall
                bar.update()
    return points


def _on_front(point: Point, points: Sequence[Point]) -> bool:
    return not any(
        p.recall >= point.recall and p.ms <= point.ms and (p.recall, p.ms) != (point.recall, point.ms)
        for p in points
    )


def _one(users: Encoded, row: int) -> Encoded:
    return Encoded(users.dense[row : row + 1], users.ids[row : row + 1])
