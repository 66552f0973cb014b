"""Items with features drawn from their number and version, and the corpus that a fresh build makes of them."""

from __future__ import annotations

import numpy as np
from core_fakes import FakeRunner, World

from hsnn_core.corpus import Corpus
from hsnn_core.features import Encoded
from hsnn_core.schema import KEY_MISSING


class SmoothRunner(FakeRunner):
    """Embeddings far from the ends of tanh, where many items would be equal."""

    def item_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        scaled = {name: (values % 13).astype(np.float32) / 16 for name, values in inputs.items()}
        return super().item_tower(scaled)


class Catalogue:
    """The live items of a world: id -> raw features, as a plain dictionary."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.raw = {
            int(item): {name: values[row] for name, values in world.item_raw.items()}
            for row, item in enumerate(world.item_keys)
        }

    def draw(self, rng: np.random.Generator, item: int) -> None:
        """New features for an item, which may be new itself."""
        category = np.full(3, KEY_MISSING, dtype=np.int64)
        count = rng.integers(0, 4)
        category[:count] = rng.integers(0, 8, size=count)
        self.raw[item] = {
            "item": np.array([item], dtype=np.int64),
            "category": category,
            "price": rng.normal(size=1).astype(np.float32),
        }

    def encoded(self, ids: list[int]) -> Encoded:
        if not ids:
            whole = self.world.transform.encode_items(self.world.item_raw)
            return Encoded(whole.dense[:0], whole.ids[:0])
        names = self.world.item_raw
        return self.world.transform.encode_items(
            {name: np.stack([self.raw[item][name] for item in ids]) for name in names}
        )

    def corpus(self, **changes) -> Corpus:
        """A fresh build over what is live."""
        ids = sorted(self.raw)
        return self.world.corpus(items=self.encoded(ids), item_ids=np.array(ids, dtype=np.int64), **changes)
