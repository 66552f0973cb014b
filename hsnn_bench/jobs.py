"""One training with its evaluation: where it is kept, whether it is done, what it is expected to cost.

A job's folder is named after what is trained, not after the table that asks for it, so rows that two tables share are
trained once. What only calibration and evaluation read (`CALIBRATION_ONLY`, `EVALUATION_ONLY`) is left out of the name:
the model that is there is calibrated and evaluated anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hsnn_core.files import write_bytes
from hsnn_train.ensemble import calibrated_as
from hsnn_train.recipe import Recipe

from .model_flops import model_flops

#: Entries of a recipe that training and calibration never read; a test trains twice to see that it is so.
EVALUATION_ONLY = ("search.widths", "search.k", "search.max_k", "search.requests")
#: Entries that calibration alone reads.
CALIBRATION_ONLY = ("train.order",)
AFTER_TRAINING = (*EVALUATION_ONLY, *CALIBRATION_ONLY)

DONE, METRICS, CHECKPOINT, JOB, LOG = "done.json", "metrics.json", "checkpoint.pt", "job.json", "worker.log"

# For the first guess of a job's cost; none need be right: the items, the share of them that an index leaves to be
# scored, training examples per evaluation request, and what a layer costs beside its matrix products, in FLOPs per
# example.
NOMINAL_ITEMS = 10_000
NOMINAL_SHARE = 0.25
EXAMPLES_PER_REQUEST = 200
LAYER_OVERHEAD = 2e6


def key(recipe: Recipe, work: Path, without: tuple[str, ...] = ()) -> str:
    """Hash of the whole recipe, the named entries left out: 12 hex digits, the same in every process, and after a
    checkout has moved together with its ``work``: paths count from there."""
    raw = recipe.to_dict()
    raw["base"] = os.path.relpath(raw["base"], work.resolve())
    if raw["train"]["teacher"]:
        raw["train"]["teacher"] = os.path.relpath(raw["train"]["teacher"], work.resolve())
    for path in without:
        section, entry = path.split(".")
        del raw[section][entry]
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:12]


def evaluation_key(recipe: Recipe, work: Path) -> str:
    """`key`, and how models are calibrated before they are evaluated."""
    return f"{key(recipe, work, CALIBRATION_ONLY)}-{calibrated_as(recipe.train.order)}"


@dataclass(frozen=True)
class Job:
    """A recipe (its seed in it) to be trained under ``work``; ``label`` is for people."""

    recipe: Recipe
    work: Path
    label: str

    @property
    def folder(self) -> Path:
        """The run directory: runs/bench/beauty/cpu_s+cpu_xs-joint-s1-0123456789ab."""
        model, seed = self.recipe.model, self.recipe.train.seed
        name = f"{'+'.join(model.layers)}-{model.index}-s{seed}-{key(self.recipe, self.work, AFTER_TRAINING)}"
        return self.work / self.recipe.name / name

    @property
    def model_key(self) -> str:
        """The same for all seeds of a model."""
        return key(self.recipe, self.work, (*AFTER_TRAINING, "train.seed"))

    def record(self) -> dict[str, Any] | None:
        """What the worker left when it was done ({"evaluated", "commit", "minutes"}), None when it is not done, or was
        evaluated otherwise than this recipe and this release say."""
        try:
            found: dict[str, Any] = json.loads((self.folder / DONE).read_text())
        except (OSError, ValueError):
            return None
        whole = found.get("evaluated") == evaluation_key(self.recipe, self.work)
        return found if whole and (self.folder / METRICS).exists() else None

    def metrics(self) -> dict[str, Any] | None:
        """Its metrics; None when it is not done."""
        if self.record() is None:
            return None
        found: dict[str, Any] = json.loads((self.folder / METRICS).read_text())
        return found

    def prepare(self) -> None:
        """Write the folder's job.json, which tells the worker what to do."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.folder / JOB, (json.dumps(self.recipe.to_dict(), indent=1) + "\n").encode())

    def prior(self) -> float:
        """Expected cost in no unit: FLOPs of training per example and of evaluation, counted on the recipe's schema."""
        t, flops = self.recipe.train, model_flops(self.recipe)
        layers = len(flops.pairs)
        pairs = 1 + t.negatives + t.unlabelled
        training = 3 * (flops.user + pairs * (flops.item + flops.pair)) + layers * LAYER_OVERHEAD
        scored = NOMINAL_ITEMS * (1.0 if layers == 1 else NOMINAL_SHARE)
        return training + scored * flops.pairs[-1] / EXAMPLES_PER_REQUEST


def expected_minutes(jobs: Sequence[Job], done: Sequence[tuple[Job, float]]) -> list[float] | None:
    """Expected minutes of each job; None before the first duration is known.

    ``done``: finished jobs with their measured minutes. A job is expected to take what other seeds of the same model
    took, else its prior, scaled by what the finished jobs took relative to theirs.
    """
    if not done:
        return None
    measured: dict[str, list[float]] = {}
    for job, minutes in done:
        measured.setdefault(job.model_key, []).append(minutes)
    scale = sum(minutes for _, minutes in done) / sum(job.prior() for job, _ in done)
    return [
        fmean(measured[job.model_key]) if job.model_key in measured else scale * job.prior() for job in jobs
    ]
