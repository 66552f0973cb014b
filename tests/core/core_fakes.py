"""Random trees and a small deterministic network, so that the core is tested without torch, ONNX or
Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hsnn_core.bundle import Smoke, write_bundle
from hsnn_core.corpus import Corpus, build_corpus
from hsnn_core.features import Encoded, FeatureTransform
from hsnn_core.index import HierarchicalIndex
from hsnn_core.schema import KEY_MISSING, Schema
from hsnn_core.scorer import PAIRS_PER_CALL, LayerScorer
from hsnn_core.search import search


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

    def item_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        features = np.concatenate([(value % 13).astype(np.float32) for value in inputs.values()], axis=1)
        widths = {f"item_l{layer}": 4 + layer for layer in range(1, self.layers + 1)} | {"index": 3}
        return {
            name: np.tanh((features[:, None, :] * self._weights(name, width, features.shape[1])).sum(axis=-1))
            for name, width in widths.items()
        }

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


SMALL_SCHEMA: dict[str, Any] = {
    "name": "small",
    "keys": {"user": "user_id", "item": "item_id"},
    "tasks": [{"name": "click"}, {"name": "buy", "rank": 0.5}],
    "features": {
        "user": {
            "age": {"kind": "dense", "dim": 2},
            "country": {"kind": "sparse", "vocab": 10, "type": "string"},
            "history": {"kind": "sequence", "of": "item", "length": 6},
        },
        "item": {
            "item": {"kind": "sparse", "of": "item"},
            "category": {"kind": "sparse", "vocab": 8, "max": 3},
            "price": {"kind": "dense"},
        },
    },
    "interactions": {
        "topics": {"user": "history", "item": "category", "matches": 2},
        "seen": {"user": "history", "item": "item"},
        "near": {"user": "history", "item": "item", "fade": 0.5, "nodes": "members"},
    },
}


@dataclass
class World:
    """A schema, a fitted transform and raw tables of V items and R users."""

    schema: Schema
    transform: FeatureTransform
    item_keys: np.ndarray
    item_raw: dict[str, np.ndarray]
    user_raw: dict[str, np.ndarray]
    codebooks: list[np.ndarray]
    projection: list[tuple[np.ndarray, np.ndarray]]
    runner: FakeRunner

    def corpus(self, **changes) -> Corpus:
        arguments = {
            "items": self.transform.encode_items(self.item_raw),
            "item_ids": self.item_keys,
            "item_tower": self.runner.item_tower,
            "codebooks": self.codebooks,
            "codeword_projection": self.projection,
        } | changes
        return build_corpus(self.schema, self.transform, **arguments)


def small_world(
    layers: int = 3,
    items: int = 30,
    users: int = 4,
    interactions: bool | dict[str, Any] = True,
    **changes,
) -> World:
    """``interactions``: the schema's own (True), none (False), or those given beside its own; ``changes``: sections of
    the schema."""
    rng = np.random.default_rng(7)
    own = SMALL_SCHEMA["interactions"] if interactions else {}
    more = interactions if isinstance(interactions, dict) else {}
    schema = Schema.from_dict(SMALL_SCHEMA | {"interactions": own | more} | changes)
    item_keys = rng.permutation(10 * items)[:items].astype(np.int64)

    def keys(values: np.ndarray, missing: float) -> np.ndarray:
        gone = np.sort(rng.random(values.shape) < missing, axis=1)
        return np.where(gone, KEY_MISSING, values).astype(np.int64)

    item_raw = {
        "item": item_keys[:, None],
        "category": keys(rng.integers(0, 6, size=(items, 3)), 0.4),
        "price": rng.normal(size=(items, 1)).astype(np.float32),
    }
    user_raw = {
        "age": rng.normal(size=(users, 2)).astype(np.float32),
        "country": keys(rng.integers(0, 5, size=(users, 1)), 0.2),
        "history": keys(rng.choice(item_keys, size=(users, 6)), 0.5),
    }
    return World(
        schema,
        FeatureTransform.fit(schema, user_raw, item_raw, item_keys),
        item_keys,
        item_raw,
        user_raw,
        [rng.normal(size=(4, 3)).astype(np.float32) for _ in range(layers - 1)],
        [
            (rng.normal(size=(3, 4 + n)).astype(np.float32), rng.normal(size=4 + n).astype(np.float32))
            for n in range(1, layers)
        ],
        FakeRunner(layers),
    )


def write_small_bundle(directory: Path, world: World) -> dict:
    """What tests/core/golden/bundle_v1 was made with: small_world() at format version 1."""
    corpus = world.corpus()
    scorer = LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, world.runner)
    users = world.transform.encode_users(world.user_raw)
    rank = np.array([task.rank for task in world.schema.tasks])
    result = search(corpus.index, scorer, users, [2, 3], 5, rank)
    return write_bundle(
        directory,
        world.schema,
        world.transform,
        corpus,
        Smoke(world.user_raw, result.item_ids, result.probabilities),
        widths=[2, 3],
        k=5,
        max_k=20,
        buckets=[[4], [8, 16], []],
        engine="onnxruntime",
        models={
            "user_tower": "hsnn_user_tower",
            "item_tower": "hsnn_item_tower",
            "scorers": ["hsnn_scorer_l1", "hsnn_scorer_l2", "hsnn_scorer_l3"],
        },
    )


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
    pairs_per_call: int = PAIRS_PER_CALL,
) -> tuple[LayerScorer, FakeRunner]:
    runner = FakeRunner(index.layers, tasks=tasks, step=step, seed=int(rng.integers(1 << 30)))
    embeddings = random_embeddings(rng, index)
    return LayerScorer(index, None, embeddings, runner, buckets, pairs_per_call), runner


def assert_same_result(ours, theirs) -> None:
    np.testing.assert_array_equal(ours.valid, theirs.valid)
    np.testing.assert_array_equal(ours.item_ids, theirs.item_ids)
    np.testing.assert_array_equal(ours.positions, theirs.positions)
    np.testing.assert_array_equal(ours.rank_score, theirs.rank_score)
    np.testing.assert_array_equal(ours.probabilities, theirs.probabilities)
