"""The trunk that MoNNs of a model share: field embeddings, the history encoder, and two-tower vectors.

A vector of a user (one per task) and one of an item, both of norm sqrt(e), are the explicit first-order term of every
MoNN: their scaled inner product is a logit to which the OverArch adds. They are cheap enough to be trained against
thousands of items at a time, and they are what Learning-To-Index indexes.

Letters: R rows, F fields, L positions of a sequence, e width, T tasks, S packed ids of an item.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsnn_core.schema import Layout, Slot

from .presets import TowerConfig, TrunkConfig
from .towers import EmbeddingTables, SequencePool, TowerNetwork, feature_key, masked_mean

UNKNOWN = 1


class HistoryBlock(nn.Module):
    """Pre-norm transformer block. The asking positions attend to the set ones of x.

    asking (R, A, e), x (R, L, e), mask (R, L) -> (R, A, e).
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"history encoder: got {heads} heads for width {width}, expected a divisor")
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )
        self.dropout = nn.Dropout(dropout)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (R, h, positions, e/h)

    def forward(self, asking: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        q = self._heads(self.q(self.before(asking)))
        k, v = (self._heads(part) for part in self.kv(self.before(x)).chunk(2, -1))
        logits = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = torch.softmax(logits - (1.0 - mask)[:, None, None, :] * 1e4, dim=-1)
        mixed = torch.matmul(weights, v).transpose(1, 2).flatten(-2)
        asking = asking + self.dropout(self.out(mixed))
        out: Tensor = asking + self.dropout(self.feed_forward(asking))
        return out


class HistoryEncoder(nn.Module):
    """A sequence as two fields: its mean, and the state of its most recent position after transformer blocks
    with learned positions that count back from it (age 0). Padding is at the end; an empty sequence gives zeros."""

    fields = 2

    def __init__(self, length: int, config: TrunkConfig, dropout: float) -> None:
        super().__init__()
        self.age = nn.Embedding(length, config.embed)
        nn.init.normal_(self.age.weight, std=config.embed**-0.5)
        self.blocks = nn.ModuleList(
            HistoryBlock(config.embed, config.heads, dropout) for _ in range(config.history_blocks)
        )
        self.norm = nn.LayerNorm(config.embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: Tensor, mask: Tensor) -> list[Tensor]:
        """values (R, L, e), mask (R, L) 0/1 -> two fields (R, e)."""
        age = (mask.sum(-1, keepdim=True) - torch.cumsum(mask, -1)).clamp(min=0).to(torch.int64)
        x = self.dropout(values + self.age(age))
        latest = ((age == 0) & (mask > 0)).to(x.dtype).unsqueeze(1)  # (R, 1, L)
        for number, block in enumerate(self.blocks, start=1):
            last = number == len(self.blocks)  # nobody reads the last block's other positions
            x = block(torch.matmul(latest, x) if last else x, x, mask)
        state = self.norm(x.flatten(1)) * x.shape[-1] ** -0.5  # norm 1, as embeddings have
        return [masked_mean(values, mask), state * (mask.sum(-1, keepdim=True) > 0).to(x.dtype)]


class FieldEmbedder(nn.Module):
    """Packed dense (R, D) and ids (R, S) of one owner -> field embeddings (R, F, e)."""

    def __init__(self, layout: Layout, config: TrunkConfig, dropout: float) -> None:
        super().__init__()
        self.layout = layout
        self.dense = nn.ModuleList(nn.Linear(s.stop - s.start, config.embed) for s in layout.dense_slots)
        sequences = [s for s in layout.slots if s.feature.kind == "sequence"]
        self.sequences = nn.ModuleDict(
            {
                feature_key(s.feature.name): HistoryEncoder(s.stop - s.start, config, dropout)
                if config.history_blocks
                else SequencePool(s.stop - s.start, config.embed)
                for s in sequences
            }
        )
        # An item's neighbours were found in labels: they are for crossings, which are made out of fold.
        self.slots = [s for s in layout.slots if s.feature.owner == "user" or s.feature.derive_from is None]
        self.fields = len(layout.dense_slots) + len(self.slots) + len(sequences)

    def forward(self, lookup: Lookup, dense: Tensor | None, ids: Tensor | None) -> Tensor:
        fields: list[Tensor] = []
        if dense is not None:
            for slot, linear in zip(self.layout.dense_slots, self.dense):
                fields.append(linear(dense[:, slot.start : slot.stop]))
        if ids is not None:
            for slot in self.slots:
                own = ids[:, slot.start : slot.stop]
                if slot.feature.kind == "sequence":
                    own = _trimmed(own)
                    mask = (own != 0).to(torch.float32)
                    encoder = self.sequences[feature_key(slot.feature.name)]
                    fields.extend(encoder(lookup.sequence(slot, own), mask))
                elif slot.stop - slot.start == 1:
                    fields.append(lookup.ids(slot, own).flatten(1))
                else:
                    fields.append(masked_mean(lookup.ids(slot, own), (own != 0).to(torch.float32)))
        return torch.stack(fields, dim=1)


def _trimmed(ids: Tensor) -> Tensor:
    """Without the columns that are padding in every row; a traced graph, and one without data, keeps its shape."""
    if torch.jit.is_tracing() or ids.is_meta:
        return ids
    longest = int((ids != 0).sum(-1).max()) if len(ids) else 0
    return ids[:, : max(1, longest)]


class Lookup(nn.Module):
    """Embedding tables of all id spaces, and what is known of the items that ids `of: item` stand for.

    The token of an item in a history is its id's embedding plus the mean embedding of each of its other sparse
    features, so that an item is recognised by its attributes where its id was seen too rarely. Items of too
    few training positives (`model.min_positives`) are looked up as the unknown id: their own rows would be noise.

    Args:
        cardinality: ids per space.
        item: layout of the packed item features.
        width: e.
        id_dropout: share of item ids that training replaces by the unknown id, which so gets an embedding.
    """

    def __init__(self, cardinality: dict[str, int], item: Layout, width: int, id_dropout: float) -> None:
        super().__init__()
        self.id_dropout = id_dropout
        self.tables = EmbeddingTables(cardinality, width)
        rows = cardinality.get("item", 0)
        self.register_buffer("item_ids", torch.zeros(rows, item.ids_width, dtype=torch.int32))
        self.register_buffer("alias", torch.arange(rows, dtype=torch.int32))
        self.attributes = [
            s for s in item.slots if s.feature.kind != "sequence" and s.feature.encoding != "item"
        ]

    def ids(self, slot: Slot, ids: Tensor) -> Tensor:
        """ids (R, L) of a feature -> (R, L, e)."""
        if slot.feature.space == "item":
            ids = self.alias[ids.to(torch.int64)]  # type: ignore[index]
            if self.training and self.id_dropout:
                dropped = torch.rand(ids.shape, device=ids.device) < self.id_dropout
                ids = torch.where(dropped, ids.clamp(max=UNKNOWN), ids)
        out: Tensor = self.tables(slot.feature.space, ids)
        return out

    def sequence(self, slot: Slot, ids: Tensor) -> Tensor:
        """As `ids`, with the attributes of the items that the ids stand for. Most positions are padding or repeat an
        item, so outside of a traced graph every item is looked up once."""
        if slot.feature.space != "item" or not self.attributes:
            return self.ids(slot, ids)
        if torch.jit.is_tracing() or ids.is_meta:
            return self._items(slot, ids)
        distinct, place = torch.unique(ids, return_inverse=True)
        return self._items(slot, distinct.unsqueeze(-1)).squeeze(-2)[place]

    def _items(self, slot: Slot, ids: Tensor) -> Tensor:
        out = self.ids(slot, ids)
        known = self.item_ids[ids.to(torch.int64)]  # type: ignore[index]
        for attribute in self.attributes:
            own = known[..., attribute.start : attribute.stop]
            values = self.tables(attribute.feature.space, own)
            out = out + masked_mean(values, (own != 0).to(values.dtype))
        return out


class TwoTowerVector(nn.Module):
    """Fields (R, F, e) -> n vectors (R, n, e) of norm sqrt(e): a learned sum of the fields plus a tower network,
    so that at the start a vector is the plain sum that matrix factorisation would take."""

    def __init__(self, fields: int, vectors: int, config: TrunkConfig) -> None:
        super().__init__()
        self.skip = nn.Linear(fields, vectors, bias=False)
        nn.init.ones_(self.skip.weight)
        tower = TowerConfig(vectors, config.embed, hidden=config.hidden, max_fields=config.max_fields)
        self.network = TowerNetwork(fields, config.embed, tower)
        with torch.no_grad():
            self.network.out.weight.mul_(0.1)
            self.network.out.bias.zero_()

    def forward(self, fields: Tensor) -> Tensor:
        summed = self.skip(fields.transpose(-1, -2)).transpose(-1, -2)
        return F.normalize(summed + self.network(fields), dim=-1) * fields.shape[-1] ** 0.5


class Trunk(nn.Module):
    """See the module's text.

    Args:
        config: sizes.
        user, item: layouts of the packed encoded features.
        cardinality: ids per space, item's included when any feature is `of: item`.
        tasks: T.
        dropout: of history tokens and inside the history encoder.
        id_dropout: see `Lookup`.
    """

    def __init__(
        self,
        config: TrunkConfig,
        user: Layout,
        item: Layout,
        cardinality: dict[str, int],
        tasks: int,
        dropout: float = 0.0,
        id_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.config, self.tasks = config, tasks
        used = {s.feature.space for s in (*user.slots, *item.slots)}
        self.lookup = Lookup({s: cardinality[s] for s in sorted(used)}, item, config.embed, id_dropout)
        self.user_fields = FieldEmbedder(user, config, dropout)
        self.item_fields = FieldEmbedder(item, config, dropout)
        self.user_vector = TwoTowerVector(self.user_fields.fields, tasks, config)
        self.item_vector = TwoTowerVector(self.item_fields.fields, 1, config)

    @torch.no_grad()
    def set_items(self, ids: Tensor, known: Tensor) -> None:
        """Tell the trunk of the corpus: packed item ids (V, S) int32 in the order of the item vocabulary, and which of
        the items have training positives enough for an embedding of their own, bool (V,)."""
        if len(self.lookup.item_ids):  # type: ignore[arg-type]
            self.lookup.item_ids[2:] = ids  # type: ignore[operator]
            self.lookup.alias[2:][~known] = UNKNOWN  # type: ignore[index]

    def users(self, dense: Tensor | None, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """(R, D) float32, (R, S) int32 -> fields (R, F, e) and the users' vectors (R, T, e)."""
        fields = self.user_fields(self.lookup, dense, ids)
        return fields, self.user_vector(fields)

    def items(self, dense: Tensor | None, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """(R, D) float32, (R, S) int32 -> fields (R, F, e) and the items' vectors (R, e)."""
        fields = self.item_fields(self.lookup, dense, ids)
        return fields, self.item_vector(fields).flatten(1)
