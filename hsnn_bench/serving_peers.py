"""One Triton repository with an exported HSNN and its peers, all answering the same request.

    hsnn_in_process, hsnn_bls   the run as it is served, its networks inside the orchestrator or called through Triton
    monn_flat                   a one-layer model of the run's recipe over the same items: every item is scored
    two_tower_flat              a one-layer two-tower as one serves it: its user tower, and Faiss for all inner products
    ebr_ivf, ebr_hnsw           the same with Faiss's approximate indices
    echo                        no retrieval at all

The one-layer models are trained once under ``<run>/peers``, in folders named by a hash of their recipes. In a simulated
world all of them may stand over a corpus that is grown (`scale`); over a large one there are no monn_flat, which takes
a second per request, and no ebr_hnsw, which takes an hour to build.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from export import pbtxt
from export.export_run import export_run
from export.exported import Exported, open_export
from export.open_items import open_items
from export.pbtxt import CONFIG_FILE, INDEX, ORCHESTRATOR, ServingOptions
from export.publish import publish
from export.repository import snapshot_models
from export.vendor import vendor
from hsnn_core.bundle import Bundle
from hsnn_core.errors import DataError, PublishError
from hsnn_core.files import write_bytes
from hsnn_core.manifest import MANIFEST
from hsnn_core.onnx_runner import OnnxRunner
from hsnn_train.checkpoint import Run
from hsnn_train.data.dataset import Dataset
from hsnn_train.recipe import Recipe

from .faiss_twin import Queries, flat_index, tuned_index
from .jobs import Job
from .ours import trained, variant
from .scale import build, export_over

SOURCES = Path(__file__).parent / "peer_models"
USER_TOWER = "user_tower.onnx"
VERSION = 1
TUNING_REQUESTS = 200
EBR_TARGET = 0.95
MOST_OF_ALL = 200_000  # items over which every peer is built
_FIT_USERS, _FIT_ITEMS, _FIT_TOLERANCE = 8, 64, 1e-3
_FAISS: dict[str, tuple[str, str | None]] = {  # name -> label, kind of approximate index
    "two_tower_flat": ("two-tower + Faiss, all items", None),
    "ebr_ivf": ("EBR: two-tower + Faiss IVF", "ivf"),
    "ebr_hnsw": ("EBR: two-tower + Faiss HNSW", "hnsw"),
}


@dataclass(frozen=True)
class Peer:
    """One model to ask.

    ``model``: its name in Triton; ``label``: for people; ``exported``: whose scores its answers are compared with
    (None: echo); ``settings``: of its search; ``networks``: Triton models to load before it; ``task``: the one it
    ranks by, None: all by their ranks; ``widths``: of its beam, None: its own."""

    model: str
    label: str
    exported: Exported | None
    settings: dict[str, Any]
    networks: tuple[str, ...] = ()
    task: int | None = None
    widths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Grown:
    """A corpus of ``items`` ads of the run's simulated world, kept under ``work`` as `scale` does."""

    items: int
    work: Path

    def over(self, run: Run, exported: Exported, name: str = "") -> Exported:
        """The networks of an export over it; ``name``: of the model, if it is not the HSNN."""
        work = self.work / name
        work.mkdir(parents=True, exist_ok=True)
        build(run, exported, self.items, work, ads=self.work / "items")
        return open_export(export_over(exported, self.items, work))


def build_peers(
    run: Run,
    dataset: Dataset,
    repository: Path,
    k: int,
    workers: int,
    widths: tuple[int, ...] | None,
    grown: Grown | None = None,
) -> list[Peer]:
    """Write all peers into ``repository`` (empty or new) and return them, in the order of the report.

    ``k``: items of a request; ``workers``: of the orchestrators; ``widths``: of the HSNN's beam, None: its own;
    ``grown``: the corpus, None: the run's own items. Raises PublishError when the run is not exported,
    DataError when the export's items are not the run's, or an inner product does not give a two-tower's logits.
    """
    exported = open_export(run.path)
    bundle = Bundle.open(exported.bundle, verify=False)
    if not np.array_equal(np.sort(bundle.index.item_ids), np.sort(run.item_ids)):
        raise DataError(
            f"{exported.path}: indexes {bundle.index.items:,} items, the run was trained on {len(run.item_ids):,} "
            "others; peers are built over the run's own, export the run again"
        )
    layers = run.recipe.model.layers
    every = grown is None or grown.items <= MOST_OF_ALL
    if grown is not None:
        exported = grown.over(run, exported)
    two_tower = _flat_export(
        run, dataset, "cpu_xs" if layers[-1].startswith("cpu_") else "two_tower_xs", grown
    )
    repository.mkdir(parents=True, exist_ok=True)
    options = ServingOptions(mode="in_process", workers=workers)
    peers = []
    snapshots = [("hsnn", exported, {"hsnn_in_process": "in_process", "hsnn_bls": "bls"})]
    if every:
        snapshots.append(("monn", _flat_export(run, dataset, layers[-1], grown), {"monn_flat": "in_process"}))
    for prefix, source, modes in snapshots:
        networks = _add_snapshot(repository, source, f"{prefix}_", modes, options)
        for model, mode in modes.items():
            peer = _peer_of(model, source, networks if mode == "bls" else (), layers)
            if widths is not None and prefix == "hsnn":
                peer = replace(peer, widths=widths, settings=peer.settings | {"widths": list(widths)})
            peers.append(peer)
    for name in _FAISS if every else list(_FAISS)[:2]:
        peers.append(_add_faiss(repository, two_tower, dataset, name, k))
    _add_sources(repository, "echo", "echo", bundle)
    peers.append(Peer("echo", "echo (floor of the server)", None, {}))
    return peers


def _peer_of(model: str, exported: Exported, networks: tuple[str, ...], layers: Sequence[str]) -> Peer:
    manifest = Bundle.open(exported.bundle, verify=False).manifest
    label = {
        "hsnn_in_process": f"HSNN ({', '.join(layers)}), in process",
        "hsnn_bls": f"HSNN ({', '.join(layers)}), BLS",
        "monn_flat": f"MoNN ({layers[-1]}), flat",
    }[model]
    return Peer(model, label, exported, {"nodes": manifest["nodes"], "widths": manifest["widths"]}, networks)


def flat_recipe(recipe: Recipe, preset: str) -> Recipe:
    """The recipe with one layer of that preset and no index."""
    single = {"model.layers": [preset], "model.codebooks": [], "model.columns": [], "model.index": "joint"}
    return variant(recipe, {**single, "search.widths": []})


def _flat_export(run: Run, dataset: Dataset, preset: str, grown: Grown | None) -> Exported:
    recipe = flat_recipe(run.recipe, preset)
    folder = Job(recipe, run.path / "peers", preset).folder
    flat = trained(recipe, dataset, folder)
    try:
        exported = open_export(folder)
    except PublishError:
        users, _ = dataset.requests("test", 64)
        exported = export_run(flat.path, users=users)
    return exported if grown is None else grown.over(flat, exported, preset)


def _add_snapshot(
    repository: Path, exported: Exported, prefix: str, modes: dict[str, str], options: ServingOptions
) -> tuple[str, ...]:
    """Publish an export and take the snapshot over under other names, so that several stand in one repository;
    ``modes``: orchestrators to make of it. Returns its networks' names, but for the item tower's: nobody asks it."""
    with tempfile.TemporaryDirectory(dir=repository.parent) as folder:
        published = Path(folder)
        version = publish(exported.path, published, options=options)
        models = snapshot_models(published, version)
        networks = [model for model in models if model not in (INDEX, ORCHESTRATOR)]
        names = {name: prefix + name.removeprefix("hsnn_") for name in networks}
        for name in networks:
            _take_over(published, name, version, repository, names[name], {})
        for model, mode in modes.items():
            target = _take_over(published, ORCHESTRATOR, version, repository, model, {"mode": mode})
            manifest = json.loads((target / "manifest.json").read_text())
            called = manifest["models"]
            called |= {
                "user_tower": names[called["user_tower"]],
                "item_tower": names[called["item_tower"]],
                "scorers": [names[scorer] for scorer in called["scorers"]],
            }
            write_bytes(target / "manifest.json", json.dumps(manifest, indent=1).encode())
    return tuple(name for old, name in names.items() if "item_tower" not in old)


def _take_over(
    source: Path, model: str, version: int, repository: Path, name: str, parameters: dict[str, str]
) -> Path:
    """Link a version's files and write its configuration under another name."""
    target = repository / name / str(VERSION)
    shutil.copytree(source / model / str(version), target, copy_function=os.link)
    config = pbtxt.parse((source / model / CONFIG_FILE).read_text(), model)
    config.name = name
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    write_bytes(repository / name / CONFIG_FILE, pbtxt.to_text(config).encode())
    return target


def _add_sources(repository: Path, name: str, source: str, bundle: Bundle) -> Path:
    """The Python model ``source`` of `peer_models`, with the tensors and parameters of an orchestrator."""
    target = repository / name / str(VERSION)
    target.mkdir(parents=True)
    vendor(target, SOURCES / source)
    config = pbtxt.orchestrator_config(bundle.schema, 1, bundle.manifest["k"], (), ServingOptions())
    config.name = name
    write_bytes(repository / name / CONFIG_FILE, pbtxt.to_text(config).encode())
    return target


def _add_faiss(repository: Path, two_tower: Exported, dataset: Dataset, name: str, k: int) -> Peer:
    label, kind = _FAISS[name]
    bundle = Bundle.open(two_tower.bundle, verify=False)
    target = _add_sources(repository, name, "ebr", bundle)
    _link(two_tower.path / USER_TOWER, target)
    for file in (MANIFEST, *bundle.manifest["files"]):
        _link(bundle.path / file, target)
    items = np.ascontiguousarray(bundle.embeddings[0], np.float32)
    # One inner product: of what ranks any item, not only items where another task has a label of 1.
    task = int(np.argmax(np.where(bundle.schema.given < 0, bundle.schema.rank, 0)))
    split = "valid" if len(dataset.valid) else "test"
    _, users = dataset.requests(split, TUNING_REQUESTS)
    tower = OnnxRunner(two_tower.path / USER_TOWER, [])
    packed = tower.user_tower(users.tensors("user"))["user_l1"]
    vectors = packed.reshape(len(packed), len(bundle.schema.tasks), -1)  # (R, T, d)
    if kind is None:
        index, settings = flat_index(items), dict[str, int]()
    else:
        query = Queries(np.ascontiguousarray(vectors[:, task]), _open_to_all(bundle))
        index, settings = tuned_index(kind, items, query, k, EBR_TARGET)
    scale, bias = _affine(bundle, two_tower, packed, vectors, items)
    faiss.write_index(index, str(target / "items.faiss"))
    search = {key: settings[key] for key in ("nprobe", "efSearch") if key in settings}
    facts = {"task": task, "search": search, "scale": scale.tolist(), "bias": bias.tolist()}
    write_bytes(target / "ebr.json", json.dumps(facts).encode())
    return Peer(name, label, two_tower, settings, task=task)


def _link(source: Path, folder: Path) -> None:
    """The file under its name in a folder; copied where that lies on another disk."""
    try:
        os.link(source, folder / source.name)
    except OSError:
        shutil.copyfile(source, folder / source.name)


def _open_to_all(bundle: Bundle) -> Callable[[slice], np.ndarray | None]:
    """What every request may get that says nothing of itself, as the candidates of `Queries`."""
    mask = open_items(bundle)
    return lambda part: None if mask is None else mask[None]


def _affine(
    bundle: Bundle, exported: Exported, packed: np.ndarray, vectors: np.ndarray, items: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """scale and bias (T,) by which <u_t, v> becomes the two-tower's logit, from what its exported scorer says."""
    rng = np.random.default_rng(0)
    users = min(len(packed), _FIT_USERS)
    rows = rng.integers(0, len(items), _FIT_ITEMS)
    inputs: dict[str, np.ndarray] = {
        "user": packed[:users],
        "item": np.broadcast_to(items[rows], (users, len(rows), items.shape[1])).copy(),
    }
    signature = next(graph.signature for graph in exported.graphs if graph.signature.stem == "scorer_l1")
    for spec in signature.inputs:  # crossings, which a two-tower ignores
        if spec.name not in inputs:
            dtype = np.int32 if spec.datatype == "INT32" else np.float32
            inputs[spec.name] = np.zeros(spec.shape(users, len(rows)), dtype)
    runner = OnnxRunner(exported.path / USER_TOWER, [exported.path / "scorer_l1.onnx"])
    _, logits = runner.score(1, inputs)  # (users, rows, T)
    products = np.einsum("rd,btd->brt", items[rows], vectors[:users])
    scale, bias = np.zeros(logits.shape[-1]), np.zeros(logits.shape[-1])
    for task in range(logits.shape[-1]):
        x, y = products[..., task].ravel(), logits[..., task].ravel()
        scale[task], bias[task] = np.polyfit(x, y, 1)
        apart = float(np.abs(scale[task] * x + bias[task] - y).max())
        if apart > _FIT_TOLERANCE:
            raise DataError(
                f"{exported.path}: an inner product gives the two-tower's logits but for {apart:.2g}, expected at "
                f"most {_FIT_TOLERANCE:g}; is its preset a dot product?"
            )
    return scale, bias
