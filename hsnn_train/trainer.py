"""The training loop: joint training of MoNNs and index, with exact resume.

A step is a function of (recipe, data, step number, state in the checkpoint), so a run that was interrupted and
resumed ends bit for bit where an uninterrupted one does.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hsnn_core.errors import DataError, HsnnError
from hsnn_core.files import write_bytes
from hsnn_core.i2if import I2IF
from hsnn_core.schema import ITEM_SPACE
from hsnn_train.data.dataset import Dataset
from hsnn_train.data.tables import find_rows

from .batches import BatchMaker, IndexState, ItemTable, epoch_order, held_out, held_share
from .checkpoint import (
    check_inputs,
    load_checkpoint,
    make_model,
    save_checkpoint,
    save_inputs,
    without_nan,
)
from .ensemble import calibrated_as
from .guards import deterministic, interrupt_flag
from .hsnn import HSNN
from .lti import alpha_at, warmup_at
from .negatives import ItemLists, Pools
from .objective import Moment, Objective
from .presets import reads_interactions
from .recipe import Recipe
from .refresh import index_vectors, refresh, residual_kmeans
from .steps import (
    LAST_LR,
    gradient_step,
    index_health,
    make_optimizer,
    revive_codewords,
    set_learning_rate,
)
from .teacher import Teacher
from .warm import WarmStarts

LOG_EVERY = 20
CPU = torch.device("cpu")


class Interrupted(HsnnError):
    """Training was stopped by Ctrl-C; the checkpoint is kept."""


class NotSaved(HsnnError):
    """The checkpoint could not be written; the one before is kept."""


def rows_i2ifs(dataset: ItemTable) -> list[I2IF]:
    """I2IF over item-table rows: of every fold, then of what is served; empty when the schema has no interactions."""
    if not dataset.schema.interactions:
        return []
    row_of_id = _row_of_id(dataset)
    return [
        I2IF.build(dataset.schema, dataset.transform, items, row_of_id)
        for items in (*dataset.folds, dataset.items)
    ]


def _row_of_id(items: ItemTable) -> np.ndarray:
    """(ids of the item space,) int32: the item-table row of the item that an id stands for, -1 for none."""
    known = items.transform.vocabularies[ITEM_SPACE]
    row_of_id = np.full(items.transform.cardinality(ITEM_SPACE), -1, np.int32)
    row_of_id[known.ids] = find_rows(items.item_keys, known.keys)
    return row_of_id


def _first_time(dataset: Dataset, recipe: Recipe) -> np.ndarray | None:
    """When items appeared, where that decides what a negative may be."""
    return dataset.item_first_time if recipe.search.growing else None


def make_batches(dataset: Dataset, recipe: Recipe) -> BatchMaker:
    """The batch maker of a recipe, as training and evaluation use it."""
    t, reads = recipe.train, reads_interactions(recipe.model.layers)
    return BatchMaker(
        dataset, rows_i2ifs(dataset), reads, t.negatives, t.unlabelled, t.negative_power,
        _first_time(dataset, recipe),
    )  # fmt: skip


def make_pools(
    items: ItemTable,
    recipe: Recipe,
    first_time: np.ndarray | None,
    had: Callable[[np.ndarray], list[np.ndarray]] | None = None,
) -> Pools | None:
    """The pools of a recipe on such items, with ``first_time`` and ``had`` as `Pools` has them; None where the recipe
    has none."""
    t = recipe.train
    if not t.pool:
        return None
    lists = None
    if t.listed:
        (slot,) = (s for s in items.schema.layout("user").slots if s.feature.name == t.listed_from)
        row_of_id = _row_of_id(items)
        drawn = np.where(items.item_counts[row_of_id] > 0, row_of_id, np.int32(-1))
        lists = ItemLists(slice(slot.start, slot.stop), drawn, t.listed)
    return Pools(items.item_counts, t.pool, t.negative_power, first_time, lists, had)


def evaluation_batches(dataset: Dataset, recipe: Recipe) -> BatchMaker:
    """As training's, but negatives are uniform among the items with a training positive: what logits are calibrated
    for, whatever training drew."""
    t = recipe.train
    return BatchMaker(
        dataset, rows_i2ifs(dataset), reads_interactions(recipe.model.layers), t.negatives, 0, 0.0
    )


class Trainer:
    """Trains one recipe on one data set into one run directory.

    Args:
        recipe: what to do.
        dataset: encoded examples and items.
        run: directory to write; made when missing.
        resume: continue from its checkpoint.
        progress: show a progress bar with ETA.
        warm: share the first phase with other runs.
        device: where to train (`find_device`). On a GPU a resumed run ends like an uninterrupted one up to rounding.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        run: Path,
        resume: bool = False,
        progress: bool = True,
        warm: WarmStarts | None = None,
        device: torch.device = CPU,
    ) -> None:
        t = recipe.train
        self.recipe, self.dataset, self.run, self.progress = recipe, dataset, run, progress
        torch.manual_seed(t.seed)
        self.model: HSNN = make_model(recipe, dataset.transform)
        self.model.set_items(dataset.items, dataset.item_counts, recipe.model.min_positives)
        if t.pool:
            self.model.fix_temperature(t.temperature)
        self.model.to(device)
        self.optimizer = make_optimizer(self.model, t)
        self.batches = make_batches(dataset, recipe)
        self.steps = t.max_steps or t.epochs * max(1, math.ceil(len(dataset.train) / t.batch_size))
        self.init_step = self.steps if self.model.two_tower_only else int(t.init_at * self.steps)
        self.kmeans_steps = self._kmeans_schedule()
        self.held = held_share(self.model, t.held)
        teacher = Teacher(Path(t.teacher), dataset, self.batches, device) if t.teacher else None
        drawn_task = recipe.schema.drawn_task
        had = (lambda rows: dataset.earlier("train", rows, drawn_task)) if recipe.search.fresh else None
        pools = make_pools(dataset, recipe, _first_time(dataset, recipe), had)
        self.objective = Objective(self.model, self.batches, pools, dataset.train, t, recipe.schema, teacher)
        self.step = 0
        self.finished = False  # the last step is done and the index is final
        #: And its ensembles are fitted to valid, once: a second fit would round otherwise.
        self.calibrated = False
        #: What training left of them, kept beside what calibration made of it: a run may be calibrated otherwise later.
        self.trained_ensembles: dict[str, Tensor] = {}
        self.warm = warm
        self._refreshed = -1  # the step of the last refresh
        self._order_of, self._order = (False, -1), np.empty(0, np.int64)  # of those of the phase
        self._those = self._order
        self.history: list[dict[str, Any]] = []
        self.state: IndexState
        self._check_labels()
        self._check_held()
        if resume:
            self._restore()
        else:
            save_inputs(run, recipe, dataset.transform, dataset.items, dataset.item_keys, dataset.attributes)

    def _kmeans_schedule(self) -> set[int]:
        """Steps at which codebooks are set by k-means: at the start, and where the item tower has settled, which for
        "em" is again and again until the end."""
        if self.model.lti is None:
            return set()
        if self.recipe.model.index != "em":
            return {0, self.init_step}
        rounds, left = self.recipe.train.em_rounds, self.steps - self.init_step
        return {0, *(self.init_step + round(left * i / (rounds + 1)) for i in range(rounds + 1))}

    def _check_labels(self) -> None:
        """A log of positives alone teaches nothing but to say yes; DataError says what to set."""
        labels, schema = self.dataset.train.labels, self.recipe.schema
        for number, (task, place) in enumerate(zip(schema.tasks, schema.given)):
            if place >= 0 and labels[labels[:, place] > 0, number].all():
                raise DataError(
                    f"no training label of task {task.name} is 0 where {task.given} is 1, so there is nothing to tell "
                    "apart, and negatives are not drawn for it; leave the task out"
                )
        always = (labels.min(axis=0) > 0) & (schema.given < 0)
        if always.any() and not self.recipe.train.negatives:
            names = ", ".join(t.name for t, yes in zip(schema.tasks, always) if yes)
            raise DataError(
                f"every training label of task {names} is 1, so there is nothing to tell apart; "
                "draw negatives: set train.negatives (8, say)"
            )

    def _check_held(self) -> None:
        """DataError where users are held out and one of the phases has no user, or no step."""
        if not self.held:
            return
        held = held_out(self.dataset.train.user_key, self.held)
        if held.all() or not held.any():
            raise DataError(
                f"train.held: {self.held} of the users is {'all' if held.all() else 'none'} of them; "
                "set a share that leaves some for both phases, or 0"
            )
        if not 0 < self.init_step < self.steps:
            raise DataError(
                f"train.held: the first phase has {self.init_step} of {self.steps} steps, expected some for each; "
                "change train.init_at, or set train.held to 0"
            )

    # Checkpoints.

    def save(self) -> None:
        """Write the checkpoint and the history, each atomically. Raises NotSaved when the disk refuses."""
        state = {
            "schema_hash": self.recipe.schema.hash,
            "step": self.step,
            "finished": self.finished,
            "calibrated": calibrated_as(self.recipe.train.order) if self.calibrated else 0,
            "examples": len(self.dataset.train),
            "model": self.model.state_dict(),
            "trained_ensembles": self.trained_ensembles,
            "optimizer": self.optimizer.state_dict(),
            "paths": torch.from_numpy(self.state.paths),
            "representative": torch.from_numpy(self.state.representative),
            "history": self.history,
        }
        lines = "".join(json.dumps(without_nan(row)) + "\n" for row in self.history)
        path = self.run / "checkpoint.pt"
        try:
            save_checkpoint(path, state)
            write_bytes(self.run / "history.jsonl", lines.encode())
        except OSError as error:
            before = "the one before is kept" if path.exists() else "there is none before it"
            raise NotSaved(
                f"the checkpoint of step {self.step} could not be written to {self.run} ({error.strerror}); "
                f"{before}; make room, then go on with: {self._go_on}"
            ) from error

    @property
    def _go_on(self) -> str:
        return f"hsnn train --resume {self.run}"

    def _restore(self) -> None:
        dataset = self.dataset
        check_inputs(self.run, dataset.schema, dataset.transform, dataset.items, dataset.item_keys)
        saved = load_checkpoint(self.run / "checkpoint.pt", self.recipe.schema)
        if saved.get("examples", len(dataset.train)) != len(dataset.train):
            raise DataError(
                f"run {self.run}: began with {saved['examples']} training impressions, the tables give "
                f"{len(dataset.train)} now; bring back those tables, or train again"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = IndexState(saved["paths"].numpy(), saved["representative"].numpy())
        self.step = int(saved["step"])
        self.finished = bool(saved.get("finished", False))
        # Otherwise than this recipe and this release would: fitted anew, from what training left.
        self.calibrated = saved.get("calibrated") == calibrated_as(self.recipe.train.order)
        self.trained_ensembles = saved.get("trained_ensembles", {})
        if self.trained_ensembles and not self.calibrated:
            self.model.ensemble.load_state_dict(self.trained_ensembles)
        self.history = list(saved["history"])

    # The loop.

    def train(self) -> HSNN:
        """Run to the last step; a finished run is left as it is.

        Raises Interrupted after Ctrl-C, with the checkpoint of the last whole step, Diverged and NotSaved.
        """
        if self.finished:
            return self.model.eval()
        bar = tqdm(total=self.steps, initial=self.step, desc="train", unit="step", disable=not self.progress,
                   mininterval=0.5)  # fmt: skip
        with bar, deterministic(self.model.device):
            if self.step == 0:
                kept = None if self.warm is None else self.warm.load(*self._first_phase)
                if kept is not None:
                    self.history, self.step = kept, self.init_step
                    bar.update(self.step)
                self._refresh(bar)
            with interrupt_flag() as interrupted:
                self.model.train()
                self._loop(bar, interrupted)
                self._refresh(bar, final=True)
                ensembles = self.model.ensemble.state_dict()
                self.trained_ensembles = {name: value.clone() for name, value in ensembles.items()}
                self.finished = True
                self.save()
                if interrupted():
                    raise Interrupted(
                        f"stopped after the last step of {self.steps}, before calibration; the checkpoint is in "
                        f"{self.run}; go on with: {self._go_on}"
                    )
        return self.model.eval()

    def _loop(self, bar: Any, interrupted: Callable[[], bool]) -> None:
        """The steps that are left, with refreshes and checkpoints on the way."""
        seen, started = 0, time.monotonic()
        while self.step < self.steps:
            every = self.recipe.train.refresh_steps
            due = self.step in self.kmeans_steps or (self.step % every == 0 and not self._warming)
            if due and self._refreshed != self.step:
                self._refresh(bar)
            if self.warm is not None and self.step and self.step == self.init_step:
                self.warm.keep(*self._first_phase, self.history)
            parts, pairs = self._one_step()
            seen += pairs
            self.step += 1
            bar.update()
            if self.step % LOG_EVERY == 0 or self.step == self.steps:
                rate = seen / (time.monotonic() - started)
                values = {name: round(float(value), 6) for name, value in parts.items()}
                self.history.append({"step": self.step, **values})
                bar.set_postfix(loss=f"{values['loss']:.4f}", pairs_per_s=f"{rate:,.0f}")
            if self.step == self.steps:
                return
            if interrupted():
                self.save()
                raise Interrupted(
                    f"training stopped at step {self.step} of {self.steps}; the checkpoint is in {self.run}; "
                    f"go on with: {self._go_on}"
                )
            if self.step % self.recipe.train.checkpoint_steps == 0:
                self.save()

    @property
    def _warming(self) -> bool:
        """Whether only the item layer's two towers are trained yet, so that nothing reads the index."""
        return self.recipe.train.two_phases and self.step < self.init_step

    @property
    def _first_phase(self) -> tuple[Recipe, Dataset, HSNN, torch.optim.Optimizer, int]:
        return self.recipe, self.dataset, self.model, self.optimizer, self.init_step

    def alpha(self) -> float | None:
        """Temperature of this step's soft assignment; None while hard codes are used."""
        t = self.recipe.train
        if self.recipe.model.index != "joint" or self.model.lti is None:
            return None
        left = self.steps - self.init_step
        return alpha_at(
            max(0, self.step - self.init_step), int(t.alpha_until * left), t.max_alpha, t.alpha_exponent
        )

    def _one_step(self) -> tuple[dict[str, Tensor], int]:
        t = self.recipe.train
        rows = self._rows()
        set_learning_rate(self.optimizer, t, self._lr_factor(), self._warming)
        moment = Moment(
            self.alpha(),
            warmup_at(self.step, self.init_step, int(t.warmup * (self.steps - self.init_step))),
            warm=self._warming,
        )
        where = f"step {self.step + 1} of {self.steps}"
        return gradient_step(self.optimizer, self.objective, rows, self.state, moment, self.step, where)

    def _rows(self) -> np.ndarray:
        """The step's examples, ascending. With users held out each phase has epochs of its own."""
        t, train, step = self.recipe.train, self.dataset.train, self.step
        if self.held and not self._warming:
            step -= self.init_step
        if self._warming != self._order_of[0] or self._order_of[1] < 0:
            all_rows = np.arange(len(train))
            held = held_out(train.user_key, self.held)
            self._those = all_rows[held != self._warming] if self.held else all_rows
        epoch, at = divmod(step, max(1, math.ceil(len(self._those) / t.batch_size)))
        if (self._warming, epoch) != self._order_of:
            self._order_of = self._warming, epoch
            self._order = self._those[epoch_order(len(self._those), t.seed, epoch)]
        return np.sort(self._order[at * t.batch_size : (at + 1) * t.batch_size])

    def _lr_factor(self) -> float:
        """Linear warm-up over 5% of the steps, then a cosine down to a tenth; where the two towers come first, once for
        them and once for the whole model."""
        step, steps = self.step, self.steps
        if self.recipe.train.two_phases:
            start, end = (0, self.init_step) if self._warming else (self.init_step, self.steps)
            step, steps = step - start, end - start
        warm = max(1, steps // 20)
        if step < warm:
            return (step + 1) / warm
        along = (step - warm) / max(1, steps - warm)
        return LAST_LR + (1 - LAST_LR) / 2 * (1 + math.cos(math.pi * along))

    # The index between steps.

    def _refresh(self, bar: Any, final: bool = False) -> None:
        """Re-assign the corpus; before that, k-means or the reset of dead codewords where they are due."""
        bar.set_description("train: index")
        self._refreshed = self.step
        lti, t = self.model.lti, self.recipe.train
        v = None if lti is None else index_vectors(self.model, self.dataset.items)
        if lti is not None and v is not None and not final:
            if self.step in self.kmeans_steps or not bool(lti.initialised):
                lti.set_codebooks(residual_kmeans(v, lti.sizes, t.seed))
            elif self.recipe.model.index == "joint" and self.step >= self.init_step:
                revive_codewords(lti, self.optimizer, v, t.seed, self.step)
        self.state, _ = refresh(self.model, self.dataset.items, self.dataset.item_keys, v)
        if lti is not None and v is not None:
            row, collapsed = index_health(lti, v, self.state, self.alpha())
            for warning in collapsed if self.step > self.init_step else ():
                tqdm.write(f"warning: step {self.step}: {warning}")
            self.history.append({"step": self.step, **row})
        bar.set_description("train")
