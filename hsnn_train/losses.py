"""Losses of MoNN and HSNN (paper Eq. 1-4, §3.2). All take logits, never probabilities.

Letters: B users, C candidates, T tasks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def supervised(logits: Tensor, labels: Tensor, labelled: Tensor, weights: Tensor) -> Tensor:
    """Eq. 1: multi-task cross-entropy, averaged over the S labelled pairs.

    logits, labels (B, C, T); labelled (B, C) 0/1; weights (T,) -> scalar. Zero when nothing is labelled.
    """
    each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")  # (B, C, T)
    return ((each * weights).sum(-1) * labelled).sum() / labelled.sum().clamp(min=1.0)


def distil(logits: Tensor, teacher: Tensor, unlabelled: Tensor, weights: Tensor) -> Tensor:
    """Eq. 2: cross-entropy against the soft label of a teacher, averaged over the unlabelled pairs.

    logits (B, C, T); teacher (B, C, T) *logits*, no gradient flows into them; unlabelled (B, C) 0/1.
    """
    each = F.binary_cross_entropy_with_logits(logits, torch.sigmoid(teacher.detach()), reduction="none")
    return ((each * weights).sum(-1) * unlabelled).sum() / unlabelled.sum().clamp(min=1.0)


def layered(per_layer: list[Tensor], labels: Tensor, labelled: Tensor, weights: Tensor) -> Tensor:
    """Eq. 4: the supervised loss of every layer, summed over layers 1..N."""
    return torch.stack([supervised(logits, labels, labelled, weights) for logits in per_layer]).sum()
