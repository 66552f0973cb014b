"""Between gradient steps: embed the corpus, initialise codebooks by k-means, re-assign items, elect
representatives (paper Algorithm 1, lines 10-16), and reset dead codewords."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from hsnn_core.errors import SchemaError
from hsnn_core.features import Encoded
from hsnn_core.index import HierarchicalIndex, assign_paths, centroid_distances
from hsnn_core.schema import Schema

from .batches import IndexState, as_tensor
from .device import moved
from .hsnn import HSNN

KMEANS_SAMPLE = 100_000


@torch.no_grad()
def index_vectors(model: HSNN, items: Encoded, batch: int = 8192) -> np.ndarray:
    """The vectors that are indexed, v (V, d) float32, of the whole corpus."""
    was_training = model.training
    model.eval()
    out = []
    for start in range(0, len(items.ids), batch):
        dense, ids = items.dense[start : start + batch], items.ids[start : start + batch]
        found = model.index_vector(*moved((as_tensor(dense), as_tensor(ids)), model.device))
        out.append(found.cpu().numpy())
    model.train(was_training)
    return np.concatenate(out)


def residual_kmeans(v: np.ndarray, sizes: tuple[int, ...], seed: int) -> list[Tensor]:
    """k-means++ and Lloyd per residual layer: centroids [(K_l, d) float32].

    Raises SchemaError when a codebook has more codewords than there are items.
    """
    if max(sizes) > len(v):
        raise SchemaError(
            f"model.codebooks: {max(sizes)} codewords for {len(v)} items; expected at most one per item"
        )
    rng = np.random.default_rng([seed, 3])
    sample = v if len(v) <= KMEANS_SAMPLE else v[rng.choice(len(v), KMEANS_SAMPLE, replace=False)]
    centroids = []
    with threadpool_limits(1):  # sums in one order, so that a resumed run gets the same centroids
        for size in sizes:
            fitted = KMeans(size, n_init=1, max_iter=30, random_state=seed).fit(sample)
            centre = fitted.cluster_centers_.astype(np.float32)
            sample = sample - centre[fitted.labels_]
            centroids.append(torch.from_numpy(centre))
    return centroids


def hierarchy_paths(schema: Schema, items: Encoded, columns: tuple[str, ...]) -> np.ndarray:
    """Paths (V, N-1) int32 from item features that are a hierarchy, coarse to fine.

    Raises SchemaError for a column that is no single-valued sparse item feature.
    """
    slots = {s.feature.name: s for s in schema.layout("item").slots}
    out = np.empty((len(items.ids), len(columns)), np.int32)
    for layer, name in enumerate(columns):
        slot = slots.get(name)
        if slot is None or slot.stop - slot.start != 1:
            raise SchemaError(
                f"model.columns: {name!r} is not an item feature of kind sparse with one value; "
                f"item features are {', '.join(slots)}"
            )
        out[:, layer] = items.ids[:, slot.start]
    return out


def refresh(
    model: HSNN, items: Encoded, item_ids: np.ndarray, v: np.ndarray | None = None
) -> tuple[IndexState, HierarchicalIndex]:
    """Hard paths and representatives of the corpus as the model stands now; ``v``: its `index_vectors`, when the
    caller has them already."""
    if model.layers == 1:
        paths = np.empty((len(items.ids), 0), np.int32)
        distances = np.empty((len(items.ids), 0), np.float32)
    else:
        v = index_vectors(model, items) if v is None else v
        if model.index.method == "hierarchy":
            paths = hierarchy_paths(model.schema, items, model.index.columns)
            distances = centroid_distances(v, paths)
        else:
            paths, distances = assign_paths(model.codebooks(), v)
    index = HierarchicalIndex.build(item_ids, paths, distances)
    return IndexState.from_index(index, paths), index


@torch.no_grad()
def reset_optimizer_rows(optimizer: torch.optim.Optimizer, parameter: Tensor, rows: Tensor) -> None:
    """Clear Adam's moments of the given rows: a reborn codeword owes nothing to the dead one's history."""
    state = optimizer.state.get(parameter, {})
    for name in ("exp_avg", "exp_avg_sq"):
        if name in state:
            state[name][rows] = 0.0
