"""What a training step minimises: Eq. 1 to 4 of the paper and the index's losses, from impressions with labels or, in
logs of positives alone, against a pool of sampled items.

With a pool every score is trained to be log p(item | user) up to a constant: each loss corrects for the probability
with which its negatives were drawn (log-Q), so that drawing popular or hard items does not bias the ranking.

Letters: B users, C candidates per user, M items of the pool, T tasks, N layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hsnn_core.schema import Schema
from hsnn_train.data.dataset import Examples

from . import losses
from .batches import BatchMaker, IndexState, users_of
from .device import moved
from .hsnn import HSNN, HSNNOutput, Pairs
from .negatives import Pool, Pools
from .recipe_sections import TrainConfig
from .teacher import Teacher

NEVER = -1e4  # the logit of what cannot be; an infinite one times a target of 0 would be no number
Weighted = dict[str, tuple[float, Tensor]]


@dataclass(frozen=True)
class Moment:
    """Where in the run a step stands. alpha: temperature of the soft assignment, None with hard codes; index_weight:
    warm-up factor of the index's losses; warm: only the item layer's two towers are trained yet."""

    alpha: float | None
    index_weight: float
    warm: bool


@dataclass
class Objective:
    """Losses of one batch. ``pools``: of logs of positives alone (of `Schema.drawn_task`), else None."""

    model: HSNN
    batches: BatchMaker
    pools: Pools | None
    examples: Examples
    train: TrainConfig
    schema: Schema
    teacher: Teacher | None

    def __post_init__(self) -> None:
        device, given = self.model.device, torch.from_numpy(self.schema.given)
        self.given = given.to(device)
        self.weights = torch.tensor([task.weight for task in self.schema.tasks], device=device)
        #: (T,) 1 for the tasks that are given none, whose negatives a pool's other items are; whether these are all.
        self.drawn, self.all_drawn = (given < 0).to(device, torch.float32), bool((given < 0).all())
        self.drawn_weights = self.weights * self.drawn

    def __call__(
        self, rows: np.ndarray, state: IndexState, moment: Moment, rng: np.random.Generator
    ) -> tuple[dict[str, Tensor], int]:
        """The losses of training examples ``rows`` (B,) by name, "loss" being what to minimise, and how many
        <user, item> pairs were scored by the MoNNs (by the two towers alone while ``moment.warm``)."""
        if self.pools is None:
            weighted, pairs = self._impressions(rows, state, moment, rng)
        else:
            weighted, pairs = self._pooled(self.pools, rows, state, moment, rng)
        parts = {name: value for name, (_, value) in weighted.items()}
        parts["loss"] = torch.stack([weight * value for weight, value in weighted.values()]).sum()
        return parts, pairs

    # A log with impressions that were not clicked, or sampled negatives as they are drawn.

    def _impressions(
        self, rows: np.ndarray, state: IndexState, moment: Moment, rng: np.random.Generator
    ) -> tuple[Weighted, int]:
        t = self.train
        batch = moved(self.batches.make(self.examples, rows, state, rng), self.model.device)
        labels, labelled = batch.pairs.labels, batch.pairs.labelled
        told = losses.told(labels, labelled, self.given)
        if moment.warm:
            everything = self.model.item_logits(*self.model.two_towers(batch.sides))  # (B, R, T)
            own = everything.gather(1, batch.pairs.of.unsqueeze(-1).expand(-1, -1, self.model.tasks))
            return {"supervised": (1.0, losses.supervised(own, labels, told, self.weights))}, labelled.numel()
        out = self.model(batch, moment.alpha)
        parts: Weighted = {"supervised": (1.0, losses.layered(out.logits, labels, told, self.weights))}
        if t.unlabelled and t.distil:
            free = torch.zeros_like(labelled)
            free[:, 1 + t.negatives :] = 1.0
            soft = None if self.teacher is None else self.teacher.logits(rows, batch.candidates)
            parts |= self._distilled(
                out.logits, soft, lambda logits, teacher: losses.distil(logits, teacher, free, self.weights)
            )
        index = None
        if out.embedded.lti is not None:
            of = batch.pairs.of.unsqueeze(-1).expand(-1, -1, self.model.tasks)
            chosen = [logits.gather(1, of) for logits in self.model.index_logits(out.embedded)]
            index = losses.layered(chosen, labels, told, self.weights)
        parts |= self._structure(out, index, moment)
        return parts, labelled.numel()

    # A log of positives alone: a pool for the two towers, and of it a few candidates for the MoNNs.

    def _pooled(
        self, pools: Pools, rows: np.ndarray, state: IndexState, moment: Moment, rng: np.random.Generator
    ) -> tuple[Weighted, int]:
        t, model = self.train, self.model
        pool = pools.draw(self.examples, rows, rng)
        users = users_of(self.examples, rows)
        sides = moved(self.batches.sides(users, pool.rows, state), model.device)
        of_pool = tuple(
            map(torch.from_numpy, (pool.positive, self.examples.labels[rows], pool.log_inclusion))
        )
        positive, labels, log_inclusion = moved(of_pool, model.device)
        own_told = losses.told(labels, labels.new_ones(len(rows)), self.given) * (1 - self.drawn)
        drawn_task = self.schema.drawn_task
        barred = None if pool.allowed is None else moved(torch.from_numpy(~pool.allowed), model.device)

        def possible(logits: Tensor) -> Tensor:
            return logits if barred is None else logits.masked_fill(barred.unsqueeze(-1), NEVER)

        def over_pool(logits: Tensor) -> Tensor:
            """And, of the tasks that are given another, the cross-entropy of the impression itself."""
            ranked = losses.pooled_softmax(logits, positive, log_inclusion, labels * self.drawn_weights)
            if self.all_drawn:
                return ranked
            own = logits.gather(1, positive.view(-1, 1, 1).expand(-1, 1, model.tasks))
            return ranked + losses.supervised(own, labels.unsqueeze(1), own_told.unsqueeze(1), self.weights)

        if moment.warm:
            logits = possible(model.item_logits(*model.two_towers(sides)))
            return {"retrieval": (t.softmax, over_pool(logits))}, len(rows) * len(pool.rows)
        embedded = model.embed(sides, moment.alpha)
        logits = possible(model.pool_logits(embedded, model.layers))
        parts: Weighted = {"retrieval": (t.softmax, over_pool(logits))}
        proposal = torch.softmax(logits[..., drawn_task].detach() - log_inclusion, dim=-1)  # (B, M)
        for_nodes = [possible(model.pool_logits(embedded, layer)) for layer in range(1, model.layers)]
        if for_nodes:
            parts["nodes"] = (t.softmax, torch.stack([over_pool(own) for own in for_nodes]).sum())
            if t.node_distil:
                # Softened, a node is worth what its best items are rather than what they are on average; times the
                # heat, its gradient stays of one size (Hinton et al. 2015).
                target = torch.softmax(logits[..., drawn_task].detach() / t.heat - log_inclusion, dim=-1)
                soft = [
                    losses.match(own[..., drawn_task] / t.heat - log_inclusion, target) for own in for_nodes
                ]
                parts["node_distil"] = (t.node_distil * t.heat, torch.stack(soft).sum())
        pairs, offset = self._candidates(rows, pool, len(pools.sampler.rows), proposal, state)
        out = model.score_pairs(embedded, pairs)
        # What no negatives were drawn for needs no correction.
        by_task = offset.unsqueeze(-1) * self.drawn
        corrected = [logits - by_task for logits in out.logits]
        told = losses.told(pairs.labels, pairs.labelled, self.given)
        parts["supervised"] = (1.0, losses.layered(corrected, pairs.labels, told, self.weights))
        each = [
            losses.sampled_softmax(own, pairs.labels, pairs.labelled, self.drawn_weights) for own in corrected
        ]
        parts["softmax"] = (t.softmax, torch.stack(each).sum())
        if t.distil:
            soft_labels = None
            if self.teacher is not None:
                soft_labels = self.teacher.logits(rows, pool.rows[pairs.of.cpu().numpy()]) - by_task
            parts |= self._distilled(
                corrected,
                soft_labels,
                lambda own, teacher: losses.distil_ranking(own, teacher, pairs.labelled),
            )
        index = None
        if embedded.lti is not None:
            chains = [possible(chain) for chain in model.index_logits(embedded)]
            index = torch.stack([over_pool(chain) for chain in chains]).sum()
        parts |= self._structure(out, index, moment)
        return parts, pairs.of.numel()

    @torch.no_grad()
    def _candidates(
        self, rows: np.ndarray, pool: Pool, possible: int, proposal: Tensor, state: IndexState
    ) -> tuple[Pairs, Tensor]:
        """The positive and ``train.negatives`` items of the pool per user, ``train.hard`` of them drawn from what the
        two towers put first and ``train.listed`` from the user's list; and the offset (B, C) by which logits exceed
        those of negatives drawn uniformly from the ``possible`` ones."""
        t = self.train
        count, device = len(pool.rows), proposal.device
        positive = torch.from_numpy(pool.positive).to(device).unsqueeze(-1)
        hard = torch.multinomial(
            proposal.scatter(1, positive, 0.0) + 1e-9, t.hard, replacement=True
        ) if t.hard else positive[:, :0]  # fmt: skip
        easy = torch.randint(count, (len(rows), t.negatives - t.hard - t.listed), device=device)
        of = torch.cat([positive, hard, easy, torch.from_numpy(pool.listed).to(device)], dim=1)  # (B, C)
        labelled = (of != positive).to(torch.float32)
        if pool.allowed is not None:
            labelled *= torch.from_numpy(pool.allowed).to(device).gather(1, of)
        labelled[:, 0] = 1.0
        labels = np.zeros((*of.shape, self.model.tasks), np.float32)
        labels[:, 0] = self.examples.labels[rows]
        slots = easy.shape[1] / count + t.hard * proposal.gather(1, of)
        of_list = torch.from_numpy(pool.listed_draws(of.cpu().numpy())).to(device)  # of the pool for certain
        offset = torch.log(torch.from_numpy(pool.log_inclusion).to(device)[of].exp() * slots + of_list)
        offset = offset - math.log(t.negatives / possible)
        users = users_of(self.examples, rows)
        fold = self.examples.fold[rows]
        pairs = self.batches.pairs(
            users, pool.rows, of.cpu().numpy(), state, labels, labelled.cpu().numpy(), fold
        )
        return moved(pairs, device), offset

    # Both.

    def _distilled(
        self, logits: list[Tensor], soft: Tensor | None, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> Weighted:
        """Eq. 2: a teacher's logits for all layers, or without one the last layer's for the layers above it."""
        students = logits[:-1] if soft is None else logits
        teacher = logits[-1] if soft is None else soft
        if not students:
            return {}
        return {"distil": (self.train.distil, torch.stack([loss(own, teacher) for own in students]).sum())}

    def _structure(self, out: HSNNOutput, index: Tensor | None, moment: Moment) -> Weighted:
        """The pull between interaction towers (§3.2.3), and the index's losses under their warm-up (§3.2.4)."""
        t, model, embedded = self.train, self.model, out.embedded
        parts: Weighted = {}
        if model.layers > 1:
            parts["pull"] = (t.interaction_pull, model.interaction_pull(out.interactions))
        if index is not None and embedded.lti is not None and model.lti is not None:
            weight = moment.index_weight
            parts["index"] = (weight * t.index_loss, index)
            parts["reconstruction"] = (
                weight * t.reconstruction, model.lti.reconstruction_loss(embedded.lti, embedded.v)
            )  # fmt: skip
            parts["balance"] = (weight * t.balance, model.lti.balance_loss(embedded.lti))
            if t.commitment:
                parts["commitment"] = (weight * t.commitment, F.mse_loss(embedded.v, embedded.chain))
        return parts
