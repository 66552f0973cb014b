"""Mixture of logits (MoL), the strongest published scorer that is not one dot product.

Zhai et al., "Revisiting Neural Retrieval on Accelerators" (KDD 2023, arXiv:2306.04039), with the gate of their
public code (RAILS, arXiv:2407.15462). With P = k·k component pairs p = (a, b) of a user u and an item i:

    phi_t(u, i) = exp(s_t) · Σ_p π_tp(u, i) · δ_p(u, i) + b_t
    δ_(a,b)(u, i) = ⟨f_a(u) / ‖f_a(u)‖, g_b(i) / ‖g_b(i)‖⟩                     in -1..1
    π_t(u, i) = softmax_p( SiLU( G_t(u) · H_t(i) + X_t(δ) ) )

f and g are linear maps of the tokens to k embeddings of width d; G, H and X are MLPs of one hidden layer; s_t is
the logarithm of the inverse temperature. The published form has one task, and a temperature of 0.05 to start from.

Letters as in `overarch`: B users, C nodes per user, d width, T tasks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .presets import OverArchConfig

TEMPERATURE = 0.05


class MoLOverArch(nn.Module):
    """Mixture of logits. user (B, nu, d), pair (B, C, m, d) -> logits (B, C, T).

    Args:
        user_tokens: nu.
        pair_tokens: m, the item's embeddings and, where the MoNN has an interaction tower, the pair's.
        width: d, also that of the components.
        tasks: T; tasks share the components and have their own gates.
        config: ``tokens`` is k, components per side; ``hidden`` the hidden width of the three gate MLPs.
    """

    def __init__(
        self, user_tokens: int, pair_tokens: int, width: int, tasks: int, config: OverArchConfig
    ) -> None:
        super().__init__()
        self.components, self.tasks = config.tokens, tasks
        pairs = config.tokens**2
        self.user_components = nn.Linear(user_tokens * width, config.tokens * width)
        self.item_components = nn.Linear(pair_tokens * width, config.tokens * width)
        self.user_gate = _mlp(user_tokens * width, config.hidden, tasks * pairs)
        self.item_gate = _mlp(pair_tokens * width, config.hidden, tasks * pairs)
        self.cross_gate = _mlp(pairs, config.hidden, tasks * pairs)
        self.log_scale = nn.Parameter(torch.full((tasks,), -math.log(TEMPERATURE)))
        self.bias = nn.Parameter(torch.zeros(tasks))

    def user_part(self, user: Tensor) -> tuple[Tensor, Tensor]:
        """What depends on the user alone: normalised components (B, k, d) and gate (B, T·P)."""
        flat = user.flatten(-2)
        return self._unit(self.user_components(flat)), self.user_gate(flat)

    def mixture(self, user: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
        """Component logits δ (B, C, P) and gates π (B, C, T, P), which sum to 1 over P."""
        own, own_gate = self.user_part(user)
        flat = pair.flatten(-2)
        others = self._unit(self.item_components(flat))  # (B, C, k, d)
        # One product per user of all C·k item components with the k of the user, not C small ones.
        delta = torch.matmul(others.flatten(1, 2), own.transpose(-1, -2))  # (B, C·k, k)
        delta = delta.unflatten(1, (-1, self.components)).flatten(-2)
        mixed = F.silu(own_gate.unsqueeze(1) * self.item_gate(flat) + self.cross_gate(delta))
        return delta, torch.softmax(mixed.unflatten(-1, (self.tasks, -1)), dim=-1)

    def forward(self, user: Tensor, pair: Tensor) -> Tensor:
        delta, gates = self.mixture(user, pair)
        mean = (gates * delta.unsqueeze(-2)).sum(-1)  # (B, C, T)
        return mean * torch.exp(self.log_scale) + self.bias

    def _unit(self, flat: Tensor) -> Tensor:
        """(..., k·d) -> (..., k, d), every component of length 1."""
        return F.normalize(flat.unflatten(-1, (self.components, -1)), dim=-1, eps=1e-6)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))
