"""Soft labels of a stronger, already trained model for the unlabelled pairs (paper Eq. 2)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hsnn_train.data.dataset import Dataset

from .batches import BatchMaker, users_of
from .checkpoint import check_inputs, load_run
from .device import moved


class Teacher:
    """A trained run that scores the pairs of a student's batch.

    It may have other layers and presets, and it has an index of its own: pairs are scored with *its* nodes,
    representatives and codes. Schema and data must be the student's, or the same ids would mean other things.
    """

    def __init__(self, path: Path, dataset: Dataset, student: BatchMaker, device: torch.device) -> None:
        check_inputs(path, dataset.schema, dataset.transform, dataset.items, dataset.item_keys)
        run = load_run(path)
        self.model, self.state, self.examples = run.model.eval().to(device), run.index, dataset.train
        self.batches = BatchMaker(dataset, student.i2ifs, run.model.reads_interactions, 0, 0, 0.0)

    @torch.no_grad()
    def logits(self, rows: np.ndarray, candidates: np.ndarray) -> Tensor:
        """Item-level logits (B, C, T) of training examples ``rows`` (B,) and item-table rows ``candidates`` (B, C)."""
        unlabelled = np.zeros(candidates.shape, np.float32)
        labels = np.zeros((*candidates.shape, self.model.tasks), np.float32)
        users = users_of(self.examples, rows)
        batch = self.batches.assemble(
            users, candidates, self.state, labels, unlabelled, self.examples.fold[rows]
        )
        out: Tensor = self.model(moved(batch, self.model.device), None).logits[-1]
        return out
