"""Kinds of files that HSNN writes: bundles, exports, item logs, checkpoints, a server's state."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from export.exported import open_export
from export.pbtxt import ServingOptions
from export.publish import model_configs
from hsnn_core.arrayfile import open_arrays
from hsnn_core.bundle import Bundle
from hsnn_core.files import file_sha256
from hsnn_core.item_log import ItemLog, LogReader
from hsnn_core.item_updates import Update, parse_update
from hsnn_core.manifest import ITEM_TOWER, MANIFEST, read_manifest
from hsnn_core.onnx_runner import OnnxRunner
from hsnn_core.schema import Schema
from hsnn_core.search import search

from .fuzz_bytes import mutated, mutated_json
from .fuzz_kind import Invalid, Kind

# Bundles and exports


def _make_bundle(name: str) -> Callable[[Path, Path], Path]:
    def make(folder: Path, run: Path) -> Path:
        shutil.copytree(run / "export", folder / "export")
        return folder / "export" / ("bundle" if name != "export.json" else "") / name

    return make


def _read_bundle(path: Path, good: bytes) -> None:
    """Every byte is covered by a sha256 of the manifest, so any change must be refused."""
    Bundle.open(path.parent, verify=True)
    raise Invalid("a file that is not what the manifest says")


def _read_manifest(path: Path, good: bytes) -> None:
    """The manifest proves the others; without a signature nothing proves it. What it says must then be usable."""
    before, after = json.loads(good), read_manifest(path.parent)
    if before == after:
        return
    Bundle.open(path.parent, verify=True)
    if any(
        after[name] != before[name] for name in ("format", "format_version", "schema_hash", "layers", "nodes")
    ):
        raise Invalid("a manifest of another snapshot than the one beside it")
    if any(after["files"].get(name, sealed) != sealed for name, sealed in before["files"].items()):
        raise Invalid("a manifest of other files than those beside it")
    _search(path.parent, path.parent.parent)


def _read_resealed(path: Path, good: bytes) -> None:
    """A file whose sha256 was put into the manifest: what is opened must search, or say why not."""
    _seal(path)
    _search(path.parent, path.parent.parent)


def _seal(path: Path) -> None:
    """Put the sha256 and length of a changed file into the manifest."""
    manifest = json.loads((path.parent / MANIFEST).read_text())
    manifest["files"][path.name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    (path.parent / MANIFEST).write_text(json.dumps(manifest))


def _search(bundle_folder: Path, export_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder, verify=True)
    manifest, smoke = bundle.manifest, bundle.smoke()
    scorers = [export_folder / f"scorer_l{layer}.onnx" for layer in range(1, bundle.index.layers + 1)]
    scorer = bundle.scorer(OnnxRunner(export_folder / "user_tower.onnx", scorers))
    users = bundle.transform.encode_users(smoke.users)
    result = search(
        bundle.index, scorer, users, tuple(manifest["widths"]), int(manifest["k"]), bundle.schema.rank
    )
    found = result.item_ids[np.arange(result.item_ids.shape[1]) < result.valid[:, None]]
    if not np.isin(found, bundle.index.item_ids).all():
        raise Invalid("a search that finds items which are not there")


def _read_export(path: Path, good: bytes) -> None:
    exported = open_export(path.parent)
    model_configs(exported, exported.verify(), ServingOptions())  # as publishing does
    before = json.loads(good)
    stems = [graph["signature"]["stem"] for graph in before["graphs"]]
    if [graph.signature.stem for graph in exported.graphs] != stems:
        raise Invalid("an export of other graphs")
    for graph in exported.graphs:
        if (path.parent / graph.file).resolve().parent != path.parent.resolve():
            raise Invalid("a graph outside its export")


# The item log, checkpoints and small state


def _make_log(folder: Path, run: Path) -> Path:
    schema = Schema.from_json((run / "schema.json").read_text())
    shutil.copy(run / "schema.json", folder)
    path = folder / "log.db"
    with ItemLog.open(path, schema.hash) as log:
        log.append([_update(schema, number) for number in range(60)])
        log.append([Update(number, 10 + number, deleted=True) for number in range(0, 60, 7)])
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    return path


def _update(schema: Schema, number: int) -> Update:
    features = {
        f.name: (0.5 * number if f.kind == "dense" else [number % 20] if f.type == "int" else ["IT"])
        for f in schema.item_features
        if f.dim == 1 and f.encoding != "item"
    }
    return parse_update(schema, {"id": 10**6 + number, "sequence": number + 1, "features": features})


def _read_log(path: Path, good: bytes) -> None:
    """As a server follows it. SQLite keeps no checksums of what it stores, so another value of a good type may be read;
    every entry must be one that the log could hold."""
    for leftover in ("-wal", "-shm", "-journal"):
        path.with_name(path.name + leftover).unlink(missing_ok=True)
    schema = Schema.from_json((path.parent / "schema.json").read_text())
    with LogReader(path, schema.hash) as reader:
        reader.counts(), reader.oldest(), reader.identity()
        position, last = reader.oldest(), reader.position()
        while entries := reader.since(position, 50):
            for entry in entries:
                if not position < entry.position <= last or not isinstance(entry.item, int):
                    raise Invalid("entries out of order, or items that are no keys")
                position = entry.position
                if entry.payload is not None:
                    entry.update()


def _make_checkpoint(folder: Path, run: Path) -> Path:
    for name in ("recipe.yaml", "schema.json", "transform.hsnn", "corpus.hsnn", "checkpoint.pt"):
        shutil.copy(run / name, folder)
    return folder / "checkpoint.pt"


_RIGHT: list[Any] = []  # the run that was saved, once it is loaded


def _read_checkpoint(path: Path, good: bytes) -> None:
    """What loads must be the run that was saved, to the bit."""
    from hsnn_train.checkpoint import load_run

    loaded = load_run(path.parent)
    if not _RIGHT:
        changed = path.read_bytes()
        path.write_bytes(good)
        _RIGHT.append(load_run(path.parent))
        path.write_bytes(changed)
    (right,) = _RIGHT
    same = all(
        (a == b).all() for a, b in zip(loaded.model.state_dict().values(), right.model.state_dict().values())
    )
    same &= all(
        np.array_equal(*pair)
        for pair in zip(dataclasses.astuple(loaded.index), dataclasses.astuple(right.index))
    )
    if not same:
        raise Invalid("other weights, or another index")


def _make_arrays(folder: Path, run: Path) -> Path:
    return Path(shutil.copy(run / "corpus.hsnn", folder))


def _read_arrays(path: Path, good: bytes) -> None:
    open_arrays(path, "corpus")
    raise Invalid("an array file that is not what its sha256 says")


def _make_state(folder: Path, run: Path) -> Path:
    from hsnn_server.processes import ServerProcess
    from hsnn_server.state import ServerState, Urls

    process, urls = ServerProcess(2**22 + 1, 1), Urls("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")
    ServerState(process, urls, folder, folder, folder / "log", "hsnn-").write(folder / "server.json")
    return folder / "server.json"


def _read_state(path: Path, good: bytes) -> None:
    from hsnn_server.state import ServerState

    state = ServerState.read(path)
    if (
        not isinstance(state.process.pid, int)
        or not isinstance(state.region_prefix, str)
        or not state.region_prefix
    ):
        raise Invalid("a process without a number, or regions without a name: all of them would be removed")
    state.process.alive()


KINDS = (
    *(
        Kind(f"bundle/{name}", _make_bundle(name), mutated_json if name == "schema.json" else mutated, _read_bundle)
        for name in ("schema.json", "transform.hsnn", "index.hsnn", "records.hsnn", "smoke.npz", ITEM_TOWER)
    ),
    Kind("bundle/manifest.json", _make_bundle(MANIFEST), mutated_json, _read_manifest),
    *(
        Kind(f"bundle/{name}, sha256 put right", _make_bundle(name),
             mutated_json if name == "schema.json" else mutated, _read_resealed)
        for name in ("schema.json", "transform.hsnn", "index.hsnn", "records.hsnn", "smoke.npz")
    ),
    Kind("export.json", _make_bundle("export.json"), mutated_json, _read_export),
    Kind("item log", _make_log, mutated, _read_log),
    Kind("checkpoint.pt", _make_checkpoint, mutated, _read_checkpoint),
    Kind("corpus.hsnn", _make_arrays, mutated, _read_arrays),
    Kind("server.json", _make_state, mutated_json, _read_state),
)  # fmt: skip
