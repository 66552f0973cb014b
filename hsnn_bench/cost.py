"""What a request costs: measured time of all rows in one process, interleaved.

Times are those of `hsnn_core.search` over the torch model with one thread and one request at a time; a flat row
is the same search with one layer. Request i goes through all rows before request i + 1, so a machine that
slows down slows all rows alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hsnn_core.search import SearchResult
from hsnn_train.data.dataset import Dataset
from hsnn_train.data.requests import Requests, evaluation_requests

from .searcher import Searcher

WARM_UP = 2
#: A row that takes longer for all requests answers an even choice of them, but never fewer than FEWEST.
SECONDS_PER_ROW = 30.0
FEWEST = 8

Ask = Callable[[int], SearchResult]


@dataclass(frozen=True)
class Cost:
    """Of one row: ``requests`` timed, milliseconds per request (median, 10th and 90th percentile), and per layer the
    nodes scored per request (mean)."""

    requests: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    candidates: tuple[float, ...]


def measure(
    runs: Mapping[str, Path], dataset: Dataset, requests: int, progress: bool = True
) -> dict[str, Cost]:
    """row id -> cost, for trained runs of one data set on the same ``requests`` (fewer if the test split has
    fewer, none if it has none). Sets torch to one thread."""
    torch.set_num_threads(1)
    rows: dict[str, Ask] = {}
    asked: Requests | None = None
    for row, run_dir in tqdm(runs.items(), desc="cost: load", unit="model", disable=not progress):
        searcher = Searcher(run_dir, dataset)
        if asked is None:
            asked = evaluation_requests(dataset, "test", searcher.recipe.search.candidates, requests)
        if not len(asked):
            return {}
        rows[row] = _asker(searcher, asked)
    return {} if asked is None else interleave(rows, len(asked), progress)


def _asker(searcher: Searcher, asked: Requests) -> Ask:
    """Request number -> its search at the recipe's widths and k."""
    k = min(searcher.recipe.search.k, asked.items)
    return lambda number: searcher.find(asked, slice(number, number + 1), k)


def interleave(rows: Mapping[str, Ask], requests: int, progress: bool = False) -> dict[str, Cost]:
    """Ask every row the same requests, request by request, in an order of rows that rotates; rows over
    `SECONDS_PER_ROW` an even choice of them."""
    stride = {}
    for row, ask in tqdm(rows.items(), desc="cost: warm up", unit="model", disable=not progress):
        for number in range(min(WARM_UP, requests)):
            took = ask(number).total_microseconds / 1e6
        count = min(requests, max(FEWEST, int(SECONDS_PER_ROW / max(took, 1e-6))))
        stride[row] = -(-requests // count)
    times: dict[str, list[float]] = {row: [] for row in rows}
    candidates: dict[str, list[list[int]]] = {row: [] for row in rows}
    names = list(rows)
    for number in tqdm(range(requests), desc="cost", unit="request", disable=not progress):
        turn = number // max(stride.values()) % len(rows)
        for row in names[turn:] + names[:turn]:
            if number % stride[row] == 0:
                began = time.perf_counter()
                result = rows[row](number)
                times[row].append(1000 * (time.perf_counter() - began))
                candidates[row].append([int(layer.candidates[0]) for layer in result.layers])
    return {row: _cost(times[row], candidates[row]) for row in rows}


def _cost(milliseconds: list[float], candidates: list[list[int]]) -> Cost:
    low, middle, high = np.percentile(milliseconds, [10, 50, 90])
    means = np.mean(candidates, axis=0)
    return Cost(len(milliseconds), float(middle), float(low), float(high), tuple(map(float, means)))
