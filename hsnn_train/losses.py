"""Losses of MoNN and HSNN (paper Eq. 1-4, §3.2). All take logits, never probabilities.

Letters: B users, C candidates, T tasks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def told(labels: Tensor, labelled: Tensor, given: Tensor) -> Tensor:
    """For which pairs a task's label tells anything: the labelled ones and, for a task that is given another, those of
    them where the other's label is 1.

    labels (..., T); labelled (...) 0/1; given (T,) int64: `Schema.given` -> (..., T) 0/1.
    """
    other = torch.where(given >= 0, labels[..., given.clamp(min=0)], torch.ones_like(labels))
    return labelled.unsqueeze(-1) * other


def supervised(logits: Tensor, labels: Tensor, told: Tensor, weights: Tensor) -> Tensor:
    """Eq. 1: multi-task cross-entropy, every task's averaged over its own pairs.

    logits, labels (B, C, T); told (B, C, T) 0/1; weights (T,) -> scalar. A task without any pair adds 0.
    """
    each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")  # (B, C, T)
    return ((each * told).sum((0, 1)) / told.sum((0, 1)).clamp(min=1.0) * weights).sum()


def distil(logits: Tensor, teacher: Tensor, unlabelled: Tensor, weights: Tensor) -> Tensor:
    """Eq. 2: cross-entropy against the soft label of a teacher, averaged over the unlabelled pairs.

    logits (B, C, T); teacher (B, C, T) *logits*, no gradient flows into them; unlabelled (B, C) 0/1.
    """
    each = F.binary_cross_entropy_with_logits(logits, torch.sigmoid(teacher.detach()), reduction="none")
    return ((each * weights).sum(-1) * unlabelled).sum() / unlabelled.sum().clamp(min=1.0)


def layered(per_layer: list[Tensor], labels: Tensor, told: Tensor, weights: Tensor) -> Tensor:
    """Eq. 4: the supervised loss of every layer, summed over layers 1..N."""
    return torch.stack([supervised(logits, labels, told, weights) for logits in per_layer]).sum()


def pooled_softmax(logits: Tensor, positive: Tensor, log_inclusion: Tensor, weights: Tensor) -> Tensor:
    """Sampled softmax with log-Q correction (Bengio and Senécal 2003; Yi et al. 2019) over a pool that all users share:
    -log softmax(z - log Q)[positive], averaged over users.

    logits (B, M, T); positive (B,) int64 into M; log_inclusion (M,); weights (B, T): of each user's positive per task,
    0 where it is none -> scalar.
    """
    corrected = logits - log_inclusion.unsqueeze(-1)
    own = corrected.gather(1, positive.view(-1, 1, 1).expand(-1, 1, logits.shape[-1])).squeeze(1)  # (B, T)
    log_p = own - torch.logsumexp(corrected, dim=1)
    return -(log_p * weights).sum() / len(logits)


def match(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of softmax(logits) against a distribution, averaged over users: (B, M), (B, M) -> scalar."""
    return -(target * torch.log_softmax(logits, dim=-1)).sum(-1).mean()


def sampled_softmax(logits: Tensor, labels: Tensor, labelled: Tensor, weights: Tensor) -> Tensor:
    """-log softmax of the positive, candidate 0, among a user's candidates; the logits are log-Q corrected already.

    logits, labels (B, C, T); labelled (B, C): 0 leaves a candidate out; weights (T,) -> scalar.
    """
    masked = logits.masked_fill(labelled.unsqueeze(-1) == 0, -torch.inf)
    log_p = logits[:, 0] - torch.logsumexp(masked, dim=1)  # (B, T)
    return -(log_p * labels[:, 0] * weights).sum() / len(logits)


def distil_ranking(logits: Tensor, teacher: Tensor, labelled: Tensor) -> Tensor:
    """Eq. 2 for rankings: cross-entropy of softmax over a user's candidates against the teacher's, per task.

    logits, teacher (B, C, T), no gradient flows into the teacher; labelled (B, C): 0 leaves out -> scalar.
    """
    left_out = labelled.unsqueeze(-1) == 0
    target = torch.softmax(teacher.detach().masked_fill(left_out, -torch.inf), dim=1)
    log_p = logits - torch.logsumexp(logits.masked_fill(left_out, -torch.inf), dim=1, keepdim=True)
    return -(target * log_p).sum((1, 2)).mean()
