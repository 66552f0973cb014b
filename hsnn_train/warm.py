"""Warm starts shared by runs. Where the two towers come first, training begins with the item layer's alone, and what
they are at the end of that phase depends on neither the layers above nor the index. So runs that agree in everything
else may share it: the result is the same, bit for bit, as if each had trained it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hsnn_core.files import written_aside
from hsnn_train.data.dataset import Dataset

from .batches import held_share
from .device import device_name
from .hsnn import HSNN
from .recipe import Recipe

#: of `train:`, what the first phase reads
READ = (
    "batch_size", "first_lr", "weight_decay", "seed", "pool", "softmax", "temperature", "negatives",
    "unlabelled", "negative_power", "listed", "listed_from",
)  # fmt: skip


class WarmStarts:
    """A folder of warm starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(
        self, recipe: Recipe, dataset: Dataset, model: HSNN, optimizer: torch.optim.Optimizer, steps: int
    ) -> list[dict[str, Any]] | None:
        """Put the kept first phase of ``steps`` steps in place; returns its history, None when there is none."""
        path = self._path(recipe, dataset, model, steps)
        if path is None or not path.exists():
            return None
        saved = torch.load(path, map_location="cpu", weights_only=True)
        whole = optimizer.state_dict()
        for name, (parameter, number) in _two_towers(model, optimizer).items():
            parameter.data.copy_(saved["parameters"][name])
            if name in saved["optimizer"]:
                whole["state"][number] = saved["optimizer"][name]
        optimizer.load_state_dict(whole)
        history: list[dict[str, Any]] = saved["history"]
        return history

    def keep(
        self,
        recipe: Recipe,
        dataset: Dataset,
        model: HSNN,
        optimizer: torch.optim.Optimizer,
        steps: int,
        history: list[dict[str, Any]],
    ) -> None:
        """Keep the two towers, their optimiser state and their losses, where no other run has."""
        path = self._path(recipe, dataset, model, steps)
        if path is None or path.exists():
            return
        found = _two_towers(model, optimizer)
        state = optimizer.state_dict()["state"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as f:
            torch.save(
                {
                    "parameters": {name: parameter.detach() for name, (parameter, _) in found.items()},
                    "optimizer": {
                        name: state[number] for name, (_, number) in found.items() if number in state
                    },
                    "history": [row for row in history if "loss" in row],
                },
                f,
            )

    def _path(self, recipe: Recipe, dataset: Dataset, model: HSNN, steps: int) -> Path | None:
        """Where such a phase is kept; None when the run has none, or several trunks."""
        if not recipe.train.two_phases or len(model.trunks) > 1:
            return None
        train = dataset.train
        content = hashlib.sha256()
        for array in (train.users.dense, train.users.ids, train.item_row, train.labels, train.user_key, train.time,
                      dataset.items.ids, dataset.items.dense, dataset.item_keys):  # fmt: skip
            content.update(np.ascontiguousarray(array).data)
        key = {
            "schema": recipe.schema.hash,
            "data": content.hexdigest(),
            "trunk": repr(model.trunk(model.layers).config),
            "dropout": [recipe.model.dropout, recipe.model.id_dropout],
            "min_positives": recipe.model.min_positives,
            "train": {name: getattr(recipe.train, name) for name in READ},
            "held": held_share(model, recipe.train.held),
            "candidates": recipe.search.candidates,
            "steps": steps,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": device_name(model.device),
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"warm-{name}.pt"


def _two_towers(model: HSNN, optimizer: torch.optim.Optimizer) -> dict[str, tuple[torch.nn.Parameter, int]]:
    """What the first phase trains, by name, with the optimiser's number of it."""
    in_order = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {id(p): number for number, p in enumerate(in_order)}
    modules = {"trunk": model.trunk(model.layers), "dot": model.layer(model.layers).dot}
    return {
        f"{name}.{key}": (p, numbers[id(p)])
        for name, module in modules.items()
        for key, p in module.named_parameters()
        if p.requires_grad
    }
