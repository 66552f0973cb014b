"""Hierarchical Structured Neural Network (paper §3): one MoNN per layer of a hierarchical index, an ensemble
per layer over the MoNN logits so far, and the index itself, learnt jointly.

Layers are numbered from 1 (coarsest) to N (items), as in the paper. A node of a layer below N is seen through
its representative item's features plus a term of its codeword chain, so that supervision reaches the codebooks.

Letters: B users, C candidates per user, R distinct items of a batch, T tasks, U_l / E_l floats per user / node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsnn_core.errors import SchemaError
from hsnn_core.features import Encoded
from hsnn_core.schema import ID_FIRST, Schema

from .ensemble import LayerEnsemble
from .lti import LearnToIndex, LTIOutput
from .monn import MoNN, cross_layout
from .overarch import InnerProduct
from .presets import MoNNConfig
from .trunk import UNKNOWN, Trunk


class NodeBatch(NamedTuple):
    """Distinct representatives of one index layer in a batch, and where each item finds its own."""

    dense: Tensor | None  # (R_l, D)
    ids: Tensor | None  # (R_l, S)
    of: Tensor  # (R,) int64 into R_l


class Sides(NamedTuple):
    """B users, and R distinct items with the nodes above them: what the towers take."""

    user_dense: Tensor | None  # (B, Du) float32
    user_ids: Tensor | None  # (B, Su) int32
    rows: np.ndarray  # (R,) item-table rows, ascending
    item_dense: Tensor | None  # (R, Di)
    item_ids: Tensor | None  # (R, Si)
    nodes: tuple[NodeBatch, ...]  # representatives, layers 1..N-1
    paths: Tensor  # (R, N-1) int64, hard codes of the items


class Pairs(NamedTuple):
    """C candidates of each user."""

    of: Tensor  # (B, C) int64 into the R items
    cross_dense: tuple[Tensor | None, ...]  # per layer (B, C, 3P)
    cross_ids: tuple[Tensor | None, ...]  # per layer (B, C, M)
    labels: Tensor  # (B, C, T)
    labelled: Tensor  # (B, C) 1 where labels hold, 0 for unlabelled pairs


class Batch(NamedTuple):
    """Everything training and evaluation feed to `HSNN.forward`."""

    sides: Sides
    pairs: Pairs

    @property
    def candidates(self) -> np.ndarray:
        """Item-table rows (B, C) of the pairs."""
        rows: np.ndarray = self.sides.rows[self.pairs.of.cpu().numpy()]
        return rows


class Embedded(NamedTuple):
    """The towers' view of a batch, and the index's."""

    users: tuple[Tensor, ...]  # per layer (B, U_l)
    items: tuple[Tensor, ...]  # per layer (R, E_l): of the item's node, at layer N its own
    lti: LTIOutput | None
    v: Tensor  # (R, e)
    chain: Tensor  # (R, e), the hard codewords of v summed over the index layers, without gradient


class HSNNOutput(NamedTuple):
    """Per layer l: MoNN and ensemble logits (B, C, T) and interaction embeddings; and the towers' view."""

    monn: list[Tensor]
    logits: list[Tensor]
    interactions: list[Tensor | None]
    embedded: Embedded


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
        dropout, id_dropout: see `Trunk`.
    """

    def __init__(
        self,
        schema: Schema,
        cardinality: dict[str, int],
        layers: Sequence[MoNNConfig],
        index: IndexConfig,
        dropout: float = 0.0,
        id_dropout: float = 0.0,
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
        kinds = list(dict.fromkeys(config.trunk for config in layers))
        self.trunks = nn.ModuleList(
            Trunk(kind, user, item, cardinality, self.tasks, dropout, id_dropout) for kind in kinds
        )
        self.trunk_of = [kinds.index(config.trunk) for config in layers]
        self.monn = nn.ModuleList(
            MoNN(config, self.trunk(number), cardinality, self.cross, node=number < self.layers)
            for number, config in enumerate(layers, start=1)
        )
        self.ensemble = nn.ModuleList(
            LayerEnsemble(number, self.tasks, self.cross_dense_width if monn.interaction is not None else 0)
            for number, monn in enumerate(self.monn, start=1)
        )
        last = self.layer(self.layers)
        self.index_width = last.item_vector_width
        self.lti: LearnToIndex | None = None
        if index.codebooks:
            self.lti = LearnToIndex(index.codebooks, self.index_width, index.pool)
            if index.method != "joint":
                self.lti.requires_grad_(False)
            self.codeword_term = nn.ModuleList(
                self._codeword_term(number) for number in range(1, self.layers)
            )
            self.index_dot = nn.ModuleList(
                InnerProduct(self.index_width, self.tasks) for _ in index.codebooks
            )
        target = last.config.interaction
        self.interaction_align = nn.ModuleList(
            nn.Linear(m.config.interaction.dim, target.dim)
            if m.config.interaction is not None and target is not None
            else nn.Identity()
            for m in (self.layer(number) for number in range(1, self.layers))
        )

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        ensemble = self.ensemble[0]
        assert isinstance(ensemble, LayerEnsemble)
        return ensemble.weight.device

    @property
    def reads_interactions(self) -> tuple[bool, ...]:
        """Of every layer, whether its MoNN reads interactions."""
        return tuple(self.layer(number).interaction is not None for number in range(1, self.layers + 1))

    def layer(self, number: int) -> MoNN:
        """The MoNN of layer ``number`` (from 1)."""
        module = self.monn[number - 1]
        assert isinstance(module, MoNN)
        return module

    def trunk(self, number: int) -> Trunk:
        """The trunk of layer ``number`` (from 1)."""
        module = self.trunks[self.trunk_of[number - 1]]
        assert isinstance(module, Trunk)
        return module

    def _trunks(self) -> list[Trunk]:
        return [trunk for trunk in self.trunks if isinstance(trunk, Trunk)]

    def _codeword_term(self, number: int) -> nn.Linear:
        """What a node's chain of codewords adds to its packed embedding. It begins as the chain itself added to the
        node's vector: a centroid of items beside the one item that represents them."""
        node = self.layer(number)
        term = nn.Linear(self.index_width, node.item_width)
        with torch.no_grad():
            width = node.item_vector_width
            term.bias.zero_()
            term.weight[:width].zero_()
            if width == self.index_width:
                term.weight[:width].fill_diagonal_(1.0)
        return term

    def set_items(self, items: Encoded, counts: np.ndarray, min_positives: int = 1) -> None:
        """Tell the model of the corpus: V encoded items in the order of the item vocabulary, and their training
        positives (V,). Items with fewer than ``min_positives`` have the unknown id's embedding, in matches zeros."""
        known = torch.from_numpy(counts >= min_positives)
        for trunk in self._trunks():
            trunk.set_items(torch.from_numpy(np.array(items.ids)), known)
        self.hold_unknown()

    def hold_unknown(self) -> None:
        """Keep matches of items that are looked up as the unknown id at zeros while training goes on. Loading a state
        does not do that."""
        known = self.trunk(self.layers).lookup.alias[ID_FIRST:] != UNKNOWN  # type: ignore[index]
        for number in range(1, self.layers + 1):
            interaction = self.layer(number).interaction
            if interaction is not None:
                interaction.hold_unknown(known)

    def fix_temperature(self, temperature: float) -> None:
        """Set the temperature of every layer's inner product, and leave the item layer's there: one that is learnt
        grows ever sharper, and what it is sure of is the training set (docs/log.md)."""
        for number in range(1, self.layers + 1):
            self.layer(number).dot.log_scale.data.fill_(-math.log(temperature))
        self.layer(self.layers).dot.log_scale.requires_grad_(False)

    @property
    def two_tower_only(self) -> bool:
        """One layer of inner products: there is nothing to train but the two towers."""
        return self.layers == 1 and self.layer(1).over is None

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
        seen = [trunk.users(dense, ids) for trunk in self._trunks()]
        return tuple(
            self.layer(number).user_tower(*seen[self.trunk_of[number - 1]])
            for number in range(1, self.layers + 1)
        )

    def item_tower(self, dense: Tensor | None, ids: Tensor | None) -> tuple[Tensor, ...]:
        """Item towers of all layers, N tensors (V, E_l), and the index vector v (V, d_index)."""
        seen = [trunk.items(dense, ids) for trunk in self._trunks()]
        out = tuple(
            self.layer(number).item_tower(*seen[self.trunk_of[number - 1]])
            for number in range(1, self.layers + 1)
        )
        return (*out, seen[self.trunk_of[-1]][1])

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
        return own, self.ensemble[layer - 1](stacked, cross_dense)

    def two_towers(self, sides: Sides) -> tuple[Tensor, Tensor]:
        """The item layer's two-tower vectors alone: users (B, T, e) and items (R, e), of norm sqrt(e). The items' are
        what is indexed; their fixed norm means that reconstruction cannot be lowered by shrinking them."""
        trunk = self.trunk(self.layers)
        return (
            trunk.users(sides.user_dense, sides.user_ids)[1],
            trunk.items(sides.item_dense, sides.item_ids)[1],
        )

    def index_vector(self, dense: Tensor | None, ids: Tensor | None) -> Tensor:
        """v (R, e) of items; see `two_towers`."""
        return self.trunk(self.layers).items(dense, ids)[1]

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

    def _hard_chains(self, paths: Tensor) -> list[Tensor]:
        """Codeword chains of the hard ``paths`` (R, N-1), per index layer (R, e)."""
        if self.lti is None:
            return []
        chain = torch.zeros(len(paths), self.index_width, device=self.device)
        chains = []
        for number, codebook in enumerate(self.lti.codebook):
            chain = chain + codebook[paths[:, number]]
            chains.append(chain)
        return chains

    def embed(self, sides: Sides, alpha: float | None) -> Embedded:
        """The towers of all layers over users and items, each node seen as serving sees it."""
        users = self.user_tower(sides.user_dense, sides.user_ids)
        fields, v = self.trunk(self.layers).items(sides.item_dense, sides.item_ids)
        chains = self._hard_chains(sides.paths)
        whole = chains[-1].detach() if chains else torch.zeros_like(v)
        lti: LTIOutput | None = None
        if self.lti is not None and alpha is not None:
            lti = self.lti(v, alpha)
            # Nodes look as they do to the search, and learn through the soft chain.
            chains = [hard.detach() + (soft - soft.detach()) for hard, soft in zip(chains, lti.quantised)]
        items = []
        for number, node in enumerate(sides.nodes, start=1):
            of_node = self.layer(number).item_tower(*self.trunk(number).items(node.dense, node.ids))[node.of]
            if chains:
                of_node = of_node + self.codeword_term[number - 1](chains[number - 1])
            items.append(of_node)
        items.append(self.layer(self.layers).item_tower(fields, v))
        return Embedded(users, tuple(items), lti, v, whole)

    def score_pairs(self, embedded: Embedded, pairs: Pairs) -> HSNNOutput:
        """MoNNs and ensembles of all N layers over the pairs."""
        monn: list[Tensor] = []
        logits: list[Tensor] = []
        interactions: list[Tensor | None] = []
        for number in range(1, self.layers + 1):
            module, user = self.layer(number), embedded.users[number - 1]
            dense = pairs.cross_dense[number - 1]
            pair = embedded.items[number - 1][pairs.of]  # (B, C, E_l)
            crossing = module.interact(user, pair, dense, pairs.cross_ids[number - 1])
            monn.append(module.logits(user, pair, crossing))
            interactions.append(crossing)
            logits.append(self.ensemble[number - 1](torch.stack(monn, dim=-2), dense))
        return HSNNOutput(monn, logits, interactions, embedded)

    def forward(self, batch: Batch, alpha: float | None) -> HSNNOutput:
        """Scores of all N layers for every <user, candidate> pair of the batch.

        Args:
            batch: see `Batch`.
            alpha: temperature of the soft assignment while the index is learnt jointly; None takes the hard
                codes of the batch's paths, as serving does.
        """
        return self.score_pairs(self.embed(batch.sides, alpha), batch.pairs)

    def pool_logits(self, embedded: Embedded, layer: int) -> Tensor:
        """Two-tower part of a layer's logits, every user against every item's node: (B, R, T)."""
        module = self.layer(layer)
        vectors = embedded.users[layer - 1][:, : module.user_vector_width].unflatten(-1, (self.tasks, -1))
        nodes = embedded.items[layer - 1][:, : module.item_vector_width]
        return module.dot.against(vectors, nodes)

    def item_logits(self, vectors: Tensor, items: Tensor) -> Tensor:
        """The item layer's two-tower logits (B, R, T) of `two_towers`."""
        return self.layer(self.layers).dot.against(vectors, items)

    def index_logits(self, embedded: Embedded) -> list[Tensor]:
        """<u, c-bar> per index layer (Algorithm 1, line 8), every user against every item: (B, R, T). u is the item
        layer's vector of the user. From the second layer on c-bar is only a residual, so the chain summed so far
        stands for the item: for layer 1 that is c-bar itself."""
        vectors = embedded.users[-1][:, : self.tasks * self.index_width].unflatten(-1, (self.tasks, -1))
        soft = [] if embedded.lti is None else embedded.lti.quantised
        return [dot.against(vectors, q) for dot, q in zip(self.index_dot, soft)]  # type: ignore[operator]

    def interaction_pull(self, interactions: list[Tensor | None]) -> Tensor:
        """Auxiliary MSE that pulls each index layer's interaction embedding to the item level's (§3.2.3). Both
        are layer-normalised first, which bounds the loss: the towers' outputs have no scale of their own. The
        target carries no gradient. Zero when a layer has no interaction tower."""
        target = interactions[-1]
        total = torch.zeros((), device=self.device)
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
