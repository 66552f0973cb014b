"""Warm starts shared by runs. With a pool, training begins with the item layer's two towers alone, and what they are at
the end of that phase depends on neither the layers above nor the index. So runs that agree in everything else may
share it: the result is the same, bit for bit, as if each had trained it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hsnn_core.files import written_aside
from hsnn_train.data.dataset import Dataset

from .hsnn import HSNN
from .recipe import Recipe

#: of `train:`, what the first phase reads
READ = ("batch_size", "lr", "weight_decay", "seed", "pool", "softmax", "negative_power")


class WarmStarts:
    """A folder of warm starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, recipe: Recipe, dataset: Dataset, model: HSNN, steps: int) -> Path | None:
        """Where the warm start of such a run is kept; None when it has no such phase or several trunks."""
        if not recipe.train.pool or len(model.trunks) > 1:
            return None
        train = dataset.train
        content = hashlib.sha256()
        for array in (train.users.dense, train.users.ids, train.item_row, train.labels, dataset.items.ids,
                      dataset.items.dense, dataset.item_keys):  # fmt: skip
            content.update(array.tobytes())
        key = {
            "schema": recipe.schema.hash,
            "data": content.hexdigest(),
            "trunk": repr(model.trunk(model.layers).config),
            "dropout": [recipe.model.dropout, recipe.model.id_dropout],
            "train": {name: getattr(recipe.train, name) for name in READ},
            "steps": steps,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"warm-{name}.pt"

    def save(
        self, path: Path, model: HSNN, optimizer: torch.optim.Optimizer, history: list[dict[str, Any]]
    ) -> None:
        """Keep the two towers, their optimiser state and the history of the first phase."""
        state = optimizer.state_dict()["state"]
        numbers = {id(p): number for number, p in enumerate(_trained(optimizer))}
        modules = _two_towers(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as f:
            torch.save(
                {
                    "modules": {name: module.state_dict() for name, module in modules.items()},
                    "optimizer": {
                        f"{name}.{key}": state[numbers[id(p)]]
                        for name, module in modules.items()
                        for key, p in module.named_parameters()
                    },
                    "history": [row for row in history if "retrieval" in row],
                },
                f,
            )

    def load(self, path: Path, model: HSNN, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """Put a kept first phase in place; returns its history."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        whole = optimizer.state_dict()
        numbers = {id(p): number for number, p in enumerate(_trained(optimizer))}
        for name, module in _two_towers(model).items():
            module.load_state_dict(saved["modules"][name])
            for key, p in module.named_parameters():
                whole["state"][numbers[id(p)]] = saved["optimizer"][f"{name}.{key}"]
        optimizer.load_state_dict(whole)
        history: list[dict[str, Any]] = saved["history"]
        return history


def _two_towers(model: HSNN) -> Mapping[str, torch.nn.Module]:
    return {"trunk": model.trunk(model.layers), "dot": model.layer(model.layers).dot}


def _trained(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
