"""Modular Neural Network (paper §2): user, item and interaction towers under an OverArch.

The forward pass is split as serving splits it: the user tower once per request, the item tower once per item,
interaction tower and OverArch per <user, node>. Training calls the same three methods.

Letters: B users, C nodes per user, nu/ni/nx embeddings, P interaction specs of the schema.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hsnn_core.schema import Layout

from .overarch import DHENOverArch, DotOverArch
from .presets import MoNNConfig
from .towers import EmbeddingTables, FieldEmbedder, TowerNetwork, masked_mean

#: dense crossings I2IF gives per interaction spec: matched terms, share of the user's mass, share of the item's
CROSS_DENSE = 3


@dataclass(frozen=True)
class CrossLayout:
    """What I2IF hands to the interaction tower: per spec 3 dense crossings and `matches` matched ids."""

    specs: tuple[tuple[str, int, int], ...]  # (id space of the matched terms, start, stop) in cross_ids

    @property
    def dense_width(self) -> int:
        return CROSS_DENSE * len(self.specs)

    @property
    def ids_width(self) -> int:
        return self.specs[-1][2] if self.specs else 0


class InteractionTower(nn.Module):
    """Interaction tower. Fields: per spec the dense crossings and the matched ids; an index layer's tower
    (``node=True``) also takes the user's and the node's embeddings as fields (paper §3.2.3: "utilizing only
    user and item features"), because crossings of a representative say little about the node's other items.

    -> (B, C, nx, dx)
    """

    def __init__(self, config: MoNNConfig, cross: CrossLayout, node: bool) -> None:
        super().__init__()
        assert config.interaction is not None
        self.cross = cross
        e = config.embed
        self.dense = nn.ModuleList(nn.Linear(CROSS_DENSE, e) for _ in cross.specs)
        self.user_field = nn.Linear(config.user.num_embed * config.user.dim, e) if node else None
        self.node_field = nn.Linear(config.item.num_embed * config.item.dim, e) if node else None
        self.network = TowerNetwork(2 * len(cross.specs) + (2 if node else 0), e, config.interaction)

    def forward(
        self, tables: EmbeddingTables, user: Tensor, item: Tensor, dense: Tensor | None, ids: Tensor | None
    ) -> Tensor:
        fields: list[Tensor] = []
        if self.cross.specs:
            assert dense is not None and ids is not None
            for p, ((space, start, stop), linear) in enumerate(zip(self.cross.specs, self.dense)):
                fields.append(linear(dense[..., CROSS_DENSE * p : CROSS_DENSE * (p + 1)]))
                own = ids[..., start:stop]
                fields.append(masked_mean(tables(space, own), (own != 0).to(dense.dtype)))
        if self.user_field is not None and self.node_field is not None:
            node = self.node_field(item.flatten(-2))
            fields.append(self.user_field(user.flatten(-2)).unsqueeze(1).expand_as(node))
            fields.append(node)
        out: Tensor = self.network(torch.stack(fields, dim=-2))
        return out


class MoNN(nn.Module):
    """One MoNN.

    Args:
        config: a preset.
        user, item: layouts of the packed encoded features.
        cardinality: ids per space.
        cross: I2IF layout.
        tasks: T.
        node: True for a layer of index nodes, False for the item layer.
    """

    def __init__(
        self,
        config: MoNNConfig,
        user: Layout,
        item: Layout,
        cardinality: dict[str, int],
        cross: CrossLayout,
        tasks: int,
        node: bool,
    ) -> None:
        super().__init__()
        self.config = config
        used = {s.feature.space for s in (*user.slots, *item.slots)} | {space for space, _, _ in cross.specs}
        self.tables = EmbeddingTables({s: cardinality[s] for s in sorted(used)}, config.embed)
        self.user_fields = FieldEmbedder(user, self.tables)
        self.item_fields = FieldEmbedder(item, self.tables)
        self.user_network = TowerNetwork(self.user_fields.fields, config.embed, config.user)
        self.item_network = TowerNetwork(self.item_fields.fields, config.embed, config.item)
        has_fields = bool(cross.specs) or node
        self.interaction: InteractionTower | None = None
        if config.interaction is not None and has_fields:
            self.interaction = InteractionTower(config, cross, node)
        width = config.item.dim
        self.user_align = nn.Linear(config.user.dim, width) if config.user.dim != width else None
        nx = 0
        self.cross_align: nn.Linear | None = None
        if self.interaction is not None:
            assert config.interaction is not None
            nx = config.interaction.num_embed
            if config.interaction.dim != width:
                self.cross_align = nn.Linear(config.interaction.dim, width)
        self.over: nn.Module
        if config.over.kind == "dot":
            self.over = DotOverArch(width, tasks)
        else:
            self.over = DHENOverArch(
                config.user.num_embed, config.item.num_embed + nx, width, tasks, config.over
            )

    @property
    def user_width(self) -> int:
        """U = nu * d_u, floats per user that scoring needs."""
        return self.config.user.num_embed * self.config.user.dim

    @property
    def item_width(self) -> int:
        """E = ni * d_i, floats per node."""
        return self.config.item.num_embed * self.config.item.dim

    def user_tower(self, dense: Tensor | None, ids: Tensor | None) -> Tensor:
        """(B, D) float32, (B, S) int32 -> (B, U)."""
        return self.user_network(self.user_fields(self.tables, dense, ids)).flatten(-2)

    def item_tower(self, dense: Tensor | None, ids: Tensor | None) -> Tensor:
        """(R, D) float32, (R, S) int32 -> (R, E)."""
        return self.item_network(self.item_fields(self.tables, dense, ids)).flatten(-2)

    def interact(
        self, user: Tensor, item: Tensor, cross_dense: Tensor | None, cross_ids: Tensor | None
    ) -> Tensor | None:
        """Interaction embedding (B, C, nx, dx) of user (B, U) and nodes (B, C, E); None without such a tower."""
        if self.interaction is None:
            return None
        tokens = user.unflatten(-1, (self.config.user.num_embed, -1))
        nodes = item.unflatten(-1, (self.config.item.num_embed, -1))
        out: Tensor = self.interaction(self.tables, tokens, nodes, cross_dense, cross_ids)
        return out

    def logits(self, user: Tensor, item: Tensor, interaction: Tensor | None) -> Tensor:
        """OverArch. user (B, U), item (B, C, E), interaction (B, C, nx, dx) -> (B, C, T)."""
        tokens = user.unflatten(-1, (self.config.user.num_embed, -1))
        if self.user_align is not None:
            tokens = self.user_align(tokens)
        pair = item.unflatten(-1, (self.config.item.num_embed, -1))
        if interaction is not None:
            if self.cross_align is not None:
                interaction = self.cross_align(interaction)
            pair = torch.cat([pair, interaction], dim=-2)
        out: Tensor = self.over(tokens, pair)
        return out
