"""FLOPs of a MoNN: matrix products counted by torch's own counter on meta tensors (no memory, no time).

Element-wise work and embedding look-ups are not counted; a multiply-add is two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from hsnn_core.schema import Schema

from .monn import MoNN, cross_layout
from .presets import PAPER_FEATURES, PAPER_FLOPS_RATIO, PRESETS, MoNNConfig
from .trunk import Trunk


@dataclass(frozen=True)
class Flops:
    """FLOPs of one MoNN: the user's share (user tower and the user-only terms of the OverArch, once per
    request), the item tower (once per item, offline), one <user, node> pair (interaction tower + OverArch),
    and one inference from raw features: their sum."""

    user_tower: int
    item_tower: int
    pair: int

    @property
    def single_inference(self) -> int:
        return self.user_tower + self.item_tower + self.pair


def count(config: MoNNConfig, schema: Schema, node: bool = False) -> Flops:
    """FLOPs of a preset on a schema's features; ``node``: as a layer above the items."""
    user, item = schema.layout("user"), schema.layout("item")
    cross = cross_layout(schema)
    cardinality = {f.space: 8 for f in schema.features}
    with torch.device("meta"):
        trunk = Trunk(config.trunk, user, item, cardinality, len(schema.tasks)).eval()
        monn = MoNN(config, trunk, cardinality, cross, node).eval()

        def ids(width: int) -> torch.Tensor | None:
            return torch.ones(1, width, dtype=torch.int32) if width else None

        def dense(width: int) -> torch.Tensor | None:
            return torch.zeros(1, width) if width else None

        def scored(candidates: int) -> int:
            u = torch.zeros(1, monn.user_width)
            i = torch.zeros(1, candidates, monn.item_width)
            x = torch.zeros(1, candidates, cross.dense_width) if cross.specs else None
            xi = torch.zeros(1, candidates, cross.ids_width, dtype=torch.int32) if cross.specs else None
            return counted(lambda: monn.logits(u, i, monn.interact(u, i, x, xi)))

        pair = scored(2) - scored(1)  # what one more node costs; the rest of scored(1) is the user's
        return Flops(
            counted(lambda: monn.user_tower(*trunk.users(dense(user.dense_width), ids(user.ids_width))))
            + scored(1)
            - pair,
            counted(lambda: monn.item_tower(*trunk.items(dense(item.dense_width), ids(item.ids_width)))),
            pair,
        )


def counted(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def reference_schema(user: int, item: int, interactions: int) -> Schema:
    """A schema with Table 5's feature counts: ids of one value each, and interactions between them."""
    sparse = {"kind": "sparse", "hash": 8}
    users = {f"u{i}": dict(sparse) for i in range(user)}
    items = {
        f"i{i}": {**sparse, "same_as": f"u{i}"} if i < interactions else dict(sparse) for i in range(item)
    }
    return Schema.from_dict(
        {
            "name": "reference",
            "keys": {"user": "user_id", "item": "item_id"},
            "tasks": [{"name": "click"}, {"name": "conversion"}],
            "features": {"user": users, "item": items},
            "interactions": {
                f"x{i}": {"user": f"u{i}", "item": f"i{i}", "matches": 1} for i in range(interactions)
            },
        }
    )


@dataclass(frozen=True)
class PresetRow:
    """One line of the preset table: counted FLOPs and their ratio to Small beside the paper's."""

    name: str
    flops: Flops
    ratio: float
    paper_ratio: float


def preset_table() -> list[PresetRow]:
    """The five Table 5 presets on Table 5's feature counts; the ratio is of a single inference, which is what
    the paper's FLOPs column measures ("the amount of computations needed for a single inference")."""
    counted = {
        name: count(PRESETS[name](), reference_schema(*PAPER_FEATURES[name])) for name in PAPER_FEATURES
    }
    unit = counted["small"].single_inference
    return [
        PresetRow(name, flops, flops.single_inference / unit, PAPER_FLOPS_RATIO[name])
        for name, flops in counted.items()
    ]
