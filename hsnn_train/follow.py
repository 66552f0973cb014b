"""Training on a stream of impressions that never ends (spec §1, "online training"): a finished run goes on learning
from files as they arrive.

A file is predicted before it is learnt from (progressive validation), once, in one pass. What a checkpoint holds is
always as of the end of a file, so an interrupted run repeats a file from its beginning or not at all, and ends bit for
bit where an uninterrupted one does. Schedules of training stand at their end: the last learning rate, the
largest alpha, no warm-up. Ids keep the meaning of the run it began from: keys that it has not seen stay
unknown, and a new item is what its other features say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from hsnn_core.arrayfile import open_arrays
from hsnn_core.errors import DataError, FeatureError, HsnnError, SchemaError
from hsnn_core.features import Encoded, FeatureTransform
from hsnn_core.i2if import I2IF
from hsnn_core.item_attributes import ItemAttributes

from .batches import BatchMaker, IndexState
from .checkpoint import (
    follows_stream,
    load_checkpoint,
    load_recipe_of_run,
    load_run,
    make_model,
    save_checkpoint,
    save_meaning,
)
from .data.dataset import recipe_tables
from .data.recent import RecentPositives
from .data.splits import TRAIN, Split
from .data.stream import (
    Impressions,
    LiveTables,
    Signatures,
    StreamItems,
    extended,
    history_tasks,
    read_examples,
    signature,
    waiting,
)
from .data.tables import check_tables, find_rows
from .evaluate import base_rates, pointwise, pointwise_report
from .follow_report import append_rows, keep_rows
from .guards import deterministic
from .hsnn import HSNN
from .objective import Moment, Objective
from .recipe import Recipe
from .refresh import index_vectors, refresh
from .steps import (
    LAST_LR,
    Diverged,
    gradient_step,
    index_health,
    make_optimizer,
    revive_codewords,
    set_learning_rate,
)
from .trainer import NotSaved, make_pools, rows_i2ifs


class Follower:
    """A run that follows a stream.

    Args:
        stream: folder of impression files.
        run: its own run directory; goes on from the checkpoint there, or begins.
        base: finished run to begin from; needed for the beginning alone.

    ``note``: how the items differ from those it began or went on from, "" when they do not.

    Raises DataError, SchemaError and HsnnError when the run cannot begin or go on like this.
    """

    def __init__(self, stream: Path, run: Path, base: Path | None = None) -> None:
        self.stream, self.run = stream.absolute(), run
        self.files: set[str] = set()
        self.bad: dict[str, list[int]] = {}  # name -> signature, so that a file which was put right is read
        self.seen = self.dropped = self.rows_reported = 0
        self.reports: list[dict[str, Any]] = []  # since the last checkpoint
        self.users: dict[str, np.ndarray] | None = None
        self._refused: Signatures = {}
        begun = follows_stream(run)
        if not begun:
            _check_base(run, base)
        source = run if begun else base
        assert source is not None
        self.recipe: Recipe = load_recipe_of_run(source)
        self.transform = FeatureTransform.from_arrays(
            self.recipe.schema, open_arrays(source / "transform.hsnn", "transform").arrays
        )
        saved = load_checkpoint(source / "checkpoint.pt", self.recipe.schema)
        self._restore_model(saved)
        self.tables = LiveTables.of(self.recipe.schema, self.recipe.data, self.recipe.base)
        if begun:
            self._restore(saved, base)
        else:
            self._begin(source)
        self.note = self._read_tables(self.tables)
        if not begun:
            save_meaning(run, self.recipe, self.transform)
            self.save()

    # What it begins from.

    def _restore_model(self, saved: dict[str, Any]) -> None:
        t = self.recipe.train
        self.model = make_model(self.recipe, self.transform)
        if t.pool:
            self.model.fix_temperature(t.temperature)
        self.model.load_state_dict(saved["model"])
        self.model.hold_unknown()
        self.optimizer = make_optimizer(self.model, t)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = IndexState(saved["paths"].numpy(), saved["representative"].numpy())
        self.step = int(saved["step"])
        # With one layer of inner products there is nothing to train but the two towers.
        self.warm = bool(t.pool) and self.model.two_tower_only
        set_learning_rate(self.optimizer, t, LAST_LR, self.warm)

    def _begin(self, base: Path) -> None:
        """Everything that the log of the run it begins from tells: base rates, popularity, histories."""
        run = load_run(base)
        recipe, schema = self.recipe, self.recipe.schema
        tables = recipe_tables(schema, recipe.data, recipe.base)
        # An item may have left the table since the run was trained.
        log = check_tables(replace(tables, unknown_items="drop"))
        if schema.time_key is None or log.tables.unordered:
            raise SchemaError(
                f"run {base}: its log has no times (schema.keys.time), expected some: a stream goes on in time"
            )
        train = Split.from_dict(recipe.split).assign(log) == TRAIN
        self.base = str(base.absolute())
        self.rates = base_rates(log.labels[train], schema, recipe.train.negatives)
        none = {task: RecentPositives.none(length) for task, length in history_tasks(schema).items()}
        self.recent = extended(none, log)
        counted = log.item_row[train & (log.labels[:, schema.drawn_task] > 0)]
        counts = np.bincount(counted, minlength=len(log.item_keys))
        row = find_rows(log.item_keys, run.item_ids)
        counts = np.where(row < 0, 0, counts[row])
        self._set_items(StreamItems(schema, self.transform, run.items, run.item_ids, counts, run.attributes))

    # The items and users of the moment.

    def _set_items(self, items: StreamItems) -> None:
        self.items: StreamItems = items
        self.i2ifs: list[I2IF] = rows_i2ifs(items)

    def update_tables(self) -> str:
        """Read the users and items tables again where their files have changed. Says what happened, "" when nothing.

        Tables that cannot be read leave the ones before in place."""
        now = self.tables.now()
        if now in (self.tables.read, self._refused):
            return ""
        try:
            tables = LiveTables.of(self.recipe.schema, self.recipe.data, self.recipe.base)
            return self._read_tables(tables)
        except (DataError, FeatureError, OSError, pa.ArrowException) as error:
            self._refused = now
            return f"tables not read again: {error}; the ones before stay"

    def _read_tables(self, tables: LiveTables) -> str:
        """Make these the tables; the index is made anew when the items are others."""
        before = self.items
        items, keys = tables.encoded_items(self.transform, (before.items, before.item_keys))
        row = find_rows(before.item_keys, keys)
        counts = np.where(row < 0, 0, before.item_counts[row])
        now = replace(
            before, items=items, item_keys=keys, item_counts=counts, attributes=tables.item_attributes()
        )
        self.tables = tables
        then, found = before.to_arrays(), now.to_arrays()
        if all(np.array_equal(array, then[name]) for name, array in found.items()):
            return ""
        self._set_items(now)
        self._refresh(revive=False)
        gone = len(before.item_keys) - int((row >= 0).sum())
        return f"items read again: {int((row < 0).sum())} new, {gone} gone, {len(keys):,} in all"

    def _refresh(self, revive: bool) -> list[str]:
        """Assign the items anew and elect representatives; returns what a collapsed codebook has to say."""
        lti = self.model.lti
        v = None if lti is None else index_vectors(self.model, self.items.items)
        if revive and lti is not None and v is not None and self.recipe.model.index == "joint":
            revive_codewords(lti, self.optimizer, v, self.recipe.train.seed, self.step)
        self.state, _ = refresh(self.model, self.items.items, self.items.item_keys, v)
        return [] if lti is None or v is None else index_health(lti, v, self.state, None)[1]

    # Files.

    def waiting(self) -> list[str]:
        """Names of the files to be read, in order; a bad one is among them again once it was replaced."""
        names = waiting(self.stream, self.files)
        return [name for name in names if self.bad.get(name) != list(signature(self.stream / name) or ())]

    def read(self, name: str) -> Impressions | None:
        """The impressions of a file; None when it has none. Raises DataError and FeatureError for a file that cannot be
        used; `bad` has its name then, and nothing was learnt from it."""
        found = signature(self.stream / name)
        try:
            impressions = self._read(name)
        except (DataError, FeatureError, OSError, pa.ArrowException) as error:
            self.bad[name] = list(found or ())
            if isinstance(error, HsnnError):
                raise
            raise DataError(f"impressions ({name}): cannot be read: {error}") from error
        self.bad.pop(name, None)
        if impressions is None:
            self.files.add(name)
        return impressions

    def _read(self, name: str) -> Impressions | None:
        got = self.tables.with_impressions(self.stream / name)
        if got is None:
            return None
        log, dropped = got
        schema = self.recipe.schema
        if self.recipe.train.pool and not log.labels[:, schema.drawn_task].all():
            raise DataError(
                f"impressions ({name}): has rows with {schema.tasks[schema.drawn_task].name} = 0, expected positives "
                "alone, as the run was trained on (train.pool)"
            )
        examples, users = read_examples(log, self.transform, self.recent)
        return Impressions(name, log, examples, dropped, users)

    def validate(
        self, found: Impressions, model: HSNN | None = None, state: IndexState | None = None
    ) -> list[dict[str, Any]]:
        """What the model says of impressions that it has not learnt from: NE and calibration by layer and task, NE over
        the base rate of the run that it began from. ``model`` and ``state``: another one, on the same items."""
        t = self.recipe.train
        batches = self._batches(unlabelled=0, power=0.0)
        values = pointwise(model or self.model, batches, found.examples, state or self.state, t.seed)
        tasks = [task.name for task in self.recipe.schema.tasks]
        return pointwise_report(values, self.rates, tasks)

    def learn(self, found: Impressions, progress: Callable[[int], object] = lambda _: None) -> list[str]:
        """One pass over the impressions, shuffled; ``progress`` is told the size of every batch. Returns warnings about
        the index. Raises Diverged."""
        t = self.recipe.train
        examples = found.examples
        hits = examples.item_row[examples.labels[:, self.recipe.schema.drawn_task] > 0]
        counts = self.items.item_counts + np.bincount(hits, minlength=len(self.items.item_keys))
        self.items = replace(self.items, item_counts=counts)
        batches = self._batches(t.unlabelled, t.negative_power)
        pools = make_pools(self.items, self.recipe, first_time=None)
        objective = Objective(self.model, batches, pools, examples, t, self.recipe.schema, teacher=None)
        joint = self.model.lti is not None and self.recipe.model.index == "joint"
        moment = Moment(t.max_alpha if joint else None, 1.0, self.warm)
        order = np.random.default_rng([t.seed, 5, len(self.files)]).permutation(len(examples))
        warnings: list[str] = []
        self.model.train()
        with deterministic(self.model.device):
            for start in range(0, len(order), t.batch_size):
                if self.step % t.refresh_steps == 0:
                    warnings = self._refresh(revive=True)
                rows = np.sort(order[start : start + t.batch_size])
                where = f"step {self.step + 1}, in {found.name}"
                gradient_step(self.optimizer, objective, rows, self.state, moment, self.step, where)
                self.step += 1
                progress(len(rows))
        self.model.eval()
        self.recent = extended(self.recent, found.log)
        return warnings

    def take(
        self, name: str, progress: Callable[[int], object] = lambda _: None
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """Read a file, predict it, then learn from it: the report on it (None without rows) and warnings.

        Raises DataError and FeatureError as `read`, and Diverged: the checkpoint is from before the file then."""
        found = self.read(name)
        if found is None:
            return None, []
        before = self.validate(found)
        try:
            warnings = self.learn(found, progress)
        except Diverged as error:
            raise Diverged(f"{error}; the checkpoint in {self.run} is from before that file") from None
        self.files.add(name)
        self.seen += len(found.examples)
        self.dropped += found.dropped
        self.users = found.users
        row = {
            "file": name, "impressions": len(found.examples), "dropped": found.dropped, "seen": self.seen,
            "step": self.step, "items": len(self.items.item_keys), "simulated": found.log.tables.simulated,
            "pointwise": before,
        }  # fmt: skip
        self.reports.append(row)
        return row, warnings

    def _batches(self, unlabelled: int, power: float) -> BatchMaker:
        negatives = self.recipe.train.negatives
        return BatchMaker(self.items, self.i2ifs, self.model.reads_interactions, negatives, unlabelled, power)

    # Checkpoints.

    def save(self) -> None:
        """Write the checkpoint, and before it the reports since the last one. Raises NotSaved when the disk refuses."""
        recent = {
            str(task): {name: torch.from_numpy(getattr(kept, name)) for name in ("group", "time", "item")}
            for task, kept in self.recent.items()
        }
        count = self.rows_reported + len(self.reports)
        follow = {
            "stream": str(self.stream), "base": self.base, "files": sorted(self.files), "bad": self.bad,
            "seen": self.seen, "dropped": self.dropped, "reports": count,
            "base_rates": torch.from_numpy(self.rates), "recent": recent,
            "counts": torch.from_numpy(self.items.item_counts),
        }  # fmt: skip
        state = {
            "schema_hash": self.recipe.schema.hash,
            "step": self.step,
            "finished": True,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "paths": torch.from_numpy(self.state.paths),
            "representative": torch.from_numpy(self.state.representative),
            "history": [],
            "corpus": {name: torch.from_numpy(np.array(a)) for name, a in self.items.to_arrays().items()},
            "follow": follow,
        }
        try:
            append_rows(self.run, self.reports)
            save_checkpoint(self.run / "checkpoint.pt", state)
        except OSError as error:
            raise NotSaved(
                f"the checkpoint after {len(self.files)} files could not be written to {self.run} ({error.strerror}); "
                "the one before is kept; make room and give the same command again"
            ) from error
        self.rows_reported, self.reports = count, []

    def _restore(self, saved: dict[str, Any], base: Path | None) -> None:
        follow = saved["follow"]
        for what, now, then in (
            ("stream", str(self.stream), follow["stream"]),
            ("run it began from", str(base.absolute()) if base else follow["base"], follow["base"]),
        ):
            if now != then:
                raise DataError(
                    f"run {self.run}: the {what} is {then}, got {now}; give that one, or another --run for a new "
                    "beginning"
                )
        self.base, self.files, self.bad = follow["base"], set(follow["files"]), dict(follow["bad"])
        self.seen, self.dropped = int(follow["seen"]), int(follow["dropped"])
        self.rows_reported = int(follow["reports"])
        keep_rows(self.run, self.rows_reported)
        if "base_rates" in follow:
            self.rates = follow["base_rates"].numpy()
        else:  # of an older release: of impressions, without the negatives drawn for them
            self.rates = follow["rates"].numpy() / (1 + self.recipe.train.negatives)
        lengths = history_tasks(self.recipe.schema)
        self.recent = {
            int(task): RecentPositives(
                kept["group"].numpy(), kept["time"].numpy(), kept["item"].numpy(), lengths[int(task)]
            )
            for task, kept in follow["recent"].items()
        }
        corpus = {name: array.numpy() for name, array in saved["corpus"].items()}
        schema = self.recipe.schema
        items = Encoded(corpus["dense"], corpus["ids"])
        attributes = ItemAttributes.from_arrays(schema, corpus)
        counts = follow["counts"].numpy()
        self._set_items(StreamItems(schema, self.transform, items, corpus["item_ids"], counts, attributes))


def _check_base(run: Path, base: Path | None) -> None:
    """What a new beginning needs: a finished run, and a folder that holds no other one."""
    if base is None:
        raise HsnnError(
            f"run {run}: does not follow a stream yet; say which finished run it begins from (--from)"
        )
    if run.absolute() == base.absolute():
        raise HsnnError(
            f"--run: got {run}, the run to begin from; expected a folder of its own, that one is kept"
        )
    if (run / "checkpoint.pt").exists():
        raise HsnnError(f"run {run}: holds another training; give a new folder (--run)")
    saved = load_checkpoint(base / "checkpoint.pt", load_recipe_of_run(base).schema)
    if "follow" in saved:
        raise HsnnError(f"run {base}: follows a stream itself; go on with it: --run {base}, without --from")
    if not saved.get("finished", False):
        raise HsnnError(f"run {base}: has not reached its last step; go on with: hsnn train --resume {base}")
