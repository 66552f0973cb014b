"""Hierarchical Structured Neural Network (paper §3): one MoNN per layer of a hierarchical index, an ensemble
per layer over the MoNN logits so far, and the index itself, learnt jointly.

Layers are numbered from 1 (coarsest) to N (items), as in the paper. A node of a layer below N is seen through
its representative item's features plus a term of its codeword chain, so that supervision reaches the codebooks.

Letters: B users, C candidates per user, R distinct items of a batch, T tasks, U_l / E_l floats per user / node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsnn_core.errors import SchemaError
from hsnn_core.schema import Schema

from .lti import LearnToIndex, LTIOutput
from .monn import CrossLayout, MoNN
from .presets import MoNNConfig


class NodeBatch(NamedTuple):
    """Distinct representatives of one index layer in a batch, and where each pair finds its own."""

    dense: Tensor | None  # (R_l, D)
    ids: Tensor | None  # (R_l, S)
    of: Tensor  # (B, C) int64 into R_l


class Batch(NamedTuple):
    """B users with C candidates each. Everything training and evaluation feed to `HSNN.forward`."""

    user_dense: Tensor | None  # (B, Du) float32
    user_ids: Tensor | None  # (B, Su) int32
    items: NodeBatch  # distinct items (layer N)
    nodes: tuple[NodeBatch, ...]  # representatives, layers 1..N-1
    paths: Tensor  # (R, N-1) int64, hard codes of the distinct items
    cross_dense: tuple[Tensor | None, ...]  # per layer (B, C, 3P)
    cross_ids: tuple[Tensor | None, ...]  # per layer (B, C, M)
    labels: Tensor  # (B, C, T)
    labelled: Tensor  # (B, C) 1 where labels hold, 0 for unlabelled pairs


class HSNNOutput(NamedTuple):
    """Per layer l: MoNN and ensemble logits (B, C, T), interaction embeddings; and the index's view."""

    monn: list[Tensor]
    logits: list[Tensor]
    interactions: list[Tensor | None]
    index_logits: list[Tensor]  # layers 1..N-1, <u, c-bar> (B, C, T)
    lti: LTIOutput | None
    v: Tensor  # (R, d_index)


class LayerEnsemble(nn.Module):
    """Linear layer over the MoNN logits of layers 1..l, per task (paper §3.1). (B, C, l, T) -> (B, C, T)."""

    def __init__(self, layers: int, tasks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((layers, tasks), 1.0 / layers))
        self.bias = nn.Parameter(torch.zeros(tasks))

    def forward(self, logits: Tensor) -> Tensor:
        return (logits * self.weight).sum(-2) + self.bias


@dataclass(frozen=True)
class IndexConfig:
    """How the hierarchy comes about.

    Attributes:
        method: "joint" (LTI, §3.2.1-3), "kmeans" (separate index learning), "em" (alternating), or
            "hierarchy" (existing columns of the item table).
        codebooks: K_l per index layer; for "hierarchy" empty.
        columns: item columns from coarse to fine, for "hierarchy".
        pool: batches pooled by the FLOPs regulariser.
    """

    method: str = "joint"
    codebooks: tuple[int, ...] = ()
    columns: tuple[str, ...] = ()
    pool: int = 8


class HSNN(nn.Module):
    """The whole model; N = 1 is a flat MoNN (or, with the dot-product preset, a two tower).

    Args:
        schema: declares features, interactions and tasks.
        cardinality: ids per space, from the fitted feature transform.
        layers: one MoNNConfig per layer, coarse to fine.
        index: how the hierarchy is built.
    """

    def __init__(
        self, schema: Schema, cardinality: dict[str, int], layers: Sequence[MoNNConfig], index: IndexConfig
    ) -> None:
        super().__init__()
        depth = len(index.columns) if index.method == "hierarchy" else len(index.codebooks)
        if not layers or depth != len(layers) - 1:
            raise SchemaError(
                f"model: got {len(layers)} layers and {depth} index layers; expected one index layer "
                "(codebook or hierarchy column) less than layers"
            )
        self.schema = schema
        self.index = index
        self.layers = len(layers)
        self.tasks = len(schema.tasks)
        user, item = schema.layout("user"), schema.layout("item")
        self.user_dense_width, self.user_ids_width = user.dense_width, user.ids_width
        self.item_dense_width, self.item_ids_width = item.dense_width, item.ids_width
        self.cross = cross_layout(schema)
        self.cross_dense_width, self.cross_ids_width = self.cross.dense_width, self.cross.ids_width
        self.monn = nn.ModuleList(
            MoNN(config, user, item, cardinality, self.cross, self.tasks, node=number < self.layers)
            for number, config in enumerate(layers, start=1)
        )
        self.ensemble = nn.ModuleList(
            LayerEnsemble(number, self.tasks) for number in range(1, self.layers + 1)
        )
        last = self.layer(self.layers)
        self.index_width = last.item_width
        self.lti: LearnToIndex | None = None
        if index.codebooks:
            self.lti = LearnToIndex(index.codebooks, self.index_width, index.pool)
            if index.method != "joint":
                self.lti.requires_grad_(False)
            self.codeword_term = nn.ModuleList(
                nn.Linear(self.index_width, self.layer(number).item_width) for number in range(1, self.layers)
            )
            self.index_user = nn.Linear(last.user_width, self.tasks * self.index_width)
            self.index_bias = nn.Parameter(torch.zeros(len(index.codebooks), self.tasks))
        target = last.config.interaction
        self.interaction_align = nn.ModuleList(
            nn.Linear(m.config.interaction.dim, target.dim)
            if m.config.interaction is not None and target is not None
            else nn.Identity()
            for m in (self.layer(number) for number in range(1, self.layers))
        )

    def layer(self, number: int) -> MoNN:
        """The MoNN of layer ``number`` (from 1)."""
        module = self.monn[number - 1]
        assert isinstance(module, MoNN)
        return module

    @property
    def user_widths(self) -> list[int]:
        """U_l per layer."""
        return [self.layer(number).user_width for number in range(1, self.layers + 1)]

    @property
    def item_widths(self) -> list[int]:
        """E_l per layer."""
        return [self.layer(number).item_width for number in range(1, self.layers + 1)]

    # Serving: the three graphs that are exported.

    def user_tower(self, dense: Tensor | None, ids: Tensor | None) -> tuple[Tensor, ...]:
        """User towers of all layers: N tensors (B, U_l)."""
        return tuple(self.layer(number).user_tower(dense, ids) for number in range(1, self.layers + 1))

    def item_tower(self, dense: Tensor | None, ids: Tensor | None) -> tuple[Tensor, ...]:
        """Item towers of all layers, N tensors (V, E_l), and the index vector v (V, d_index)."""
        out = tuple(self.layer(number).item_tower(dense, ids) for number in range(1, self.layers + 1))
        return (*out, self.index_vector(out[-1]))

    def score(
        self,
        layer: int,
        user: Tensor,
        item: Tensor,
        cross_dense: Tensor | None,
        cross_ids: Tensor | None,
        previous: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """One step of Algorithm 2: user (B, U_l), nodes (B, C, E_l), ancestors' MoNN logits (B, C, (l-1)T) ->
        this layer's MoNN logits and ensemble logits, both (B, C, T)."""
        monn = self.layer(layer)
        own = monn.logits(user, item, monn.interact(user, item, cross_dense, cross_ids))
        stacked = own.unsqueeze(-2)
        if previous is not None:
            stacked = torch.cat([previous.unflatten(-1, (layer - 1, self.tasks)), stacked], dim=-2)
        return own, self.ensemble[layer - 1](stacked)

    def index_vector(self, item: Tensor) -> Tensor:
        """The vector that is indexed: the item layer's item embedding, layer-normalised without parameters.

        The normalisation fixes ||v||^2 = d, so that the reconstruction loss cannot be lowered by shrinking v.
        """
        return F.layer_norm(item, (self.index_width,))

    def codebooks(self) -> list[np.ndarray]:
        """Codebooks (K_l, d) float32, layers 1..N-1; empty for a hierarchy taken from columns."""
        if self.lti is None:
            return []
        return [c.detach().cpu().numpy().astype(np.float32) for c in self.lti.codebook]

    def codeword_projection(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per index layer W (d, E_l) and b (E_l,): a node's embedding gets (sum of its codewords) @ W + b."""
        if self.lti is None:
            return []
        out = []
        for term in self.codeword_term:
            assert isinstance(term, nn.Linear)
            out.append((term.weight.detach().T.contiguous().cpu().numpy(), term.bias.detach().cpu().numpy()))
        return out

    # Training.

    def _quantised(
        self, batch: Batch, v: Tensor, alpha: float | None
    ) -> tuple[LTIOutput | None, list[Tensor]]:
        """Codeword chains of the batch's items, per index layer (R, d): soft at ``alpha``, hard when None."""
        if self.lti is None:
            return None, []
        if alpha is not None:
            out = self.lti(v, alpha)
            return out, out.quantised
        chain = torch.zeros_like(v)
        quantised = []
        for number, codebook in enumerate(self.lti.codebook):
            chain = chain + codebook[batch.paths[:, number]]
            quantised.append(chain)
        return None, quantised

    def forward(self, batch: Batch, alpha: float | None) -> HSNNOutput:
        """Scores of all N layers for every <user, candidate> pair of the batch.

        Args:
            batch: see `Batch`.
            alpha: temperature of the soft assignment while the index is learnt jointly; None takes the hard
                codes of ``batch.paths``, as serving does.
        """
        users = self.user_tower(batch.user_dense, batch.user_ids)
        item = self.layer(self.layers).item_tower(batch.items.dense, batch.items.ids)  # (R, E_N)
        v = self.index_vector(item)
        lti, quantised = self._quantised(batch, v, alpha)
        monn: list[Tensor] = []
        logits: list[Tensor] = []
        interactions: list[Tensor | None] = []
        for number in range(1, self.layers + 1):
            module = self.layer(number)
            if number < self.layers:
                node = batch.nodes[number - 1]
                pair = module.item_tower(node.dense, node.ids)[node.of]  # (B, C, E_l)
                if quantised:
                    pair = pair + self.codeword_term[number - 1](quantised[number - 1])[batch.items.of]
            else:
                pair = item[batch.items.of]
            crossing = module.interact(
                users[number - 1], pair, batch.cross_dense[number - 1], batch.cross_ids[number - 1]
            )
            monn.append(module.logits(users[number - 1], pair, crossing))
            interactions.append(crossing)
            logits.append(self.ensemble[number - 1](torch.stack(monn, dim=-2)))
        index_logits = self._index_logits(users[-1], quantised, batch.items.of) if lti is not None else []
        return HSNNOutput(monn, logits, interactions, index_logits, lti, v)

    def _index_logits(self, user: Tensor, quantised: list[Tensor], of: Tensor) -> list[Tensor]:
        """<u, c-bar> per index layer and task (Algorithm 1, line 8). From the second layer on c-bar is only a
        residual, so the chain summed so far stands for the item: for layer 1 that is c-bar itself."""
        u = self.index_user(user).unflatten(-1, (self.tasks, self.index_width)) * self.index_width**-0.5
        return [
            torch.einsum("btd,bcd->bct", u, q[of]) + self.index_bias[number]
            for number, q in enumerate(quantised)
        ]

    def interaction_pull(self, interactions: list[Tensor | None]) -> Tensor:
        """Auxiliary MSE that pulls each index layer's interaction embedding to the item level's (§3.2.3). Both
        are layer-normalised first, which bounds the loss: the towers' outputs have no scale of their own. The
        target carries no gradient. Zero when a layer has no interaction tower."""
        target = interactions[-1]
        total = torch.zeros(())
        if target is None:
            return total
        goal = _normalised(target.detach())
        for crossing, align in zip(interactions[:-1], self.interaction_align):
            if crossing is not None:
                total = total + F.mse_loss(_normalised(align(crossing)), goal)
        return total


def _normalised(embeddings: Tensor) -> Tensor:
    """(..., nx, d) -> mean over nx, layer-normalised (..., d)."""
    return F.layer_norm(embeddings.mean(-2), (embeddings.shape[-1],))


def cross_layout(schema: Schema) -> CrossLayout:
    """CrossLayout of a schema: in declaration order, `matches` ids per interaction in the item feature's space."""
    specs = []
    start = 0
    for spec in schema.interactions:
        specs.append((schema.feature(spec.item).space, start, start + spec.matches))
        start += spec.matches
    return CrossLayout(tuple(specs))
