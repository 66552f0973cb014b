"""Learning-To-Index (paper §3.2, Algorithm 1, Eq. 5-8): soft-assigned residual codebooks trained by gradient.

Letters: R items in a batch, K_l codewords of index layer l, d width of the index vector v, L = N - 1 layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class LTIOutput(NamedTuple):
    """What the index says about a batch of items; lists run over the index layers 1..N-1."""

    affinity: list[Tensor]  # (R, K_l), rows sum to 1 (Algorithm 1, line 6)
    index_embedding: list[Tensor]  # (R, d), c-bar of each layer (line 7)
    quantised: list[Tensor]  # (R, d), c-bar summed over layers 1..l
    mapping: list[Tensor]  # (R,) int64, hard argmin on the soft residual chain (line 5)


def alpha_at(iteration: int, max_iters: int, max_alpha: float, exponent: float) -> float:
    """Softmax temperature schedule, Eq. 8, clamped at ``max_alpha`` once ``max_iters`` have passed."""
    if max_iters <= 0:
        return max_alpha
    return max_alpha * (min(iteration, max_iters) / max_iters) ** exponent


def warmup_at(iteration: int, start: int, steps: int) -> float:
    """Linear warm-up of the index loss weight (§3.2.4): 0 before ``start``, 1 from ``start + steps``."""
    if iteration < start:
        return 0.0
    return 1.0 if steps <= 0 else min(1.0, (iteration - start + 1) / steps)


class LearnToIndex(nn.Module):
    """Residual codebooks with soft assignment.

    Distances are divided by a running mean of the squared residual norm of their layer, because residuals
    shrink from layer to layer and a single temperature would not fit them all; an argmin is unchanged by it.

    Args:
        sizes: K_l per index layer.
        width: d.
        pool: batches pooled by the FLOPs regulariser (K_pool).
    """

    def __init__(self, sizes: Sequence[int], width: int, pool: int = 8) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.width = width
        self.codebook = nn.ParameterList(nn.Parameter(torch.randn(k, width)) for k in sizes)
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        self.register_buffer("scale", torch.ones(len(sizes)))
        self.register_buffer("scale_seen", torch.zeros((), dtype=torch.bool))
        for layer, k in enumerate(sizes):
            self.register_buffer(f"pool_{layer}", torch.zeros(pool, k))
            self.register_buffer(f"pool_count_{layer}", torch.zeros(pool))
        self.register_buffer("pool_at", torch.zeros((), dtype=torch.int64))

    def forward(self, v: Tensor, alpha: float) -> LTIOutput:
        """v (R, d), alpha >= 0 -> LTIOutput. In training the scale of the residuals is tracked."""
        residual = v  # r_1 = v (Eq. 5)
        total = torch.zeros_like(v)
        affinity: list[Tensor] = []
        embedding: list[Tensor] = []
        quantised: list[Tensor] = []
        mapping: list[Tensor] = []
        norms: list[Tensor] = []
        for layer, codebook in enumerate(self.codebook):
            norms.append(residual.detach().square().sum(-1).mean())
            scale = self.scale[layer] if bool(self.scale_seen) else norms[-1]  # type: ignore[index]
            distance = squared_distance(residual, codebook)
            a = torch.softmax(-alpha * distance / scale.clamp(min=1e-6), dim=-1)
            c_bar = a @ codebook
            total = total + c_bar
            affinity.append(a)
            embedding.append(c_bar)
            quantised.append(total)
            mapping.append(distance.argmin(-1))
            residual = residual - c_bar  # Eq. 6; the subtraction keeps its gradient
        if self.training and norms:
            with torch.no_grad():
                fresh = torch.stack(norms)
                kept: Tensor = self.scale  # type: ignore[assignment]
                kept.copy_(kept * 0.99 + fresh * 0.01 if bool(self.scale_seen) else fresh)
                self.scale_seen.fill_(True)  # type: ignore[operator]
        return LTIOutput(affinity, embedding, quantised, mapping)

    @torch.no_grad()
    def health(self, v: Tensor, paths: np.ndarray, alpha: float | None) -> list[IndexHealth]:
        """IndexHealth per layer of the corpus v (V, d) under the hard ``paths`` (V, N-1), compared with where the
        soft chain of this alpha ends; None, without a soft chain, compares nothing. Tracks no scale."""
        training = self.training
        self.eval()
        soft = [None] * len(self.sizes) if alpha is None else self(v, alpha).mapping
        self.train(training)
        return [
            index_health(torch.from_numpy(paths[:, layer].astype(np.int64)), size, _on_cpu(soft[layer]))
            for layer, size in enumerate(self.sizes)
        ]

    def reconstruction_loss(self, out: LTIOutput, v: Tensor) -> Tensor:
        """Eq. 7 with q = the sum over all N-1 index layers; mean over items and over the d components (a sum
        over d would outweigh every other loss and alone can collapse the codebooks).

        v is the target and gets no gradient from being one: while alpha is small, q is near the codebooks'
        mean for every item, and pulling v there collapses the index (docs/log.md has the figures).
        """
        return (out.quantised[-1] - v.detach()).square().mean()

    def balance_loss(self, out: LTIOutput) -> Tensor:
        """FLOPs regulariser (§3.2.4): sum_k (mean_j a_jk)^2 over the pooled batches, times K_l so that a uniform
        assignment costs 1 in every layer, averaged over layers.

        The pool's earlier batches carry no gradient; without care the gradient would shrink by the pool's size,
        so the pooled mean's value is used with the current batch's full gradient.
        """
        losses = []
        for layer, a in enumerate(out.affinity):
            mean = a.mean(0)
            pool: Tensor = getattr(self, f"pool_{layer}")
            count: Tensor = getattr(self, f"pool_count_{layer}")
            total = count.sum() + len(a)
            pooled = ((pool * count[:, None]).sum(0) + mean.detach() * len(a)) / total
            mean = pooled + (mean - mean.detach())
            losses.append(self.sizes[layer] * mean.square().sum())
            if self.training:
                slot = int(self.pool_at) % len(pool)  # type: ignore[arg-type]
                with torch.no_grad():
                    pool[slot] = a.detach().mean(0)
                    count[slot] = len(a)
        if self.training:
            self.pool_at.add_(1)  # type: ignore[operator]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def set_codebooks(self, centroids: Sequence[Tensor]) -> None:
        """Put centroids (K_l, d) in place, forget the pool and the running scale, and mark as initialised."""
        for layer, (own, new) in enumerate(zip(self.codebook, centroids)):
            if tuple(new.shape) != tuple(own.shape):
                raise ValueError(
                    f"codebook {layer + 1}: got shape {tuple(new.shape)}, expected {tuple(own.shape)}"
                )
            own.copy_(new)
            getattr(self, f"pool_{layer}").zero_()
            getattr(self, f"pool_count_{layer}").zero_()
        self.pool_at.zero_()  # type: ignore[operator]
        self.scale_seen.fill_(False)  # type: ignore[operator]
        self.initialised.fill_(True)  # type: ignore[operator]

    @torch.no_grad()
    def revive(self, v: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Reset dead codewords (none of the corpus v (V, d) maps to them) to residuals of random live items, drawn on
        the CPU by ``generator``.

        Returns per layer the int64 codewords that were reset: the caller clears their optimiser state.
        """
        reset: list[Tensor] = []
        residual = v
        for codebook in self.codebook:
            mapping = nearest(residual, codebook)
            used = torch.bincount(mapping, minlength=len(codebook))
            dead = torch.nonzero(used == 0).flatten()
            if len(dead):
                # draw from crowded codewords first: splitting those is what balances the index
                weight = used[mapping].cpu().to(torch.float64)
                pick = torch.multinomial(
                    weight, len(dead), replacement=len(v) < len(dead), generator=generator
                )
                codebook[dead] = residual[pick.to(residual.device)]
                mapping = nearest(residual, codebook)
            reset.append(dead)
            residual = residual - codebook[mapping]
        return reset


def squared_distance(x: Tensor, codebook: Tensor) -> Tensor:
    """d(j, k) = ||x_j - c_k||^2 (Algorithm 1, line 4). x (R, d), codebook (K, d) -> (R, K), never negative."""
    cross = x @ codebook.T
    return (x.square().sum(-1, keepdim=True) - 2 * cross + codebook.square().sum(-1)).clamp(min=0)


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """argmin_k d(j, k) without keeping all distances: (R, d), (K, d) -> (R,) int64."""
    return torch.cat([squared_distance(part, codebook).argmin(-1) for part in x.split(65536)])


@dataclass(frozen=True)
class IndexHealth:
    """Health of one index layer over the corpus, from the hard assignment that serving uses.

    The FLOPs loss is at its minimum while a small alpha hides a fully collapsed argmin, so only hard figures
    count here.
    """

    codewords: int
    used: int
    perplexity: float
    largest_share: float
    disagreement: float  # share of items whose soft-chain argmin differs from the hard chain's

    @property
    def occupancy(self) -> float:
        """Share of codewords (or possible paths) with at least one item."""
        return self.used / self.codewords

    @property
    def collapsed(self) -> bool:
        """True when the items effectively live in under a tenth of the codewords."""
        return self.codewords > 1 and self.perplexity < max(1.5, 0.1 * self.codewords)


def _on_cpu(mapping: Tensor | None) -> Tensor | None:
    return None if mapping is None else mapping.cpu()


def index_health(mapping: Tensor, codewords: int, soft_mapping: Tensor | None = None) -> IndexHealth:
    """IndexHealth of a mapping int64 (V,) with values below ``codewords``."""
    counts = torch.bincount(mapping, minlength=codewords).to(torch.float64)
    p = counts / counts.sum()
    entropy = -(p[p > 0] * torch.log(p[p > 0])).sum()
    disagreement = 0.0 if soft_mapping is None else float((mapping != soft_mapping).to(torch.float64).mean())
    return IndexHealth(
        codewords=codewords,
        used=int((counts > 0).sum()),
        perplexity=float(torch.exp(entropy)),
        largest_share=float(p.max()),
        disagreement=disagreement,
    )
