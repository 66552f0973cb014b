"""Exhaustive searches of validation requests, and what the ensembles were given in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from hsnn_core.exhaustive import exhaustive
from hsnn_core.index import HierarchicalIndex
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import SearchResult
from hsnn_train.data.dataset import Dataset
from hsnn_train.data.requests import Requests, evaluation_requests

from .batches import IndexState
from .ensemble import LayerEnsemble
from .hsnn import HSNN
from .recipe import Recipe
from .retrieval import corpus_of
from .runner import TorchRunner

REQUESTS_PER_CALL = 8


@dataclass(frozen=True)
class Searched:
    """Some requests, b of them, and their exhaustive search.

    Attributes:
        requests: all requests.
        part: which of them these are.
        eligible: (b, V) bool by position, their candidates.
        best: what was found, ``k`` items each.
        seen: for every layer l that was asked for, MoNN logits of layers 1..l (b, I_l, l, T) and the dense crossings
            that its ensemble reads (b, I_l, D), float32, of all its nodes in order.
    """

    requests: Requests
    part: slice
    eligible: np.ndarray
    best: SearchResult
    seen: tuple[tuple[np.ndarray, np.ndarray], ...]


def searched(
    model: HSNN,
    dataset: Dataset,
    recipe: Recipe,
    state: IndexState,
    count: int,
    k: int,
    layers: Sequence[int],
    progress: str = "",
) -> tuple[HierarchicalIndex, Iterator[Searched]]:
    """The index, and at most ``count`` validation requests with their best ``k`` items by the model as it stands, a few
    requests at a time, and what the ensembles of ``layers`` (from 1) are given. ``progress`` names a progress bar."""
    requests = evaluation_requests(dataset, "valid", recipe.search.candidates, count)
    corpus = corpus_of(model, dataset, state)
    runner = _SeeingRunner(model, layers)
    scorer = LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, runner)
    k = min(k, requests.items)

    def parts() -> Iterator[Searched]:
        starts = range(0, len(requests), REQUESTS_PER_CALL)
        for start in tqdm(starts, desc=progress, disable=not progress):
            part = slice(start, start + REQUESTS_PER_CALL)
            users, eligible, allowed = requests.asked_of(part, corpus.index)
            runner.clear()
            best = exhaustive(corpus.index, scorer, users, k, recipe.schema.rank, allowed)
            yield Searched(requests, part, eligible, best, runner.seen())

    return corpus.index, parts()


class _SeeingRunner(TorchRunner):
    """A runner that keeps what the ensembles are given, where all nodes of a layer are scored in order."""

    def __init__(self, model: HSNN, layers: Sequence[int]) -> None:
        super().__init__(model)
        self.of_layers = tuple(layers)
        self.clear()

    def clear(self) -> None:
        self._kept: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {layer: [] for layer in self.of_layers}

    def score(self, layer: int, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        monn, logits = super().score(layer, inputs)
        if layer in self._kept:
            ensemble = self.model.ensemble[layer - 1]
            assert isinstance(ensemble, LayerEnsemble)
            so_far = np.concatenate([inputs["previous"], monn], axis=2) if layer > 1 else monn
            none = np.empty((*monn.shape[:2], 0), np.float32)
            reads = inputs["cross_dense"] if ensemble.reads_crossings else none
            self._kept[layer].append((so_far.reshape(*monn.shape[:2], layer, -1), reads))
        return monn, logits

    def seen(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """What `Searched.seen` has."""
        joined = ((np.concatenate(part, axis=1) for part in zip(*parts)) for parts in self._kept.values())
        return tuple((monn, crossings) for monn, crossings in joined)
