"""OverArch of MoNN (paper §2): a DHEN-style stack of heterogeneous interaction modules, or a plain dot product.

Tokens come in two groups: the user's (B, nu, d), one set per request, and the pair's (B, C, m, d) with
m = ni + nx, one set per <user, node>. Whatever depends on the user alone is computed once per request and
broadcast; only the first layer sees user tokens, later layers work on the k tokens of the layer before.

Letters: B users, C nodes per user, d width, n = nu + m tokens, k tokens put out by a layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .presets import OverArchConfig

#: what the temperature of an inner product of unit vectors starts from
TEMPERATURE = 0.07


class SplitLinear(nn.Module):
    """A linear layer over [user tokens; pair tokens] flattened, evaluated as W_u u + W_m m + b.

    user (B, nu, d) or None, pair (B, C, m, d) -> (B, C, out). The user's share costs once per user.
    """

    def __init__(self, user_tokens: int, pair_tokens: int, width: int, out: int) -> None:
        super().__init__()
        self.user = nn.Linear(user_tokens * width, out, bias=False) if user_tokens else None
        self.pair = nn.Linear(pair_tokens * width, out)

    def forward(self, user: Tensor | None, pair: Tensor) -> Tensor:
        out: Tensor = self.pair(pair.flatten(-2))
        if self.user is not None:
            assert user is not None
            out = out + self.user(user.flatten(-2)).unsqueeze(1)
        return out


class FMModule(nn.Module):
    """All pairwise dot products of the n tokens, projected to k tokens."""

    def __init__(self, user_tokens: int, pair_tokens: int, width: int, out_tokens: int) -> None:
        super().__init__()
        self.pair_tokens = pair_tokens
        own = pair_tokens * (pair_tokens + 1) // 2
        left, right = torch.triu_indices(pair_tokens, pair_tokens)
        self.register_buffer("flat", left * pair_tokens + right, persistent=False)
        self.out = nn.Linear(own + pair_tokens * user_tokens, out_tokens * width)
        self.user_out: nn.Linear | None = None
        if user_tokens > 1:
            uleft, uright = torch.triu_indices(user_tokens, user_tokens)
            self.register_buffer("user_flat", uleft * user_tokens + uright, persistent=False)
            self.user_out = nn.Linear(len(uleft), out_tokens * width, bias=False)
        self.scale = width**-0.5

    def forward(self, user: Tensor | None, pair: Tensor) -> Tensor:
        own = torch.matmul(pair, pair.transpose(-1, -2)).flatten(-2)
        dots = [own.index_select(-1, self.flat)]  # type: ignore[arg-type]
        if user is not None:
            with_user = torch.matmul(pair.flatten(1, 2), user.transpose(-1, -2))  # (B, C * m, nu)
            dots.append(with_user.unflatten(1, (-1, self.pair_tokens)).flatten(-2))  # (B, C, m * nu)
        out: Tensor = self.out(torch.cat(dots, dim=-1) * self.scale)
        if self.user_out is not None:
            assert user is not None
            among = torch.matmul(user, user.transpose(-1, -2)).flatten(-2)
            among = among.index_select(-1, self.user_flat) * self.scale  # type: ignore[arg-type]
            out = out + self.user_out(among).unsqueeze(1)
        return out


class CrossModule(nn.Module):
    """Explicit degree-2 cross of low rank: (A x + a) * (B x + b) over all tokens, projected to k tokens."""

    def __init__(self, user_tokens: int, pair_tokens: int, width: int, out_tokens: int, rank: int) -> None:
        super().__init__()
        self.left = SplitLinear(user_tokens, pair_tokens, width, rank)
        self.right = SplitLinear(user_tokens, pair_tokens, width, rank)
        self.out = nn.Linear(rank, out_tokens * width)

    def forward(self, user: Tensor | None, pair: Tensor) -> Tensor:
        out: Tensor = self.out(self.left(user, pair) * self.right(user, pair))
        return out


class MLPModule(nn.Module):
    """Implicit interactions: one hidden layer over all tokens."""

    def __init__(self, user_tokens: int, pair_tokens: int, width: int, out_tokens: int, hidden: int) -> None:
        super().__init__()
        self.hidden = SplitLinear(user_tokens, pair_tokens, width, hidden)
        self.out = nn.Linear(hidden, out_tokens * width)

    def forward(self, user: Tensor | None, pair: Tensor) -> Tensor:
        out: Tensor = self.out(torch.relu(self.hidden(user, pair)))
        return out


class AttentionModule(nn.Module):
    """Multi-head attention of the pair's tokens over all tokens (keys and values of the user's once per user),
    with an optional token-wise feed-forward, projected to k tokens."""

    def __init__(
        self, user_tokens: int, pair_tokens: int, width: int, out_tokens: int, heads: int, feed_forward: int
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"attention heads must divide the width: got {heads} heads, width {width}")
        self.heads, self.pair_tokens = heads, pair_tokens
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.feed_forward = (
            nn.Sequential(nn.Linear(width, feed_forward), nn.ReLU(), nn.Linear(feed_forward, width))
            if feed_forward
            else None
        )
        self.mix = nn.Linear(pair_tokens, out_tokens, bias=False)
        self.out = nn.Linear(width, width)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)  # (..., h, n, d/h)

    def forward(self, user: Tensor | None, pair: Tensor) -> Tensor:
        width = pair.shape[-1]
        q = self._heads(self.q(pair)) * (width // self.heads) ** -0.5
        key, value = (self._heads(x) for x in self.kv(pair).chunk(2, dim=-1))
        logits = torch.matmul(q, key.transpose(-1, -2))  # (B, C, h, m, m)
        if user is None:
            mixed = torch.matmul(torch.softmax(logits, dim=-1), value)
        else:
            ukey, uvalue = (self._heads(x) for x in self.kv(user).chunk(2, dim=-1))  # (B, h, nu, d/h)
            own = self.pair_tokens
            asked = q.transpose(1, 2).flatten(2, 3)  # (B, h, C * m, d/h)
            among = torch.matmul(asked, ukey.transpose(-1, -2)).unflatten(2, (-1, own)).transpose(1, 2)
            weights = torch.softmax(torch.cat([logits, among], dim=-1), dim=-1)
            of_user = weights[..., own:].transpose(1, 2).flatten(2, 3)  # (B, h, C * m, nu)
            mixed = torch.matmul(weights[..., :own], value)
            mixed = mixed + torch.matmul(of_user, uvalue).unflatten(2, (-1, own)).transpose(1, 2)
        mixed = mixed.transpose(-2, -3).flatten(-2) + pair  # (B, C, m, d)
        if self.feed_forward is not None:
            mixed = mixed + self.feed_forward(mixed)
        mixed = self.mix(mixed.transpose(-1, -2)).transpose(-1, -2)  # (B, C, k, d)
        out: Tensor = self.out(mixed).flatten(-2)
        return out


class EnsembleLayer(nn.Module):
    """One DHEN layer: modules in parallel, concatenated, projected, plus the shortcut, normalised.

    user (B, nu, d) or None, pair (B, C, m, d) -> (B, C, k, d).
    """

    def __init__(self, user_tokens: int, pair_tokens: int, width: int, config: OverArchConfig) -> None:
        super().__init__()
        k = config.tokens
        made: list[nn.Module] = []
        for name in config.modules:
            if name == "fm":
                made.append(FMModule(user_tokens, pair_tokens, width, k))
            elif name == "cross":
                made.append(CrossModule(user_tokens, pair_tokens, width, k, config.hidden))
            elif name == "mlp":
                made.append(MLPModule(user_tokens, pair_tokens, width, k, config.hidden))
            elif name == "attention":
                made.append(
                    AttentionModule(user_tokens, pair_tokens, width, k, config.heads, config.feed_forward)
                )
            else:
                raise ValueError(f"OverArch module: got {name!r}, expected one of fm, cross, mlp, attention")
        self.parallel = nn.ModuleList(made)
        self.project = nn.Linear(len(made) * width, width)
        self.shortcut = nn.Linear(pair_tokens, k, bias=False)
        self.user_shortcut = nn.Linear(user_tokens, k, bias=False) if user_tokens else None
        self.norm = nn.LayerNorm(width)
        self.tokens, self.width = k, width

    def forward(self, user: Tensor | None, pair: Tensor) -> Tensor:
        parts = [m(user, pair).unflatten(-1, (self.tokens, self.width)) for m in self.parallel]
        update = self.project(torch.cat(parts, dim=-1))
        short = self.shortcut(pair.transpose(-1, -2)).transpose(-1, -2)
        if self.user_shortcut is not None:
            assert user is not None
            short = short + self.user_shortcut(user.transpose(-1, -2)).transpose(-1, -2).unsqueeze(1)
        out: Tensor = self.norm(update + short)
        return out


class DHENOverArch(nn.Module):
    """Stacked ensemble layers and a head. user (B, nu, d), pair (B, C, m, d) -> logits (B, C, T)."""

    def __init__(
        self, user_tokens: int, pair_tokens: int, width: int, tasks: int, config: OverArchConfig
    ) -> None:
        super().__init__()
        self.first = EnsembleLayer(user_tokens, pair_tokens, width, config)
        self.rest = nn.ModuleList(
            EnsembleLayer(0, config.tokens, width, config) for _ in range(config.layers - 1)
        )
        self.head = nn.Sequential(
            nn.Linear(config.tokens * width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, tasks)
        )
        with torch.no_grad():  # begins as the inner product it is added to, near enough
            self.head[-1].weight.mul_(0.1)  # type: ignore[operator]
            self.head[-1].bias.zero_()  # type: ignore[operator]

    def forward(self, user: Tensor, pair: Tensor) -> Tensor:
        x = self.first(user, pair)
        for layer in self.rest:
            x = layer(None, x)
        out: Tensor = self.head(x.flatten(-2))
        return out


class InnerProduct(nn.Module):
    """The two-tower scorer: inner products of vectors of norm sqrt(d), so cosines, with a temperature and a bias per
    task. vectors (B, T, d), nodes (B, C, d) -> (B, C, T)."""

    def __init__(self, width: int, tasks: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((tasks,), -math.log(TEMPERATURE)))
        self.bias = nn.Parameter(torch.zeros(tasks))
        self.width = width

    def forward(self, vectors: Tensor, nodes: Tensor) -> Tensor:
        scaled = vectors * (torch.exp(self.log_scale) / self.width).unsqueeze(-1)
        return torch.matmul(nodes, scaled.transpose(-1, -2)) + self.bias

    def against(self, vectors: Tensor, nodes: Tensor) -> Tensor:
        """Every user against every node. vectors (B, T, d), nodes (M, d) -> (B, M, T), of which a task's are
        neighbours in memory along M: that is how they are summed over."""
        scaled = vectors * (torch.exp(self.log_scale) / self.width).unsqueeze(-1)
        return (scaled.transpose(0, 1) @ nodes.T).permute(1, 2, 0) + self.bias
