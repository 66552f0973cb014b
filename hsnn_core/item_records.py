"""What is known of every item beyond what a search reads; mapped, and read only where items change.

A node that loses its representative needs the distances of its other items, and the features of its next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import FormatError
from .features import Encoded
from .index import HierarchicalIndex

Projection = Sequence[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class ItemRecords:
    """Records of V items by position.

    ``features``: V encoded rows. ``distances`` (V, N-1) float32: of the item to its node's codeword at each layer
    above the items. ``by_id`` (V,) int64: positions in ascending order of item id. ``projection``: the codeword terms
    of the node embeddings, (W (d, E_l), b (E_l,)) per layer, or none.
    """

    features: Encoded
    distances: np.ndarray
    by_id: np.ndarray
    projection: Projection

    @classmethod
    def build(
        cls, index: HierarchicalIndex, items: Encoded, distances: np.ndarray, projection: Projection
    ) -> ItemRecords:
        """From items and distances (V, N-1) in the order of the index's corpus rows."""
        rows = index.row_of_position
        return cls(
            Encoded(items.dense[rows], items.ids[rows]),
            np.ascontiguousarray(distances[rows], dtype=np.float32),
            np.argsort(index.item_ids, kind="stable").astype(np.int64),
            projection,
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Named arrays for an array file."""
        arrays = {
            "dense": self.features.dense,
            "ids": self.features.ids,
            "distances": self.distances,
            "by_id": self.by_id,
        }
        for layer, (weight, bias) in enumerate(self.projection, start=1):
            arrays |= {f"projection.{layer}.weight": weight, f"projection.{layer}.bias": bias}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], index: HierarchicalIndex) -> ItemRecords:
        """The inverse of `to_arrays`; views, no copies. FormatError when they are not the records of the index."""
        expected = {
            "dense": (index.items, None),
            "ids": (index.items, None),
            "distances": (index.items, index.layers - 1),
            "by_id": (index.items,),
        }
        for name, shape in expected.items():
            if name not in arrays:
                raise FormatError(f"item records: array {name} is missing; got {', '.join(sorted(arrays))}")
            got = arrays[name].shape
            if len(got) != len(shape) or any(want not in (None, have) for want, have in zip(shape, got)):
                raise FormatError(f"item records: array {name} has shape {got}, expected {shape}")
        layers = sum(1 for name in arrays if name.startswith("projection.") and name.endswith(".weight"))
        projection = [
            (arrays[f"projection.{layer}.weight"], arrays[f"projection.{layer}.bias"])
            for layer in range(1, layers + 1)
        ]
        return cls(Encoded(arrays["dense"], arrays["ids"]), arrays["distances"], arrays["by_id"], projection)
