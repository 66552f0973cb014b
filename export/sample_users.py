"""Plausible users and ids without a data set: real keys in random combinations, for the parity gates and the smoke
request."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from hsnn_core.features import FeatureTransform, without_gaps
from hsnn_core.schema import KEY_MISSING, Feature, Schema


def sample_users(schema: Schema, transform: FeatureTransform, count: int, seed: int) -> dict[str, np.ndarray]:
    """Raw wire tensors of `count` users, by feature: dense (count, dim) float32 around the training mean,
    others (count, length) int64 keys that training knows, of random lengths. The first user has no keys at
    all (a new one), the last one full lists."""
    rng = np.random.default_rng(seed)
    layout = schema.layout("user")
    raw: dict[str, np.ndarray] = {}
    for slot in layout.dense_slots:
        mean = transform.dense_mean["user"][slot.start : slot.stop]
        std = transform.dense_std["user"][slot.start : slot.stop]
        raw[slot.feature.name] = rng.normal(mean, std, (count, slot.stop - slot.start)).astype(np.float32)
    for slot in layout.slots:
        keys = _keys(transform, slot.feature, (count, slot.feature.length), rng)
        lengths = rng.integers(0, slot.feature.length + 1, count)
        lengths[0], lengths[-1] = 0, slot.feature.length
        keys[np.arange(slot.feature.length) >= lengths[:, None]] = KEY_MISSING
        raw[slot.feature.name] = keys
    return raw


def _keys(
    transform: FeatureTransform, feature: Feature, shape: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    if feature.space in transform.vocabularies:
        known = transform.vocabularies[feature.space].keys
        return rng.choice(known, shape) if len(known) else np.zeros(shape, np.int64)
    return rng.integers(0, feature.size, shape)


def padded_at_the_end(schema: Schema, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Random inputs of a graph as a transform would give them: in the ids (..., S) of users, of items and of crossings
    the padding stands behind each feature's ids, never between them."""
    matches = np.cumsum([0, *(spec.matches for spec in schema.interactions)])
    columns = {
        f"{owner}_ids": [slice(slot.start, slot.stop) for slot in schema.layout(owner).slots]
        for owner in ("user", "item")
    } | {"cross_ids": [slice(start, stop) for start, stop in pairwise(matches)]}
    closed = dict(inputs)
    for name in columns.keys() & inputs.keys():
        ids = inputs[name].reshape(-1, inputs[name].shape[-1])
        parts = [without_gaps(ids[:, part]) for part in columns[name]]
        closed[name] = np.concatenate(parts, axis=1).reshape(inputs[name].shape)
    return closed
