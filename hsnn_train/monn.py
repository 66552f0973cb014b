"""Modular Neural Network (paper §2): user, item and interaction towers under an OverArch.

The forward pass is split as serving splits it: the user tower once per request, the item tower once per item,
interaction tower and OverArch per <user, node>. Training calls the same three methods.

Letters: B users, C nodes per user, nu/ni/nx embeddings, P interaction specs of the schema.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hsnn_core.schema import ID_FIRST, ITEM_SPACE, Schema

from .mol import MoLOverArch
from .overarch import DHENOverArch, InnerProduct
from .presets import MoNNConfig
from .towers import EmbeddingTables, TowerNetwork, masked_mean
from .trunk import Trunk

#: dense crossings I2IF gives per interaction spec (`hsnn_core.i2if`)
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


def cross_layout(schema: Schema) -> CrossLayout:
    """CrossLayout of a schema: in declaration order, `matches` ids per interaction in the item feature's space."""
    specs = []
    start = 0
    for spec in schema.interactions:
        specs.append((schema.feature(spec.item).space, start, start + spec.matches))
        start += spec.matches
    return CrossLayout(tuple(specs))


class InteractionTower(nn.Module):
    """Interaction tower. Fields: per spec the dense crossings and the matched ids, from tables of its own; an index
    layer's tower (``node=True``) also takes the user's and the node's embeddings as fields (paper §3.2.3:
    "utilizing only user and item features"), because crossings of a representative say little about the node's
    other items.

    -> (B, C, nx, dx)
    """

    def __init__(
        self, config: MoNNConfig, cross: CrossLayout, cardinality: dict[str, int], node: bool
    ) -> None:
        super().__init__()
        assert config.interaction is not None
        self.cross = cross
        e = config.cross
        self.tables = EmbeddingTables({s: cardinality[s] for s in sorted({s for s, _, _ in cross.specs})}, e)
        self.dense = nn.ModuleList(nn.Linear(CROSS_DENSE, e) for _ in cross.specs)
        self.user_field = nn.Linear(config.user.num_embed * config.user.dim, e) if node else None
        self.node_field = nn.Linear(config.item.num_embed * config.item.dim, e) if node else None
        self.network = TowerNetwork(2 * len(cross.specs) + (2 if node else 0), e, config.interaction)
        self._held: RemovableHandle | None = None

    def hold_unknown(self, known: Tensor) -> None:
        """Matches of items that have no embedding of their own (``known`` (V,) bool is False) get embeddings of zeros,
        which no gradient moves: noise, or what a few impressions taught, would rank what is new by chance."""
        if not any(space == ITEM_SPACE for space, _, _ in self.cross.specs):
            return
        weight = self.tables.weight(ITEM_SPACE)
        kept = torch.ones(len(weight), 1, device=weight.device)
        kept[ID_FIRST:][~known] = 0.0
        with torch.no_grad():
            weight.mul_(kept)
        if self._held is not None:
            self._held.remove()
        self._held = weight.register_hook(lambda gradient: gradient * kept.to(gradient.device))

    def forward(self, user: Tensor, item: Tensor, dense: Tensor | None, ids: Tensor | None) -> Tensor:
        fields: list[Tensor] = []
        if self.cross.specs:
            assert dense is not None and ids is not None
            for p, ((space, start, stop), linear) in enumerate(zip(self.cross.specs, self.dense)):
                fields.append(linear(dense[..., CROSS_DENSE * p : CROSS_DENSE * (p + 1)]))
                own = ids[..., start:stop]
                fields.append(masked_mean(self.tables(space, own), (own != 0).to(dense.dtype)))
        if self.user_field is not None and self.node_field is not None:
            node = self.node_field(item.flatten(-2))
            fields.append(self.user_field(user.flatten(-2)).unsqueeze(1).expand_as(node))
            fields.append(node)
        out: Tensor = self.network(torch.stack(fields, dim=-2))
        return out


class MoNN(nn.Module):
    """One MoNN: on top of a trunk, the embeddings of its user, item and interaction towers under its OverArch. Its
    logit is the inner product of the trunk's two-tower vectors plus what the OverArch makes of the embeddings (a
    mixture of logits stands alone: there the inner product only proposes negatives).

    A user's or an item's packed embedding is the trunk's vector(s) followed by the tower's embeddings.

    Args:
        config: a preset.
        trunk: shared with the other layers whose preset has the same trunk.
        cardinality: ids per space.
        cross: I2IF layout.
        node: True for a layer of index nodes, False for the item layer.
    """

    def __init__(
        self, config: MoNNConfig, trunk: Trunk, cardinality: dict[str, int], cross: CrossLayout, node: bool
    ) -> None:
        super().__init__()
        self.config = config
        tasks, e = trunk.tasks, trunk.config.embed
        self.user_vector_width, self.item_vector_width = tasks * e, e
        self.dot = InnerProduct(e, tasks)
        self.over: nn.Module | None = None
        self.interaction: InteractionTower | None = None
        if config.over.kind == "dot":
            return
        self.user_network = TowerNetwork(trunk.user_fields.fields, e, config.user)
        self.item_network = TowerNetwork(trunk.item_fields.fields, e, config.item)
        if config.interaction is not None and (cross.specs or node):
            self.interaction = InteractionTower(config, cross, cardinality, node)
        width = config.item.dim
        self.user_align = nn.Linear(config.user.dim, width) if config.user.dim != width else None
        nx = 0
        self.cross_align: nn.Linear | None = None
        if self.interaction is not None:
            assert config.interaction is not None
            nx = config.interaction.num_embed
            if config.interaction.dim != width:
                self.cross_align = nn.Linear(config.interaction.dim, width)
        kind = MoLOverArch if config.over.kind == "mol" else DHENOverArch
        self.over = kind(config.user.num_embed, config.item.num_embed + nx, width, tasks, config.over)

    @property
    def user_width(self) -> int:
        """U, floats per user that scoring needs: T vectors and nu embeddings."""
        return self.user_vector_width + (
            self.config.user.num_embed * self.config.user.dim if self.over is not None else 0
        )

    @property
    def item_width(self) -> int:
        """E, floats per node: a vector and ni embeddings."""
        return self.item_vector_width + (
            self.config.item.num_embed * self.config.item.dim if self.over is not None else 0
        )

    def user_tower(self, fields: Tensor, vectors: Tensor) -> Tensor:
        """The trunk's fields (R, F, e) and vectors (R, T, e) of users -> (R, U)."""
        if self.over is None:
            return vectors.flatten(-2)
        return torch.cat([vectors.flatten(-2), self.user_network(fields).flatten(-2)], dim=-1)

    def item_tower(self, fields: Tensor, vector: Tensor) -> Tensor:
        """The trunk's fields (R, F, e) and vector (R, e) of items -> (R, E)."""
        if self.over is None:
            return vector
        return torch.cat([vector, self.item_network(fields).flatten(-2)], dim=-1)

    def _tokens(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """The towers' embeddings out of packed (B, U), (B, C, E) -> (B, nu, d_u), (B, C, ni, d_i)."""
        own, nodes = user[..., self.user_vector_width :], item[..., self.item_vector_width :]
        return (
            own.unflatten(-1, (self.config.user.num_embed, -1)),
            nodes.unflatten(-1, (self.config.item.num_embed, -1)),
        )

    def interact(
        self, user: Tensor, item: Tensor, cross_dense: Tensor | None, cross_ids: Tensor | None
    ) -> Tensor | None:
        """Interaction embedding (B, C, nx, dx) of user (B, U) and nodes (B, C, E); None without such a tower."""
        if self.interaction is None:
            return None
        out: Tensor = self.interaction(*self._tokens(user, item), cross_dense, cross_ids)
        return out

    def logits(self, user: Tensor, item: Tensor, interaction: Tensor | None) -> Tensor:
        """user (B, U), item (B, C, E), interaction (B, C, nx, dx) -> (B, C, T)."""
        vectors = user[..., : self.user_vector_width].unflatten(-1, (-1, self.item_vector_width))
        dot: Tensor = self.dot(vectors, item[..., : self.item_vector_width])
        if self.over is None:
            return dot
        tokens, pair = self._tokens(user, item)
        if self.user_align is not None:
            tokens = self.user_align(tokens)
        if interaction is not None:
            if self.cross_align is not None:
                interaction = self.cross_align(interaction)
            pair = torch.cat([pair, interaction], dim=-2)
        more: Tensor = self.over(tokens, pair)
        return more if self.config.over.kind == "mol" else dot + more
