"""The tower network of MoNN (paper §2, "Tower Network"): an EDCN-style stack of MLP beside AttentionFM.

Letters: R rows (users, items, or pairs, any leading shape), F fields, P pairs of fields, e field width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .presets import TowerConfig


def feature_key(name: str) -> str:
    """A ModuleDict key: a feature may be called `type` or `values`, which a module cannot."""
    return f"f_{name}"


class EmbeddingTables(nn.Module):
    """One table per id space, shared by every feature of that space in the MoNN: the items of a user's history
    and the item's own id meet in one table.

    Args:
        cardinality: ids per space, padding (0) and unknown (1) included.
        width: e.
    """

    def __init__(self, cardinality: dict[str, int], width: int) -> None:
        super().__init__()
        self.width = width
        self.tables = nn.ModuleDict(
            {
                feature_key(space): nn.Embedding(size, width, padding_idx=0)
                for space, size in cardinality.items()
            }
        )
        for table in self.tables.values():
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=width**-0.5)
            with torch.no_grad():
                table.weight[0].zero_()

    def weight(self, space: str) -> Tensor:
        """(ids of the space, e)."""
        table = self.tables[feature_key(space)]
        assert isinstance(table, nn.Embedding)
        return table.weight

    def forward(self, space: str, ids: Tensor) -> Tensor:
        """ids int32 (..., L) -> (..., L, e); padding rows are zero."""
        out: Tensor = self.tables[feature_key(space)](ids)
        return out


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the ids axis. values (..., L, e), mask (..., L) 0/1 -> (..., e); zero where nothing is set."""
    total = (values * mask.unsqueeze(-1)).sum(-2)
    return total / mask.sum(-1, keepdim=True).clamp(min=1.0)


class SequencePool(nn.Module):
    """A sequence as two fields: its mean, and an attention pool whose weights depend on item and recency."""

    fields = 2

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        self.recency = nn.Parameter(torch.zeros(length))
        self.length = length

    def weights(self, values: Tensor, mask: Tensor) -> Tensor:
        """Softmax over the L set positions; zero where the row is empty. Sequences are padded at the end, so
        recency counts back from the last set id. (..., L, e), (..., L) -> (..., L)."""
        age = mask.sum(-1, keepdim=True) - torch.cumsum(mask, -1)  # 0 = most recent
        bias = self.recency[age.clamp(min=0).to(torch.int64)]
        logits = self.query(values).squeeze(-1) + bias
        logits = logits - (1.0 - mask) * 1e4
        return torch.softmax(logits, dim=-1) * mask

    def forward(self, values: Tensor, mask: Tensor) -> list[Tensor]:
        pooled = (values * self.weights(values, mask).unsqueeze(-1)).sum(-2)
        return [masked_mean(values, mask), pooled]


class FieldGate(nn.Module):
    """EDCN's regulation: a softmax over the fields re-weights them (mean weight 1). (R, F, e) -> (R, F, e)."""

    def __init__(self, fields: int, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)
        self.bias = nn.Parameter(torch.zeros(fields))

    def weights(self, x: Tensor) -> Tensor:
        """(R, F, e) -> (R, F), each row sums to 1 over the fields."""
        return torch.softmax(self.score(x).squeeze(-1) + self.bias, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights(x).unsqueeze(-1) * x.shape[-2]


class AttentionFM(nn.Module):
    """Attentional factorization machine (Xiao et al. 2017): attention over the P = F(F-1)/2 pair products.

    The softmax runs over the pair axis of (R, P, e); summing the pairs first would leave an axis of one and
    make the attention a no-op.
    """

    def __init__(self, fields: int, width: int) -> None:
        super().__init__()
        left, right = torch.triu_indices(fields, fields, offset=1)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.project = nn.Linear(width, width)
        self.score = nn.Linear(width, 1, bias=False)

    def pairs(self, x: Tensor) -> Tensor:
        """(R, F, e) -> element-wise products (R, P, e)."""
        return x.index_select(-2, self.left) * x.index_select(-2, self.right)  # type: ignore[arg-type]

    def weights(self, pairs: Tensor) -> Tensor:
        """(R, P, e) -> (R, P), each row sums to 1 over the pairs."""
        return torch.softmax(self.score(torch.relu(self.project(pairs))).squeeze(-1), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.pairs(x)
        return (pairs * self.weights(pairs).unsqueeze(-1)).sum(-2)  # (R, e)


class TowerBlock(nn.Module):
    """One EDCN block: gated fields into an MLP (implicit) beside an AttentionFM (explicit), bridged back into
    the fields with a shortcut and a norm. (R, F, e) -> (R, F, e)."""

    def __init__(self, fields: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_mlp = FieldGate(fields, width)
        self.mlp = nn.Sequential(nn.Linear(fields * width, hidden), nn.ReLU())
        self.gate_fm = FieldGate(fields, width) if fields > 1 else None
        self.fm = AttentionFM(fields, width) if fields > 1 else None
        self.bridge = nn.Linear(hidden + (width if fields > 1 else 0), fields * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        streams = [self.mlp(self.gate_mlp(x).flatten(-2))]
        if self.fm is not None and self.gate_fm is not None:
            streams.append(self.fm(self.gate_fm(x)))
        update = self.bridge(torch.cat(streams, dim=-1)).unflatten(-1, x.shape[-2:])
        out: Tensor = self.norm(x + update)
        return out


class TowerNetwork(nn.Module):
    """Fields (R, F, e) -> embeddings (R, num_embed, dim)."""

    def __init__(self, fields: int, width: int, config: TowerConfig) -> None:
        super().__init__()
        kept = min(fields, config.max_fields)
        self.mix = nn.Linear(fields, kept, bias=False) if kept < fields else None
        self.mixed_fields = (kept, fields)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(TowerBlock(kept, width, config.hidden) for _ in range(config.blocks))
        self.out = nn.Linear(kept * width, config.num_embed * config.dim)
        self.shape = (config.num_embed, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.mix is not None:
            x = self.mix(x.transpose(-1, -2)).transpose(-1, -2)
        x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.out(x.flatten(-2)).unflatten(-1, self.shape)
        return out
