"""Random trees and a small deterministic network, so that the core is tested without torch, ONNX or
Triton."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hsnn_core.features import Encoded
from hsnn_core.index import HierarchicalIndex
from hsnn_core.scorer import LayerScorer


class FakeRunner:
    """Fixed random weights; every pair is computed by itself, so its bits do not depend on the batch's shape.

    Logits are rounded to ``step``: a large step makes many ties.
    """

    def __init__(self, layers: int, tasks: int = 2, width: int = 3, step: float = 0.0, seed: int = 0) -> None:
        self.layers, self.tasks, self.width, self.step, self.seed = layers, tasks, width, step, seed
        self.calls: list[tuple[int, dict[str, np.ndarray]]] = []

    def _weights(self, key: str, *shape: int) -> np.ndarray:
        return np.random.default_rng([self.seed, *key.encode()]).normal(size=shape).astype(np.float32)

    def _mix(self, key: str, values: np.ndarray) -> np.ndarray:
        weights = self._weights(key, self.tasks, values.shape[-1])
        return (values[..., None, :] * weights).sum(axis=-1)

    def user_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        features = np.concatenate([value.astype(np.float32) for value in inputs.values()], axis=1)
        outputs = {}
        for layer in range(1, self.layers + 1):
            weights = self._weights(f"user{layer}", self.width + layer, features.shape[1])
            outputs[f"user_l{layer}"] = np.tanh((features[:, None, :] * weights).sum(axis=-1))
        return outputs

    def score(self, layer: int, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append((layer, inputs))
        monn = self._mix(f"user{layer}", inputs["user"])[:, None] * self._mix(f"item{layer}", inputs["item"])
        if "cross_dense" in inputs:
            monn = monn + self._mix(f"dense{layer}", inputs["cross_dense"])
        if "cross_ids" in inputs:
            monn = monn + self._mix(f"ids{layer}", (inputs["cross_ids"] % 7).astype(np.float32))
        logits = 0.5 * monn
        if "previous" in inputs:
            logits = logits + self._mix(f"previous{layer}", inputs["previous"])
        if self.step:
            logits = np.round(logits / self.step) * np.float32(self.step)
        return monn, logits


def random_index(rng: np.random.Generator, layers: int, items: int, codes: int = 3) -> HierarchicalIndex:
    """A tree whose nodes hold very different numbers of items."""
    item_ids = rng.choice(10 * items, size=items, replace=False).astype(np.int64) + 1
    paths = np.minimum(rng.geometric(0.5, size=(items, layers - 1)) - 1, codes - 1)
    return HierarchicalIndex.build(item_ids, paths, rng.integers(0, 4, size=paths.shape).astype(np.float32))


def random_embeddings(rng: np.random.Generator, index: HierarchicalIndex, width: int = 4) -> list[np.ndarray]:
    return [
        rng.normal(size=(index.nodes(layer), width + layer)).astype(np.float32)
        for layer in range(1, index.layers + 1)
    ]


def random_users(rng: np.random.Generator, batch: int, width: int = 5) -> Encoded:
    return Encoded(
        rng.normal(size=(batch, width)).astype(np.float32),
        rng.integers(2, 30, size=(batch, 2)).astype(np.int32),
    )


def one_user(users: Encoded, row: int) -> Encoded:
    return Encoded(users.dense[row : row + 1], users.ids[row : row + 1])


def fake_scorer(
    rng: np.random.Generator,
    index: HierarchicalIndex,
    step: float = 0.0,
    buckets: Sequence[Sequence[int]] | None = None,
    tasks: int = 2,
) -> tuple[LayerScorer, FakeRunner]:
    runner = FakeRunner(index.layers, tasks=tasks, step=step, seed=int(rng.integers(1 << 30)))
    return LayerScorer(index, None, random_embeddings(rng, index), runner, buckets), runner


def assert_same_result(ours, theirs) -> None:
    np.testing.assert_array_equal(ours.valid, theirs.valid)
    np.testing.assert_array_equal(ours.item_ids, theirs.item_ids)
    np.testing.assert_array_equal(ours.positions, theirs.positions)
    np.testing.assert_array_equal(ours.rank_score, theirs.rank_score)
    np.testing.assert_array_equal(ours.probabilities, theirs.probabilities)
