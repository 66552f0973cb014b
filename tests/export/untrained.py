"""Run directories as training leaves them, with the weights of the first step: any model in a second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from standin_world import SCHEMA, raw_world

from hsnn_core.features import FeatureTransform
from hsnn_core.item_attributes import ItemAttributes
from hsnn_core.schema import Schema
from hsnn_train.checkpoint import make_model, save_checkpoint, save_inputs
from hsnn_train.recipe import Recipe, recipe_from_dict
from hsnn_train.refresh import refresh

JOINT = {"layers": ["cpu_l", "cpu_m", "cpu_s"], "index": "joint", "codebooks": [6, 3]}
HIERARCHY = {
    "layers": ["cpu_m", "cpu_s"],
    "index": "hierarchy",
    "columns": ["item"],
    "codebooks": [],
}
# SCHEMA of items that not every request may return.
TARGETED = Schema.from_dict(
    SCHEMA.to_dict()
    | {
        "eligibility": {
            "shop": {"kind": "key"},
            "paused": {"kind": "flag"},
            "market": {"kind": "set", "max": 2},
        },
        "bid": "price",
    }
)
FLAT = {"layers": ["cpu_s"], "codebooks": []}
# Takes no interaction features, though a schema may have them.
TWO_TOWER = {"layers": ["two_tower_xs"], "codebooks": []}


def untrained_run(path: Path, model: Mapping[str, Any], schema: Schema = SCHEMA) -> Recipe:
    """A run in the folder `path` over the 60 items of `raw_world`; `schema`: SCHEMA, less of it, or TARGETED."""
    item_ids, users, items = raw_world(np.random.default_rng(0))
    users = {feature.name: users[feature.name] for feature in schema.user_features}
    items = {feature.name: items[feature.name] for feature in schema.item_features}
    transform = FeatureTransform.fit(schema, users, items, item_ids)
    encoded = transform.encode_items(items)
    recipe = recipe_from_dict(
        {
            "schema": schema.to_dict(),
            "data": {"impressions": "none.csv"},
            "model": dict(model),
            "search": {"widths": [2] * (len(model["layers"]) - 1), "k": 5, "max_k": 40},
        },
        "untrained",
        path,
    )
    attributes = None
    if schema.has_attributes:
        rows = [{"shop": int(key), "paused": key % 3 == 0, "market": [key % 4, 9]} for key in item_ids]
        attributes = ItemAttributes.from_rows(schema, rows, item_ids)
    save_inputs(path, recipe, transform, encoded, item_ids, attributes)
    torch.manual_seed(1)
    network = make_model(recipe, transform)
    state, _ = refresh(network, encoded, item_ids)
    save_checkpoint(
        path / "checkpoint.pt",
        {
            "schema_hash": schema.hash,
            "step": 0,
            "model": network.state_dict(),
            "optimizer": {},
            "paths": torch.from_numpy(state.paths),
            "representative": torch.from_numpy(state.representative),
            "history": [],
        },
    )
    return recipe
