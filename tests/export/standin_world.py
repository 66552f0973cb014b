"""A small corpus with every kind of feature, for a StandIn model: what export_source takes."""

from __future__ import annotations

import numpy as np
import torch
from standin import StandIn

from export.export_run import Source
from hsnn_core.features import FeatureTransform
from hsnn_core.schema import KEY_MISSING, Schema

ITEMS = 60
SCHEMA = Schema.from_dict(
    {
        "name": "standin",
        "keys": {"user": "user_id", "item": "item_id"},
        "tasks": [{"name": "click"}, {"name": "buy", "rank": 0.5}],
        "features": {
            "user": {
                "age": {"kind": "dense"},
                "taste": {"kind": "dense", "dim": 2},
                "history": {"kind": "sequence", "of": "item", "length": 4},
                "country": {"kind": "sparse", "vocab": 5},
            },
            "item": {
                "item": {"kind": "sparse", "of": "item"},
                "category": {"kind": "sparse", "hash": 9, "max": 2},
                "price": {"kind": "dense"},
            },
        },
        "interactions": {
            "topics": {"user": "history", "item": "category", "matches": 2},
            "seen": {"user": "history", "item": "item"},
        },
    }
)


class StandInRunner:
    """`hsnn_core.scorer.Runner` over a StandIn in torch."""

    def __init__(self, model: StandIn) -> None:
        self.model = model.eval()

    @torch.inference_mode()
    def user_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        named = {name: torch.from_numpy(value) for name, value in inputs.items()}
        out = self.model.user_tower(named.get("user_dense"), named.get("user_ids"))
        return {f"user_l{number}": value.numpy() for number, value in enumerate(out, 1)}

    @torch.inference_mode()
    def score(self, layer: int, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        named = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        monn, logits = self.model.score(
            layer,
            named["user"],
            named["item"],
            named.get("cross_dense"),
            named.get("cross_ids"),
            named.get("previous"),
        )
        return monn.numpy(), logits.numpy()


def raw_world(rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Item ids (60,), and raw tensors of 20 users and of the items, by feature of SCHEMA."""
    item_ids = np.arange(100, 100 + ITEMS, dtype=np.int64)
    categories = rng.integers(0, 1000, (ITEMS, 2))
    categories[::3, 1] = KEY_MISSING
    items = {
        "item": item_ids[:, None],
        "category": categories,
        "price": rng.normal(5, 2, (ITEMS, 1)).astype(np.float32),
    }
    users = {
        "age": rng.normal(40, 9, (20, 1)).astype(np.float32),
        "taste": rng.normal(0, 1, (20, 2)).astype(np.float32),
        "history": rng.choice(item_ids, (20, 4)),
        "country": rng.integers(0, 5, (20, 1)),
    }
    return item_ids, users, items


def standin_source(layers: int = 3, seed: int = 0) -> Source:
    """A StandIn of N layers over 60 items, deterministic by seed."""
    rng = np.random.default_rng(seed)
    item_ids, users, items = raw_world(rng)
    transform = FeatureTransform.fit(SCHEMA, users, items, item_ids)
    model = StandIn(layers, user=(3, 5), item=(1, 3), cross=(6, 3), cardinality=ITEMS + 2, seed=seed)
    encoded = transform.encode_items(items)
    with torch.inference_mode():
        vectors = model.item_tower(torch.from_numpy(encoded.dense), torch.from_numpy(encoded.ids))[-1].numpy()
    # Codewords near items of the corpus, so that it spreads over the nodes.
    codebooks = [vectors[:6], vectors[6:9] - vectors[9:12], vectors[12:14] - vectors[14:16]][: layers - 1]
    return Source(
        schema=SCHEMA,
        transform=transform,
        model=model,
        runner=StandInRunner(model),
        items=encoded,
        item_ids=item_ids,
        codebooks=codebooks,
        codeword_projection=[
            (rng.normal(size=(6, width)).astype(np.float32), np.zeros(width, np.float32))
            for width in model.item_widths[: layers - 1]
        ],
        paths=None,
        widths=(2, 2, 2)[: layers - 1],
        k=10,
        max_k=50,
    )
