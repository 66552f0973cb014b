"""A trained run that answers evaluation requests, as the benches time it: the search that serves, over torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hsnn_core.errors import DataError
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import SearchResult, search
from hsnn_train.checkpoint import load_run
from hsnn_train.data.dataset import Dataset
from hsnn_train.data.requests import Requests
from hsnn_train.retrieval import corpus_of
from hsnn_train.runner import TorchRunner


class Searcher:
    """The model, index and recipe of a run directory over a data set's items."""

    def __init__(self, run_dir: Path, dataset: Dataset) -> None:
        run = load_run(run_dir)
        corpus = corpus_of(run.model, dataset, run.index)
        self.index, self.recipe = corpus.index, run.recipe
        self.scorer = LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, TorchRunner(run.model))
        self.rank = run.recipe.schema.rank
        self.widths = list(run.recipe.search.widths[: run.model.layers - 1])
        self._order = np.argsort(self.index.item_ids)

    def find(self, requests: Requests, part: slice, k: int, adapt: bool = False) -> SearchResult:
        """The search of the requests ``part`` at the recipe's widths, exhaustive for a flat model. With ``adapt`` beams
        widen until they hold k items."""
        users, _, allowed = requests.asked_of(part, self.index)
        return search(self.index, self.scorer, users, self.widths, k, self.rank, allowed, adapt=adapt)

    def positions(self, item_ids: np.ndarray) -> np.ndarray:
        """Positions of item ids of any shape. Raises DataError for one that is not in the corpus."""
        place = np.searchsorted(self.index.item_ids, item_ids, sorter=self._order)
        found: np.ndarray = self._order[np.minimum(place, self.index.items - 1)]
        if (self.index.item_ids[found] != item_ids).any():
            unknown = item_ids[self.index.item_ids[found] != item_ids].flat[0]
            raise DataError(f"item {unknown} is not in the corpus of {self.recipe.name}")
        return found
