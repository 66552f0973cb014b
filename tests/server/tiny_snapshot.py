"""A snapshot small enough to reason about: 60 items, 3 layers, 2 tasks, hand-made networks, a real bundle.

``write_snapshot`` lays it out as a model repository: <root>/hsnn_retrieve/<version>/ and the networks beside.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tiny_networks import FLOAT, INT, WIDTH, scorer_inputs, write_scorer, write_user_tower
from tritonclient.grpc import model_config_pb2 as pb

import hsnn_core
from clients.encode import UserEncoder
from hsnn_core.bundle import Bundle, Smoke, write_bundle
from hsnn_core.corpus import Corpus, build_corpus
from hsnn_core.features import FeatureTransform
from hsnn_core.item_attributes import ItemAttributes
from hsnn_core.onnx_runner import OnnxRunner
from hsnn_core.schema import Schema, encode_row_values
from hsnn_core.schema_eligibility import WireTensor
from hsnn_core.search import SearchResult, search

ORCHESTRATOR = Path(__file__).parents[2] / "model_repository" / "hsnn_retrieve"


@contextmanager
def orchestrator_modules(*names: str) -> Iterator[SimpleNamespace]:
    """Modules of the orchestrator by name: they are no package, and are imported as Triton's stub does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ORCHESTRATOR), *sys.path])
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


ITEMS, LAYERS, EMBEDDING, WIDTHS, K, MAX_K = 60, 3, 6, (3, 6), 10, 100
SCHEMA = {
    "name": "tiny",
    "keys": {"user": "user_id", "item": "item_id"},
    "tasks": [{"name": "click"}, {"name": "conversion", "rank": 0.5}],
    "features": {
        "user": {
            "age": {"kind": "dense", "default": 30.0},
            "country": {"kind": "sparse", "vocab": 20, "type": "string"},
            "history": {"kind": "sequence", "of": "item", "length": 5},
        },
        "item": {
            "item": {"kind": "sparse", "of": "item"},
            "category": {"kind": "sparse", "vocab": 10, "max": 3},
            "price": {"kind": "dense"},
        },
    },
    "interactions": {
        "topics": {"user": "history", "item": "category", "matches": 2},
        "seen": {"user": "history", "item": "item", "matches": 1},
        "led": {"user": "history", "via": "category", "item": "category", "fade": 0.5},
    },
}
_TYPES = {
    FLOAT: pb.TYPE_FP32,
    INT: pb.TYPE_INT32,
    "FP32": pb.TYPE_FP32,
    "FP64": pb.TYPE_FP64,
    "INT64": pb.TYPE_INT64,
}


def tiny_users() -> list[dict[str, Any]]:
    """Eight users, each a dict of features as a client gives it; some features are missing or unknown."""
    ids = item_ids()
    users: list[dict[str, Any]] = [
        {
            "age": 20.0 + 3 * row,
            "country": ["IT", "DE", "JP"][row % 3],
            "history": ids[row : row + 4].tolist(),
        }
        for row in range(6)
    ]
    return [*users, {"age": 51.0, "country": "nowhere", "history": [-5, 7]}, {}]


def item_ids() -> np.ndarray:
    return np.arange(ITEMS, dtype=np.int64) * 7 + 1000


@dataclass(frozen=True)
class TinySnapshot:
    """Paths and contents of what ``write_snapshot`` wrote."""

    root: Path
    version: int
    schema: Schema

    @property
    def version_directory(self) -> Path:
        return self.root / "hsnn_retrieve" / str(self.version)

    @property
    def user_tower(self) -> Path:
        return self.root / "hsnn_user_tower" / str(self.version) / "model.onnx"

    @property
    def scorers(self) -> list[Path]:
        return [
            self.root / f"hsnn_scorer_l{layer}" / str(self.version) / "model.onnx"
            for layer in range(1, LAYERS + 1)
        ]

    @cached_property
    def bundle(self) -> Bundle:
        return Bundle.open(self.version_directory)

    @property
    def index(self) -> Any:
        return self.bundle.index

    @cached_property
    def users(self) -> dict[str, np.ndarray]:
        """The raw wire tensors of ``tiny_users``."""
        return UserEncoder(self.schema).encode(tiny_users())

    def offline(self, rows: Any = slice(None), widths: Sequence[int] = WIDTHS, k: int = K) -> SearchResult:
        """The search over ONNX Runtime, without any server."""
        users = self.bundle.transform.encode_users({name: value[rows] for name, value in self.users.items()})
        scorer = self.bundle.scorer(OnnxRunner(self.user_tower, self.scorers))
        return search(self.index, scorer, users, widths, k, self.schema.rank)


def write_snapshot(
    root: Path,
    version: int,
    seed: int = 0,
    schema: Schema | None = None,
    attributes: ItemAttributes | None = None,
) -> TinySnapshot:
    """Networks and orchestrator of one snapshot; ``schema``: SCHEMA with eligibility, of which the items have
    ``attributes`` in the order of `item_ids`.

    hsnn_core is linked, not copied: in a test's own process it is imported only once.
    """
    schema = schema or Schema.from_dict(SCHEMA)
    snapshot = TinySnapshot(root, version, schema)
    rng = np.random.default_rng(seed)
    raw_items = _raw_items(schema)
    raw_users = UserEncoder(schema).encode(tiny_users()[:6])
    transform = FeatureTransform.fit(schema, raw_users, raw_items, item_ids())
    codebooks = [rng.normal(size=(4, EMBEDDING)).astype(np.float32) for _ in range(LAYERS - 1)]
    vectors = rng.normal(size=(ITEMS + 2, EMBEDDING)).astype(np.float32)

    def item_tower(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = vectors[inputs["item_ids"][:, 0]]
        return {"index": rows} | {f"item_l{layer}": rows * layer for layer in range(1, LAYERS + 1)}

    corpus = build_corpus(
        schema, transform, transform.encode_items(raw_items), item_ids(), item_tower, codebooks, []
    ).with_attributes(attributes)
    _write_networks(snapshot, corpus, seed)
    write_bundle(
        snapshot.version_directory,
        schema,
        transform,
        corpus,
        Smoke(raw_users, np.zeros((6, K), np.int64), np.zeros((6, K, 2), np.float32)),
        widths=WIDTHS,
        k=K,
        max_k=MAX_K,
        buckets=[[], [8, 16], [16, 32]],
        engine="onnxruntime",
        models={
            "user_tower": "hsnn_user_tower",
            "item_tower": "hsnn_item_tower",
            "scorers": [f"hsnn_scorer_l{layer}" for layer in range(1, LAYERS + 1)],
        },
    )
    for source in ORCHESTRATOR.glob("*.py"):
        shutil.copy(source, snapshot.version_directory)
    (snapshot.version_directory / "hsnn_core").symlink_to(Path(hsnn_core.__file__).parent)
    return snapshot


def orchestrator_parameters(schema: Schema) -> dict[str, str]:
    return {
        "schema": schema.to_json(),
        "schema_hash": schema.hash,
        "mode": "bls",
        "k": str(K),
        "widths": ",".join(map(str, WIDTHS)),
        "workers": "4",
        "queue": "64",
        "item_log": ".items/log.db",
    }


def write_configs(root: Path, schema: Schema, models: dict[str, dict[str, str]]) -> None:
    """config.pbtxt of networks and orchestrators; ``models``: name -> what differs from the usual."""
    layout = schema.layout("user")
    tower = {"user_dense": (FLOAT, layout.dense_width), "user_ids": (INT, layout.ids_width)}
    outputs = {f"user_l{layer}": (FLOAT, WIDTH) for layer in range(1, LAYERS + 1)}
    _write_config(root, "hsnn_user_tower", "onnxruntime", tower, outputs)
    tasks = len(schema.tasks)
    for layer in range(1, LAYERS + 1):
        answers = dict.fromkeys(("monn", "logits"), (FLOAT, -1, tasks))
        # So few that every message is computed in pieces.
        _write_config(
            root, f"hsnn_scorer_l{layer}", "onnxruntime", _scorer_inputs(layer, schema), answers,
            {"pairs_per_call": "8"},
        )  # fmt: skip
    inputs = {tensor.name: (tensor.datatype, *tensor.shape) for tensor in schema.user_wire()}
    answers = {
        "item_ids": ("INT64", -1),
        "probabilities": ("FP32", -1, tasks),
        "rank_score": ("FP32", -1),
        "valid": (INT, 1),
        "stage_us": ("INT64", LAYERS + 2),
    }
    for name, changed in models.items():
        _write_config(
            root,
            name,
            "python",
            inputs,
            answers,
            orchestrator_parameters(schema) | changed,
            schema.context_wire(),
        )


def _write_config(
    root: Path,
    name: str,
    backend: str,
    inputs: dict[str, tuple],
    outputs: dict[str, tuple],
    parameters: dict[str, str] | None = None,
    optional: Sequence[WireTensor] = (),
) -> None:
    config = pb.ModelConfig(name=name, backend=backend, max_batch_size=64)
    config.version_policy.latest.num_versions = 2
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    for add, tensors in ((config.input.add, inputs), (config.output.add, outputs)):
        for tensor, (kind, *dims) in tensors.items():
            add(name=tensor, data_type=_TYPES[kind], dims=dims)
    for wire in optional:
        config.input.add(
            name=wire.name, data_type=_TYPES[wire.datatype], dims=wire.shape, optional=True,
            allow_ragged_batch=True,
        )  # fmt: skip
    if backend == "python":
        config.dynamic_batching.SetInParent()
    for key, value in (parameters or {}).items():
        config.parameters[key].string_value = value
    (root / name / "config.pbtxt").write_text(text_format.MessageToString(config))


def _write_networks(snapshot: TinySnapshot, corpus: Corpus, seed: int) -> None:
    layout = snapshot.schema.layout("user")
    write_user_tower(snapshot.user_tower, layout.dense_width, layout.ids_width, LAYERS, seed)
    for layer, path in enumerate(snapshot.scorers, start=1):
        write_scorer(path, _scorer_inputs(layer, snapshot.schema), len(snapshot.schema.tasks), seed + layer)


def _scorer_inputs(layer: int, schema: Schema) -> dict[str, tuple]:
    pairs = schema.interactions
    return scorer_inputs(
        layer, len(schema.tasks), EMBEDDING, 3 * len(pairs), sum(pair.matches for pair in pairs)
    )


def _raw_items(schema: Schema) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    rows = [
        {"item": int(key), "category": rng.integers(0, 9, 2).tolist(), "price": float(rng.uniform(1, 9))}
        for key in item_ids()
    ]
    return {
        feature.name: np.stack([encode_row_values(feature, row[feature.name]) for row in rows])
        for feature in schema.item_features
    }
