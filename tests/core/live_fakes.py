"""Items with features drawn from their number and version, and the corpus that a fresh build makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from core_fakes import FakeRunner, World

from hsnn_core.corpus import Corpus
from hsnn_core.features import Encoded
from hsnn_core.item_attributes import ItemAttributes
from hsnn_core.schema import KEY_MISSING, Schema


class SmoothRunner(FakeRunner):
    """Embeddings far from the ends of tanh, where many items would be equal."""

    def item_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        scaled = {name: (values % 13).astype(np.float32) / 16 for name, values in inputs.items()}
        return super().item_tower(scaled)


ELIGIBILITY = {
    "country": {"kind": "set", "type": "string", "max": 3, "ask": 2},
    "running": {"kind": "range", "from": "start", "until": "end", "default": "now"},
    "paused": {"kind": "flag"},
    "advertiser": {"kind": "key"},
}
COUNTRIES = ("IT", "FR", "DE", "ES")


def with_eligibility(world: World) -> None:
    """Give the world's schema attributes and a bid."""
    world.schema = Schema.from_dict(world.schema.to_dict() | {"eligibility": ELIGIBILITY, "bid": "bid"})
    world.transform = replace(world.transform, schema=world.schema)


class Catalogue:
    """The live items of a world: id -> raw features, as a plain dictionary, and id -> attributes. ``embeddings``: the
    type in which corpora hold them."""

    def __init__(self, world: World, embeddings: str = "float32") -> None:
        self.world, self.embeddings = world, np.dtype(embeddings)
        self.raw = {
            int(item): {name: values[row] for name, values in world.item_raw.items()}
            for row, item in enumerate(world.item_keys)
        }
        self.attribute_rows: dict[int, dict] = {}
        rng = np.random.default_rng(12)
        for item in self.raw:
            self._draw_attributes(rng, item)

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

        self._draw_attributes(rng, item)

    def _draw_attributes(self, rng: np.random.Generator, item: int) -> None:
        start = float(rng.integers(0, 100))
        self.attribute_rows[item] = {
            "country": [str(c) for c in rng.choice(COUNTRIES, size=rng.integers(0, 3), replace=False)],
            "running": [start if rng.random() < 0.7 else None, start + 40 if rng.random() < 0.7 else None],
            "paused": bool(rng.random() < 0.15),
            "advertiser": int(rng.integers(0, 5)) if rng.random() < 0.8 else None,
            "bid": float(rng.lognormal()),
        }

    def attributes(self, ids: list[int]) -> ItemAttributes | None:
        if not self.world.schema.has_attributes:
            return None
        rows = [
            {name: value for name, value in self.attribute_rows[item].items() if name != "bid"}
            for item in ids
        ]
        bids = [self.attribute_rows[item]["bid"] for item in ids]
        return ItemAttributes.from_rows(self.world.schema, rows, bids)

    def matches(self, item: int, countries: list[str], at: float, excluded: list[int]) -> bool:
        """The meaning of the attributes, item by item."""
        row = self.attribute_rows[item]
        start, until = row["running"]
        return (
            (not row["country"] or bool(set(row["country"]) & set(countries)))
            and (start is None or start <= at)
            and (until is None or at < until)
            and not row["paused"]
            and row["advertiser"] not in excluded
        )

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
        corpus = self.world.corpus(items=self.encoded(ids), item_ids=np.array(ids, dtype=np.int64), **changes)
        return corpus.with_attributes(self.attributes(ids)).with_embeddings(self.embeddings)
