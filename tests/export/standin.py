"""A small module with the serving interface of hsnn_train.hsnn.HSNN, so that export is tested without
training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StandIn(nn.Module):
    """Tables, linear layers and one attention: the operators of a real model, in a few thousand weights."""

    def __init__(
        self,
        layers: int = 3,
        tasks: int = 2,
        user: tuple[int, int] = (3, 4),
        item: tuple[int, int] = (2, 3),
        cross: tuple[int, int] = (6, 5),
        cardinality: int = 40,
        seed: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers, self.tasks = layers, tasks
        self.user_dense_width, self.user_ids_width = user
        self.item_dense_width, self.item_ids_width = item
        self.cross_dense_width, self.cross_ids_width = cross
        self.user_widths = [16 + 8 * n for n in range(layers)]
        self.item_widths = [8 * (n + 1) for n in range(layers)]
        width = 8
        self.user_table, self.item_table = nn.Embedding(cardinality, width), nn.Embedding(cardinality, width)
        self.user_in, self.item_in = nn.Linear(user[0] + width, 16), nn.Linear(item[0] + width, 16)
        self.user_out = nn.ModuleList([nn.Linear(16, w) for w in self.user_widths])
        self.item_out = nn.ModuleList([nn.Linear(16, w) for w in self.item_widths])
        self.index_out = nn.Linear(16, 6)
        self.cross_table = nn.Embedding(cardinality, width)
        cross_width = cross[0] + (width if cross[1] else 0)
        self.mix = nn.ModuleList(
            [nn.Linear(u + e + cross_width, 32) for u, e in zip(self.user_widths, self.item_widths)]
        )
        self.norm = nn.ModuleList([nn.LayerNorm(32) for _ in range(layers)])
        self.head = nn.ModuleList([nn.Linear(32, tasks) for _ in range(layers)])
        self.ensemble = nn.ModuleList([nn.Linear((n + 1) * tasks, tasks) for n in range(layers)])

    def user_tower(self, user_dense: Tensor | None, user_ids: Tensor | None) -> tuple[Tensor, ...]:
        hidden = self._tower(self.user_in, self.user_table, user_dense, user_ids)
        return tuple(out(hidden) for out in self.user_out)

    def item_tower(self, item_dense: Tensor | None, item_ids: Tensor | None) -> tuple[Tensor, ...]:
        hidden = self._tower(self.item_in, self.item_table, item_dense, item_ids)
        return (*(out(hidden) for out in self.item_out), self.index_out(hidden))

    def score(
        self,
        layer: int,
        user: Tensor,
        item: Tensor,
        cross_dense: Tensor | None,
        cross_ids: Tensor | None,
        previous: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, candidates = item.shape[0], item.shape[1]
        parts = [user.unsqueeze(1).expand(batch, candidates, user.shape[1]), item]
        if cross_dense is not None:
            parts.append(cross_dense)
        if cross_ids is not None:
            parts.append(_pool(self.cross_table, cross_ids))
        hidden = self.norm[layer - 1](torch.relu(self.mix[layer - 1](torch.cat(parts, -1))))
        tokens = hidden.reshape(batch * candidates, 4, 8)
        weights = torch.softmax(tokens @ tokens.transpose(1, 2) / 8**0.5, -1)
        monn = self.head[layer - 1]((weights @ tokens).reshape(batch, candidates, 32) + hidden)
        stacked = monn if previous is None else torch.cat([previous, monn], -1)
        return monn, self.ensemble[layer - 1](stacked)

    def _tower(
        self, linear: nn.Module, table: nn.Embedding, dense: Tensor | None, ids: Tensor | None
    ) -> Tensor:
        present = dense if dense is not None else ids
        assert present is not None
        empty = torch.zeros(present.shape[0], table.embedding_dim)
        parts = [] if dense is None else [dense]
        parts.append(empty if ids is None else _pool(table, ids))
        return torch.tanh(linear(torch.cat(parts, -1)))


def _pool(table: nn.Embedding, ids: Tensor) -> Tensor:
    """Mean of the embeddings of the ids that are not padding."""
    mask = (ids > 0).to(torch.float32).unsqueeze(-1)
    return (table(ids) * mask).sum(-2) / mask.sum(-2).clamp(min=1.0)
