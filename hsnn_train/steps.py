"""What training over epochs and following a stream share: the optimiser, a gradient step, the index's upkeep."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsnn_core.errors import HsnnError

from .batches import IndexState, step_rng
from .hsnn import HSNN
from .lti import LearnToIndex
from .objective import Moment, Objective
from .recipe_sections import TrainConfig
from .refresh import reset_optimizer_rows

LAST_LR = 0.1  # the learning rate at the end of its cosine, as a share of the recipe's
LARGEST_NORM = 5.0  # of a step's gradient


class Diverged(HsnnError):
    """The loss is no longer a number; the last checkpoint is from before."""


def make_optimizer(model: HSNN, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over two groups: the parameters of the trunks, and all others."""
    trunks = {id(p) for p in model.trunks.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) in trunks]},
        {"params": [p for p in trained if id(p) not in trunks]},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, weight_decay=train.weight_decay, foreach=True)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, train: TrainConfig, factor: float, warm: bool
) -> None:
    """``factor`` of the recipe's learning rate, while ``warm`` of the first phase's; after such a phase the trunk has a
    share of it."""
    trunk, rest = optimizer.param_groups
    rest["lr"] = (train.first_lr if warm else train.lr) * factor
    trunk["lr"] = rest["lr"] * (train.trunk_lr if train.two_phases and not warm else 1.0)


def gradient_step(
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    rows: np.ndarray,
    state: IndexState,
    moment: Moment,
    step: int,
    where: str,
) -> tuple[dict[str, Tensor], int]:
    """One update by the examples ``rows`` (B,) of the objective: its losses by name, and how many pairs were scored.

    What is drawn follows from (seed, step) alone. Raises Diverged, which names ``where``.
    """
    t, model = objective.train, objective.model
    torch.manual_seed(t.seed * 1_000_003 + step)
    parts, pairs = objective(rows, state, moment, step_rng(t.seed, step))
    if not torch.isfinite(parts["loss"]):
        broken = ", ".join(name for name, value in parts.items() if not torch.isfinite(value))
        key, rate = ("towers_lr", t.towers_lr) if moment.warm and t.towers_lr else ("lr", t.lr)
        raise Diverged(
            f"training diverged at {where}: {broken} is not finite; train "
            f"again with a smaller train.{key} (now {rate}), and look for extreme values in dense features"
        )
    optimizer.zero_grad(set_to_none=True)
    parts["loss"].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
    optimizer.step()
    return {k: v.detach() for k, v in parts.items()}, pairs


def revive_codewords(
    lti: LearnToIndex, optimizer: torch.optim.Optimizer, v: np.ndarray, seed: int, step: int
) -> None:
    """Reset the codewords that no item of v (V, d) maps to, as (seed, step) has it, and their optimiser state."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    corpus = torch.from_numpy(v).to(lti.codebook[0].device)
    for codebook, dead in zip(lti.codebook, lti.revive(corpus, generator)):
        reset_optimizer_rows(optimizer, codebook, dead)


def index_health(
    lti: LearnToIndex, v: np.ndarray, state: IndexState, alpha: float | None
) -> tuple[dict[str, Any], list[str]]:
    """Health of every index layer over v (V, d) as one flat row, and what a collapse would have to say."""
    row: dict[str, Any] = {}
    collapsed = []
    corpus = torch.from_numpy(v).to(lti.codebook[0].device)
    for layer, health in enumerate(lti.health(corpus, state.paths, alpha), start=1):
        row |= {f"l{layer}_{k}": value for k, value in asdict(health).items()}
        if health.collapsed:
            collapsed.append(
                f"codebook {layer} has collapsed: items live in effectively {health.perplexity:.1f} of "
                f"{health.codewords} codewords; raise train.balance or lower train.max_alpha"
            )
    return row, collapsed
