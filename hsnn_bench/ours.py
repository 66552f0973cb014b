"""Our own models as methods of a comparison: a recipe with changes, trained into a run, retrieved with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hsnn_cli.commands_training import train_and_evaluate, with_overrides
from hsnn_train.checkpoint import Run, load_run
from hsnn_train.data.dataset import Dataset
from hsnn_train.recipe import Recipe
from hsnn_train.retrieval import retrieval


def changed(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with dotted keys set to plain values. Raises SchemaError for those it does not know."""
    return with_overrides(recipe, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def variant(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe of one model of a comparison: dotted keys set to ``values``; before them, where the model reads no
    interactions, to what the recipe's section of that name says. The section itself is not kept: it is no part of what
    is trained. Raises SchemaError for keys that the recipe does not know."""
    own = recipe.changes_for(values.get("model.layers", recipe.model.layers))
    return changed(replace(recipe, without_interactions={}), {**own, **values})


def trained(recipe: Recipe, dataset: Dataset, run: Path) -> Run:
    """The run in that folder, trained to its end; one that was interrupted goes on."""
    train_and_evaluate(recipe, dataset, run, resume=(run / "checkpoint.pt").exists(), evaluate=False)
    return load_run(run)


def retrieved(
    run: Run, recipe: Recipe, dataset: Dataset, split: str, progress: bool = False
) -> dict[str, Any]:
    """What `hsnn_train.retrieval` reports of a run, with the ``recipe``'s search section."""
    return retrieval(run.model, dataset, recipe, run.index, split, progress)
