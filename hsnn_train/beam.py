"""What the beam is for: node layers' ensembles are fitted to say which nodes hold the best items.

To labels, a node is the mean of its items, so calibration alone ranks a node of one item that a user will want under
one of many that they might. The search needs the other order (paper §4: search recall), and can be taught it without
any label: exhaustive search says which nodes hold its best items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hsnn_train.data.dataset import Dataset

from .batches import IndexState
from .calibration import LEAST_PAIRS, newton, settle, standard
from .ensemble import LayerEnsemble
from .evaluate import Pointwise
from .hsnn import HSNN
from .recipe import Recipe
from .searched import searched

REQUESTS = 100
#: The best items of a request, which its nodes should hold: what search recall is measured at. A model is calibrated
#: once, so this is no setting of a search.
BEST = 100
#: Drawn among the nodes of a request without any of its best items; those with one are all taken.
OTHER_NODES = 1000
#: Of the mean log loss, on inputs of deviation 1: it settles inputs that say the same, and hardly more.
RIDGE = 1e-5


@dataclass(frozen=True)
class NodePairs:
    """S pairs of a request and a node of layer l: the MoNN logits of layers 1..l (S, l, T) float32, the dense crossings
    that the layer's ensemble reads (S, D) float32, and whether the node holds any of the request's best items (S,)."""

    monn: np.ndarray
    crossings: np.ndarray
    holds: np.ndarray


def node_pairs(
    model: HSNN, dataset: Dataset, recipe: Recipe, state: IndexState, progress: str = ""
) -> list[NodePairs]:
    """Per layer above the items the pairs of `REQUESTS` validation requests: all nodes that hold any of the `BEST`
    items by exhaustive search, and some, drawn by the recipe's seed, that do not. A node without any item that the
    request may get is left out, as the search leaves it out. An empty list without requests or without layers above
    the items. ``progress`` names a progress bar."""
    if model.layers == 1:
        return []
    above = range(1, model.layers)
    index, parts = searched(model, dataset, recipe, state, REQUESTS, BEST, above, progress)
    rng = np.random.default_rng([recipe.train.seed, 5])
    ancestors = [index.ancestors(layer) for layer in above]
    found: list[list[NodePairs]] = [[] for _ in ancestors]
    for part in parts:
        for of_layer, pairs, (monn, crossings) in zip(ancestors, found, part.seen):
            for user, eligible in enumerate(part.eligible):
                holds = np.zeros(monn.shape[1], dtype=bool)
                holds[of_layer[part.best.positions[user, : part.best.valid[user]]]] = True
                alive = np.zeros(monn.shape[1], dtype=bool)
                alive[of_layer[eligible]] = True
                others = np.flatnonzero(alive & ~holds)
                chosen = np.concatenate([np.flatnonzero(holds), rng.permutation(others)[:OTHER_NODES]])
                pairs.append(NodePairs(monn[user, chosen], crossings[user, chosen], holds[chosen]))
    if not found[0]:
        return []
    return [
        NodePairs(
            *(np.concatenate([getattr(p, name) for p in pairs]) for name in ("monn", "crossings", "holds"))
        )
        for pairs in found
    ]


@torch.no_grad()
def fit_beam(model: HSNN, pairs: list[NodePairs], values: Pointwise, rank: np.ndarray) -> None:
    """Give every ensemble above the items the weights, of MoNN logits and of crossings, that tell best in log loss
    which nodes hold the best items, then the scale and the shift with which it is calibrated on ``values``, whose
    ``parts`` are needed (else ValueError). Every task that raises a search's score, its ``rank`` (T,) being positive,
    learns this order; the others, a layer with fewer than `LEAST_PAIRS` nodes that hold any or that hold none, and a
    task of which every label is the same, are left as they are."""
    if values.monn is None:
        raise ValueError("fit_beam: expected values with their parts")
    for layer, given in enumerate(pairs, start=1):
        ensemble = model.ensemble[layer - 1]
        assert isinstance(ensemble, LayerEnsemble)
        if min(given.holds.sum(), (~given.holds).sum()) < LEAST_PAIRS:
            continue
        for t in np.flatnonzero(np.asarray(rank) > 0):
            weights = order(np.concatenate([given.monn[:, :, t], given.crossings], axis=1), given.holds)
            settle(ensemble, layer, t, weights, values)


def order(given: np.ndarray, holds: np.ndarray) -> np.ndarray:
    """The weights (F,) float64 of ``given`` (S, F) that tell best, in log loss with a shift, the pairs that ``holds``
    (S,) bool names from the others. What does not vary has weight 0."""
    scaled, deviation = standard(given.astype(np.float64))
    design = np.column_stack([scaled, np.ones(len(given))])
    ridge = np.full(design.shape[1], RIDGE)
    ridge[-1] = 0.0
    found = newton(design, np.zeros(len(given)), holds.astype(np.float64), ridge, np.zeros(design.shape[1]))
    weights: np.ndarray = found[:-1] / deviation
    return weights
