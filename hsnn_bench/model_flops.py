"""FLOPs of a whole model, counted by torch's own counter on meta tensors: what layers share is counted once.

Matrix products only; a multiply-add is two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from hsnn_core.schema import Schema
from hsnn_train.flops import counted
from hsnn_train.hsnn import HSNN
from hsnn_train.recipe import Recipe
from hsnn_train.recipe_sections import ModelConfig

from .rows import S


@dataclass(frozen=True)
class ModelFlops:
    """Attributes:
    user: once per request: the user towers, and the user-only terms of the OverArchs.
    item: once per item, offline.
    pairs: per layer, one <user, node> pair: interaction tower and OverArch.
    """

    user: int
    item: int
    pairs: tuple[int, ...]

    @property
    def pair(self) -> int:
        """One <user, item> pair down all layers."""
        return sum(self.pairs)

    @property
    def single(self) -> int:
        """One inference from raw features, which is what the paper's FLOPs column measures."""
        return self.user + self.item + self.pair

    def request(self, candidates: Sequence[float]) -> float:
        """A request that scores so many nodes per layer."""
        return self.user + sum(count * pair for count, pair in zip(candidates, self.pairs))


def model_flops(recipe: Recipe) -> ModelFlops:
    """Of a recipe's model on its schema."""
    model = recipe.model
    shape = (model.layers, model.index, model.codebooks, model.columns)
    return _count(recipe.schema.to_json(), json.dumps(shape))


def small_flops(recipe: Recipe) -> ModelFlops:
    """Of the ladder's MoNN Small, flat, on the recipe's schema: the unit of the paper's FLOPs column."""
    return _count(recipe.schema.to_json(), json.dumps(([S], "joint", [], [])))


@cache
def _count(schema_json: str, shape: str) -> ModelFlops:
    """Both as JSON, so that the answer can be kept: tables ask for the same models again and again."""
    schema = Schema.from_json(schema_json)
    layers, index, codebooks, columns = json.loads(shape)
    config = ModelConfig(tuple(layers), index, tuple(codebooks), tuple(columns))
    cardinality = {f.space: 8 for f in schema.features if f.encoding is not None}
    with torch.device("meta"):
        model = HSNN(schema, cardinality, config.monns(), config.index_config()).eval()
        users, items = schema.layout("user"), schema.layout("item")
        user = counted(lambda: model.user_tower(*_inputs(users.dense_width, users.ids_width)))
        item = counted(lambda: model.item_tower(*_inputs(items.dense_width, items.ids_width)))
        pairs = []
        for layer in range(1, model.layers + 1):
            one, two = (_scored(model, layer, candidates) for candidates in (1, 2))
            pairs.append(two - one)  # what one more node costs; the rest of `one` is the user's
            user += one - pairs[-1]
    return ModelFlops(user, item, tuple(pairs))


def _inputs(dense: int, ids: int, *shape: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Dense (1, ..., D) float32 and ids (1, ..., S) int32 of ones, None for those without a width."""
    return (
        torch.ones(1, *shape, dense) if dense else None,
        torch.ones(1, *shape, ids, dtype=torch.int32) if ids else None,
    )


def _scored(model: HSNN, layer: int, candidates: int) -> int:
    """FLOPs of one user's ``candidates`` at a layer, their embeddings given."""
    user = torch.ones(1, model.user_widths[layer - 1])
    node = torch.ones(1, candidates, model.item_widths[layer - 1])
    cross = _inputs(model.cross_dense_width, model.cross_ids_width, candidates)
    previous = torch.ones(1, candidates, (layer - 1) * model.tasks) if layer > 1 else None
    return counted(lambda: model.score(layer, user, node, *cross, previous))
