"""The order of items: where a recipe says so (``train.order``), the item layer's ensemble is fitted to whole requests.

Calibration fits it to labels, and where all negatives are drawn, they say what tells a positive from an item of the
corpus, not what tells it from the best of the others: of a few numbers that have to do for both, those that are right
at large flatten the top, which is what a search returns. So what ranks is fitted to the top: a softmax over the best
items of each validation request, and labels keep the scale and the shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize

from hsnn_train.data.dataset import Dataset

from .batches import IndexState
from .calibration import LEAST_PAIRS, RIDGE_PAIRS, settle, standard
from .ensemble import LayerEnsemble
from .evaluate import Pointwise
from .hsnn import HSNN
from .recipe import Recipe
from .searched import searched

REQUESTS = 600
#: The best items of a request, by the ensemble as calibrated, among which its positives are to come first.
BEST = 1000


@dataclass(frozen=True)
class Lists:
    """R requests and the K items that are best for each: all MoNN logits of the first task (R, K, N) and the dense
    crossings that the item layer's ensemble reads (R, K, D), float32, whether the request wants the item (R, K), and
    whether it is there (R, K): a request with fewer candidates has a shorter list."""

    monn: np.ndarray
    crossings: np.ndarray
    wanted: np.ndarray
    there: np.ndarray


def item_lists(
    model: HSNN, dataset: Dataset, recipe: Recipe, state: IndexState, progress: str = ""
) -> Lists | None:
    """The best `BEST` items of `REQUESTS` validation requests. None unless the recipe's
    ``train.order`` is requests, nor where one logit is all that ranks or nobody asks. ``progress`` names a progress
    bar."""
    ensemble = model.ensemble[-1]
    assert isinstance(ensemble, LayerEnsemble)
    if recipe.train.order != "requests" or (model.layers == 1 and not ensemble.reads_crossings):
        return None
    index, parts = searched(model, dataset, recipe, state, REQUESTS, BEST, [model.layers], progress)
    found = []
    for part in parts:
        ((monn, crossings),) = part.seen
        best = part.best.positions
        users, places = np.arange(len(best))[:, None], np.arange(best.shape[1])
        there = places < part.best.valid[:, None]
        rows = index.row_of_position[best]
        wanted = np.stack(
            [np.isin(row, items) for row, items in zip(rows, part.requests.wanted[part.part], strict=True)]
        )
        found.append((monn[users, best, :, 0], crossings[users, best], wanted & there, there))
    return Lists(*(np.concatenate(parts) for parts in zip(*found))) if found else None


@torch.no_grad()
def fit_items(model: HSNN, lists: Lists | None, values: Pointwise, rank: np.ndarray) -> None:
    """Give the item layer's ensemble the weights, of MoNN logits and of crossings, with which the items that requests
    want are likeliest under a softmax over their lists, then the scale and the shift with which it is calibrated on
    ``values``, whose ``parts`` are needed (else ValueError). It is the ensemble of the first task, whose positives
    requests want; where that does not raise a search's score (its ``rank`` (T,) is 0), where there are no lists or
    fewer than `LEAST_PAIRS` of them have such an item, and where every label is the same, nothing changes."""
    if values.monn is None:
        raise ValueError("fit_items: expected values with their parts")
    if lists is None or rank[0] <= 0 or lists.wanted.any(1).sum() < LEAST_PAIRS:
        return
    ensemble = model.ensemble[-1]
    assert isinstance(ensemble, LayerEnsemble)
    start = np.concatenate([ensemble.weight[:, 0].cpu().numpy(), ensemble.crossing[:, 0].cpu().numpy()])
    given = np.concatenate([lists.monn, lists.crossings], axis=2)
    weights = preference(given, lists.wanted, lists.there, start.astype(np.float64))
    settle(ensemble, model.layers, 0, weights, values)


def preference(given: np.ndarray, wanted: np.ndarray, there: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The weights (F,) float64 of ``given`` (R, K, F) that have the least sum of -log softmax(given @ weights) over the
    ``wanted`` (R, K) of every list, whose items are those ``there`` (R, K), plus `RIDGE_PAIRS` times half their squares
    on inputs of deviation 1. ``start`` (F,): where to look first. What never varies has weight 0."""
    some = wanted.any(1)
    given, wanted, there = given[some].astype(np.float64), wanted[some], there[some]
    _, deviation = standard(given[there])
    scaled = given / deviation
    counts = wanted.sum(1)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        z = np.where(there, scaled @ weights, -np.inf)
        z -= z.max(1, keepdims=True)
        grown = np.exp(z)
        total = grown.sum(1, keepdims=True)
        surprise = counts @ np.log(total[:, 0]) - z[wanted].sum()
        pull = counts[:, None] * grown / total - wanted
        gradient = np.einsum("rk,rkf->f", pull, scaled) + RIDGE_PAIRS * weights
        return float(surprise + RIDGE_PAIRS * weights @ weights / 2), gradient

    scale = np.where(np.isinf(deviation), 0.0, deviation)
    found = minimize(loss, start * scale, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    weights: np.ndarray = found.x / deviation
    return weights
