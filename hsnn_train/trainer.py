"""The training loop: joint training of MoNNs and index, with exact resume.

A step is a function of (recipe, data, step number, state in the checkpoint), so a run that was interrupted and
resumed ends bit for bit where an uninterrupted one does.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hsnn_core.errors import HsnnError
from hsnn_core.i2if import I2IF
from hsnn_train.data.dataset import Dataset

from . import losses
from .batches import BatchMaker, IndexState, epoch_order, step_rng
from .checkpoint import load_checkpoint, load_run, make_model, save_checkpoint, save_inputs, write_aside
from .hsnn import HSNN, Batch, HSNNOutput
from .lti import alpha_at, index_health, warmup_at
from .recipe import Recipe
from .refresh import index_vectors, refresh, reset_optimizer_rows, residual_kmeans

LOG_EVERY = 20


class Interrupted(HsnnError):
    """Training was stopped by Ctrl-C; the checkpoint is kept."""


def rows_i2if(dataset: Dataset) -> I2IF | None:
    """I2IF over item-table rows, for training; None when the schema has no interactions."""
    if not dataset.schema.interactions:
        return None
    position_of_id = np.full(dataset.transform.cardinality("item"), -1, np.int32)
    position_of_id[2:] = np.arange(len(dataset.item_keys), dtype=np.int32)
    return I2IF.build(dataset.schema, dataset.transform, dataset.items, position_of_id)


def make_batches(dataset: Dataset, recipe: Recipe) -> BatchMaker:
    """The batch maker of a recipe, as training and evaluation use it."""
    t = recipe.train
    return BatchMaker(
        dataset, rows_i2if(dataset), len(recipe.model.layers), t.negatives, t.unlabelled, t.negative_power
    )


class Trainer:
    """Trains one recipe on one data set into one run directory.

    Args:
        recipe: what to do.
        dataset: encoded examples and items.
        run: directory to write; made when missing.
        resume: continue from its checkpoint.
        progress: show a progress bar with ETA.
    """

    def __init__(
        self, recipe: Recipe, dataset: Dataset, run: Path, resume: bool = False, progress: bool = True
    ) -> None:
        t = recipe.train
        self.recipe, self.dataset, self.run, self.progress = recipe, dataset, run, progress
        torch.manual_seed(t.seed)
        self.model: HSNN = make_model(recipe, dataset.transform)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=t.lr, weight_decay=t.weight_decay, foreach=True,
        )  # fmt: skip
        self.batches = make_batches(dataset, recipe)
        self.task_weights = torch.tensor([task.weight for task in recipe.schema.tasks])
        self.steps_per_epoch = max(1, math.ceil(len(dataset.train.item_row) / t.batch_size))
        self.steps = t.max_steps or t.epochs * self.steps_per_epoch
        self.init_step = int(t.init_at * self.steps)
        self.kmeans_steps = self._kmeans_schedule()
        self.teacher: HSNN | None = load_run(t.teacher).model if t.teacher else None
        self.step = 0
        self._order_of, self._order = -1, np.empty(0, np.int64)
        self.history: list[dict[str, Any]] = []
        self.state: IndexState
        if resume:
            self._restore()
        else:
            save_inputs(run, recipe, dataset.transform, dataset.items, dataset.item_keys)

    def _kmeans_schedule(self) -> set[int]:
        """Steps at which codebooks are set by k-means: at the start; for the joint index once more where its
        losses begin, for "kmeans" where the item tower has settled, for "em" at every round."""
        if self.model.lti is None:
            return set()
        method, t = self.recipe.model.index, self.recipe.train
        if method == "joint":
            return {0, self.init_step}
        if method == "kmeans":
            return {0, self.steps // 2}
        return {0, *(round(self.steps * (i + 1) / (t.em_rounds + 1)) for i in range(t.em_rounds))}

    # Checkpoints.

    def save(self) -> None:
        """Write the checkpoint and the history, atomically."""
        save_checkpoint(
            self.run / "checkpoint.pt",
            {
                "schema_hash": self.recipe.schema.hash,
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "paths": torch.from_numpy(self.state.paths),
                "representative": torch.from_numpy(self.state.representative),
                "history": self.history,
            },
        )
        lines = "".join(_json_line(row) for row in self.history)
        write_aside(self.run / "history.jsonl", lines.encode())

    def _restore(self) -> None:
        saved = load_checkpoint(self.run / "checkpoint.pt", self.recipe.schema)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = IndexState(saved["paths"].numpy(), saved["representative"].numpy())
        self.step = int(saved["step"])
        self.history = list(saved["history"])

    # The loop.

    def train(self) -> HSNN:
        """Run to the last step. Raises Interrupted after Ctrl-C, with the checkpoint of the last whole step."""
        if self.step == 0 and not self.history:
            self._refresh(final=False)
        self.model.train()
        bar = tqdm(total=self.steps, initial=self.step, desc="train", unit="step", disable=not self.progress,
                   mininterval=0.5)  # fmt: skip
        seen, started = 0, time.monotonic()
        with bar, _interrupt_flag() as interrupted:
            while self.step < self.steps:
                if self.step and (
                    self.step in self.kmeans_steps or self.step % self.recipe.train.refresh_steps == 0
                ):
                    self._refresh(final=False)
                parts, pairs = self._one_step()
                seen += pairs
                self.step += 1
                bar.update()
                if self.step % LOG_EVERY == 0 or self.step == self.steps:
                    rate = seen / (time.monotonic() - started)
                    values = {name: round(float(value), 6) for name, value in parts.items()}
                    self.history.append({"step": self.step, **values})
                    bar.set_postfix(loss=f"{values['loss']:.4f}", pairs_per_s=f"{rate:,.0f}")
                if interrupted():
                    self.save()
                    raise Interrupted(
                        f"training stopped at step {self.step} of {self.steps}; the checkpoint is in {self.run}; "
                        "go on with: hsnn train --resume " + str(self.run)
                    )
                if self.step % self.recipe.train.checkpoint_steps == 0 and self.step < self.steps:
                    self.save()
        self._refresh(final=True)
        self.save()
        return self.model.eval()

    def alpha(self) -> float | None:
        """Temperature of this step's soft assignment; None while hard codes are used."""
        t = self.recipe.train
        if self.recipe.model.index != "joint" or self.model.lti is None:
            return None
        return alpha_at(self.step, int(t.alpha_until * self.steps), t.max_alpha, t.alpha_exponent)

    def _one_step(self) -> tuple[dict[str, Tensor], int]:
        t = self.recipe.train
        epoch, at = divmod(self.step, self.steps_per_epoch)
        if epoch != self._order_of:
            self._order_of, self._order = epoch, epoch_order(len(self.dataset.train.item_row), t.seed, epoch)
        rows = np.sort(self._order[at * t.batch_size : (at + 1) * t.batch_size])
        batch = self.batches.make(self.dataset.train, rows, self.state, step_rng(t.seed, self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = t.lr * self._lr_factor()
        out = self.model(batch, self.alpha())
        parts = self._loss(batch, out)
        self.optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        return {k: v.detach() for k, v in parts.items()}, batch.labels.shape[0] * batch.labels.shape[1]

    def _lr_factor(self) -> float:
        """Linear warm-up over 5% of the steps, then a cosine down to a tenth."""
        warm = max(1, self.steps // 20)
        if self.step < warm:
            return (self.step + 1) / warm
        along = (self.step - warm) / max(1, self.steps - warm)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * along))

    def _loss(self, batch: Batch, out: HSNNOutput) -> dict[str, Tensor]:
        """L = L_sup + L_unsup (Eq. 3, 4) + the index's losses under their warm-up."""
        t = self.recipe.train
        parts = {"supervised": losses.layered(out.logits, batch.labels, batch.labelled, self.task_weights)}
        total = parts["supervised"]
        if t.unlabelled and t.distil:
            if self.teacher is not None:
                with torch.no_grad():
                    soft = self.teacher(batch, None).logits[-1]
            else:
                soft = out.logits[-1]
            free = 1.0 - batch.labelled
            free[:, : 1 + t.negatives] = 0.0
            students = out.logits if self.teacher is not None else out.logits[:-1]
            if students:
                parts["distil"] = torch.stack(
                    [losses.distil(logits, soft, free, self.task_weights) for logits in students]
                ).sum()
                total = total + t.distil * parts["distil"]
        if self.model.layers > 1:
            parts["pull"] = self.model.interaction_pull(out.interactions)
            total = total + t.interaction_pull * parts["pull"]
        if out.lti is not None and self.model.lti is not None:
            parts["index"] = losses.layered(out.index_logits, batch.labels, batch.labelled, self.task_weights)
            parts["reconstruction"] = self.model.lti.reconstruction_loss(out.lti, out.v)
            parts["balance"] = self.model.lti.balance_loss(out.lti)
            weight = warmup_at(self.step, self.init_step, int(t.warmup * self.steps))
            total = total + weight * (
                t.index_loss * parts["index"]
                + t.reconstruction * parts["reconstruction"]
                + t.balance * parts["balance"]
            )
        parts["loss"] = total
        return parts

    # The index between steps.

    def _refresh(self, final: bool) -> None:
        """Re-assign the corpus; before that, k-means or the reset of dead codewords where they are due."""
        lti, t = self.model.lti, self.recipe.train
        if lti is not None and not final:
            v = index_vectors(self.model, self.dataset.items)
            if self.step in self.kmeans_steps:
                lti.set_codebooks(residual_kmeans(v, lti.sizes, t.seed))
            elif self.recipe.model.index == "joint" and self.step >= self.init_step:
                generator = torch.Generator().manual_seed(t.seed * 1_000_003 + self.step)
                for codebook, dead in zip(lti.codebook, lti.revive(torch.from_numpy(v), generator)):
                    reset_optimizer_rows(self.optimizer, codebook, dead)
        self.state, _ = refresh(self.model, self.dataset.items, self.dataset.item_keys)
        if lti is not None:
            row: dict[str, Any] = {"step": self.step}
            for layer, size in enumerate(lti.sizes, start=1):
                health = index_health(torch.from_numpy(self.state.paths[:, layer - 1].astype(np.int64)), size)
                row |= {f"l{layer}_{k}": v for k, v in asdict(health).items() if k != "disagreement"}
                if health.collapsed and self.step > self.init_step:
                    tqdm.write(
                        f"warning: step {self.step}: codebook {layer} has collapsed: items live in effectively "
                        f"{health.perplexity:.1f} of {size} codewords; raise train.balance or lower train.max_alpha"
                    )
            self.history.append(row)


def _json_line(row: dict[str, Any]) -> str:

    return json.dumps(row) + "\n"


@contextmanager
def _interrupt_flag() -> Iterator[Any]:
    """Ctrl-C sets a flag that the loop reads between steps, so a step is never half done; a second one raises."""
    hit = False

    def handle(signum: int, frame: Any) -> None:
        nonlocal hit
        if hit:
            raise KeyboardInterrupt
        hit = True

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: nothing to catch there
        yield lambda: hit
        return
    try:
        yield lambda: hit
    finally:
        signal.signal(signal.SIGINT, before)
