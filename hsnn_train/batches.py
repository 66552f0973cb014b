"""From examples to batches: sampled candidates, representatives and I2IF crossings, all by the code that serves.

Everything random is a function of (seed, step), so a resumed run draws what an uninterrupted one would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hsnn_core.features import Encoded, FeatureTransform
from hsnn_core.i2if import I2IF, Crossings
from hsnn_core.index import HierarchicalIndex
from hsnn_core.schema import Schema
from hsnn_train.data.dataset import Examples

from .hsnn import HSNN, Batch, NodeBatch, Pairs, Sides
from .negatives import CandidateSampler, had_appeared


@dataclass(frozen=True)
class IndexState:
    """The hard index as of the last refresh, in item-table rows.

    paths (V, N-1) int32: codes of each item; representative (N-1, V) int32: row of the representative of the
    item's node, per index layer.
    """

    paths: np.ndarray
    representative: np.ndarray

    @staticmethod
    def from_index(index: HierarchicalIndex, paths: np.ndarray) -> IndexState:
        """The rows' view of an index built from ``paths`` (V, N-1) in the same row order."""
        rows = len(paths)
        representative = np.empty((index.layers - 1, rows), np.int32)
        for layer in range(1, index.layers):
            of_position = index.representative[layer - 1][index.ancestors(layer)]
            representative[layer - 1, index.row_of_position] = index.row_of_position[of_position]
        return IndexState(np.ascontiguousarray(paths, dtype=np.int32), representative)


class ItemTable(Protocol):
    """What batches read of the items (V rows) of a data set or of a stream: see `Dataset` for the fields."""

    @property
    def schema(self) -> Schema: ...
    @property
    def transform(self) -> FeatureTransform: ...
    @property
    def items(self) -> Encoded: ...
    @property
    def folds(self) -> Sequence[Encoded]: ...
    @property
    def item_keys(self) -> np.ndarray: ...
    @property
    def item_counts(self) -> np.ndarray: ...


class BatchMaker:
    """Makes `Batch`es of a data set or a stream.

    Args:
        dataset: its items, already encoded.
        i2ifs: crossings with forward lists in item-table row order: those of every fold of the data set, then those
            that serve; empty without interactions.
        reads: of each of the N layers, whether it reads crossings; none are looked up for the others.
        negatives, unlabelled: sampled candidates per example, with label 0 and without label.
        power: see `CandidateSampler`.
        first_time: (V,) int64 time of the item's first impression, where a negative has to have existed at the time of
            the impression it is drawn for; None where the catalogue stands still.
    """

    def __init__(
        self,
        dataset: ItemTable,
        i2ifs: Sequence[I2IF],
        reads: Sequence[bool],
        negatives: int,
        unlabelled: int,
        power: float,
        first_time: np.ndarray | None = None,
    ) -> None:
        self.first_time = first_time
        self.items = dataset.items
        self.i2ifs = i2ifs
        self.reads = tuple(reads)
        self.layers = len(self.reads)
        self.negatives = negatives
        self.unlabelled = unlabelled
        self.of_seen = CandidateSampler(dataset.item_counts, power, everything=False)
        self.of_all = CandidateSampler(dataset.item_counts, power, everything=True)
        self.schema = dataset.schema
        self.tasks = len(self.schema.tasks)

    def make(
        self, examples: Examples, rows: np.ndarray, state: IndexState, rng: np.random.Generator
    ) -> Batch:
        """The batch of examples ``rows`` (B,): candidate 0 is the impression's own item, then the sampled."""
        own = examples.item_row[rows]
        negatives = self.of_seen.draw((len(rows), self.negatives), rng)
        unlabelled = self.of_all.draw((len(rows), self.unlabelled), rng)
        sampled = np.concatenate([negatives, unlabelled], axis=1)
        candidates = np.concatenate([own[:, None], sampled], axis=1)  # (B, C)
        labels = np.zeros((*candidates.shape, self.tasks), np.float32)
        labels[:, 0] = examples.labels[rows]
        labelled = np.zeros(candidates.shape, np.float32)
        labelled[:, : 1 + self.negatives] = 1.0
        labelled[:, 1:] *= sampled != own[:, None]  # a draw of the positive itself is no negative
        exists = had_appeared(self.first_time, examples, rows, sampled)
        if exists is not None:
            labelled[:, 1:] *= exists
        users = users_of(examples, rows)
        return self.assemble(users, candidates, state, labels, labelled, examples.fold[rows])

    def assemble(
        self,
        users: Encoded,
        candidates: np.ndarray,
        state: IndexState,
        labels: np.ndarray,
        labelled: np.ndarray,
        fold: np.ndarray,
    ) -> Batch:
        """Batch of users (B rows) and candidate item rows (B, C)."""
        distinct, of = np.unique(candidates, return_inverse=True)
        pairs = self.pairs(users, distinct, of.reshape(candidates.shape), state, labels, labelled, fold)
        return Batch(self.sides(users, distinct, state), pairs)

    def sides(self, users: Encoded, rows: np.ndarray, state: IndexState) -> Sides:
        """B users and the distinct items ``rows`` (R,), ascending, with their representatives."""
        nodes = []
        for layer in range(self.layers - 1):
            found, of = np.unique(state.representative[layer][rows], return_inverse=True)
            dense, ids = self.items.dense[found], self.items.ids[found]
            nodes.append(NodeBatch(as_tensor(dense), as_tensor(ids), torch.from_numpy(of.reshape(-1))))
        return Sides(
            user_dense=as_tensor(users.dense),
            user_ids=as_tensor(users.ids),
            rows=rows,
            item_dense=as_tensor(self.items.dense[rows]),
            item_ids=as_tensor(self.items.ids[rows]),
            nodes=tuple(nodes),
            paths=torch.from_numpy(state.paths[rows].astype(np.int64)),
        )

    def pairs(
        self,
        users: Encoded,
        rows: np.ndarray,
        of: np.ndarray,
        state: IndexState,
        labels: np.ndarray,
        labelled: np.ndarray,
        fold: np.ndarray,
    ) -> Pairs:
        """The pairs of users (B rows) and items ``rows[of]`` (B, C), with the crossings of the node of every layer that
        reads them by the forward lists of the users' folds (B,), -1 for those that serve."""
        candidates = rows[of]
        cross_dense: list[Tensor | None] = [None] * self.layers
        cross_ids: list[Tensor | None] = [None] * self.layers
        if self.i2ifs and any(self.reads):
            stand_ins = [*(state.representative[layer] for layer in range(self.layers - 1)), None]
            reading = [layer for layer, reads in enumerate(self.reads) if reads]
            of_layers = self._crossings(users.ids, candidates, [stand_ins[layer] for layer in reading], fold)
            for layer, found in zip(reading, of_layers):
                cross_dense[layer] = torch.from_numpy(found.dense)
                cross_ids[layer] = torch.from_numpy(found.ids)
        return Pairs(
            of=torch.from_numpy(np.ascontiguousarray(of, dtype=np.int64)),
            cross_dense=tuple(cross_dense),
            cross_ids=tuple(cross_ids),
            labels=torch.from_numpy(labels),
            labelled=torch.from_numpy(labelled),
        )

    def _crossings(
        self,
        user_ids: np.ndarray,
        candidates: np.ndarray,
        stand_ins: Sequence[np.ndarray | None],
        fold: np.ndarray,
    ) -> list[Crossings]:
        """Per layer of users (B, S) with what stands in there for candidates (B, C), each user by its fold's lists.
        ``stand_ins``: (V,) int32 row of the representative of every item's node; None for the items themselves."""
        out: list[Crossings] = []
        for number in np.unique(fold):
            rows = np.flatnonzero(fold == number)
            i2if = self.i2ifs[number]
            of_items = i2if.query(user_ids[rows])
            found = []
            for stand_in in stand_ins:
                if stand_in is None:
                    found.append(i2if.probe(of_items, candidates[rows]))
                    continue
                query = i2if.query_of_nodes(of_items, stand_in.__getitem__)
                found.append(i2if.probe(query, stand_in[candidates[rows]]))
            if len(rows) == len(user_ids):
                return found
            if not out:
                out = [
                    Crossings(*(np.empty((len(user_ids), *part.shape[1:]), part.dtype) for part in crossings))
                    for crossings in found
                ]
            for whole, part in zip(out, found):
                whole.dense[rows], whole.ids[rows] = part
        return out


def users_of(examples: Examples, rows: np.ndarray) -> Encoded:
    """The encoded users of examples ``rows`` (B,)."""
    return Encoded(examples.users.dense[rows], examples.users.ids[rows])


def as_tensor(values: np.ndarray) -> Tensor | None:
    """A tensor of a packed feature array; None when it has no columns. Memory-mapped views are copied."""
    return torch.from_numpy(np.require(values, requirements=["C", "W"])) if values.shape[1] else None


def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits its examples, int64 (S,)."""
    return np.random.default_rng([seed, 1, epoch]).permutation(examples)


def held_share(model: HSNN, held: float) -> float:
    """The share of users that ``train.held`` holds for this model: none where the item layer is two towers, on top of
    which nothing learns what they say."""
    return held if model.layer(model.layers).over is not None else 0.0


def held_out(user_key: np.ndarray, share: float) -> np.ndarray:
    """(S,) bool: whether impressions of users (S,) int64 are among the ``share`` of users held out; the same in every
    process."""
    mixed = (user_key.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    of_user: np.ndarray = (mixed >> np.uint64(40)) < np.uint64(share * 2**24)
    return of_user


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The generator of everything sampled in one step."""
    return np.random.default_rng([seed, 2, step])
