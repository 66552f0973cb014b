"""Mutated files of every kind that HSNN reads, each read in a process that may die or hang.

A mutated file must be refused with one of HSNN's own errors, or be something valid all the same. What valid means is
said by each kind's `read`: it raises `Invalid` for what was read and must not have been.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import sqlite3
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import yaml

from export.exported import open_export
from export.pbtxt import ServingOptions
from export.publish import model_configs
from hsnn_core.arrayfile import open_arrays
from hsnn_core.bundle import Bundle
from hsnn_core.errors import HsnnError
from hsnn_core.files import file_sha256
from hsnn_core.item_log import ItemLog, LogReader
from hsnn_core.item_updates import Update, parse_update
from hsnn_core.manifest import ITEM_TOWER, MANIFEST, read_manifest
from hsnn_core.onnx_runner import OnnxRunner
from hsnn_core.schema import Schema, load_schema
from hsnn_core.search import search

from .fuzz_bytes import any_text, any_value, mutated, mutated_json

PATIENCE = 20.0  # seconds that reading one file may take
_ROWS = 300  # of the tables


class Invalid(Exception):
    """Something was read that must have been refused."""


@dataclass(frozen=True)
class Kind:
    """A kind of file. ``make``: write a good one below a folder and return its path, beside all that reading it needs;
    ``mutate``: a changed content of it; ``read``: read it as HSNN does, with the good content beside it."""

    name: str
    make: Callable[[Path, Path], Path]
    mutate: Callable[[np.random.Generator, bytes], bytes]
    read: Callable[[Path, bytes], None]


@dataclass
class Outcome:
    """Of the mutations of one kind: ``refused`` by HSNN's errors; ``same``: not changed at all; ``valid``: read, and
    valid; ``findings``: anything else, with the number of the first mutation that showed it."""

    refused: int = 0
    same: int = 0
    valid: int = 0
    findings: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.refused + self.same + self.valid + sum(self.findings.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return vars(self) | {"findings": dict(self.findings)}

    def add(self, number: int, what: str) -> None:
        if what in ("refused", "same", "valid"):
            setattr(self, what, getattr(self, what) + 1)
            return
        self.findings[what] += 1
        self.first.setdefault(what, number)


def fuzz_kind(
    name: str, run: Path, mutations: int, seed: int, progress: Callable[[int], object] = lambda count: None
) -> Outcome:
    """Mutate one kind of file ``mutations`` times. ``run``: an exported run, whose files are the good ones.

    Mutation n depends on ``seed`` and n alone."""
    outcome, number = Outcome(), 0
    context = multiprocessing.get_context("fork")
    while number < mutations:
        here, there = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(there, name, run, number, mutations, seed), daemon=True)
        worker.start()
        there.close()
        for done, what in _answers(worker, here, number, mutations):
            outcome.add(done, what)
            progress(1)
            number = done + 1
        worker.join()
    return outcome


def _answers(worker: Any, answers: Connection, first: int, last: int) -> Iterator[tuple[int, str]]:
    """What the worker says of each mutation; the last one may be the one that ended it."""
    for number in range(first, last):
        try:
            if not answers.poll(PATIENCE if number > first else 3 * PATIENCE):
                worker.kill()
                yield number, f"hang: nothing within {PATIENCE:g} s"
                return
            yield number, answers.recv()
        except EOFError:
            worker.join()
            yield number, f"crash: the process ended with {worker.exitcode}"
            return


def _work(answers: Connection, name: str, run: Path, first: int, last: int, seed: int) -> None:
    kind = KINDS[name]
    with tempfile.TemporaryDirectory(prefix="hsnn-fuzz-") as folder:
        path = kind.make(Path(folder), run)
        good = path.read_bytes()
        with suppress(Invalid):  # of kinds of which nothing but the very bytes is right
            kind.read(path, good)
        for number in range(first, last):
            content = kind.mutate(np.random.default_rng([seed, number]), good)
            answers.send(_read(kind, path, good, content))


def _read(kind: Kind, path: Path, good: bytes, content: bytes) -> str:
    if content == good:
        return "same"
    path.write_bytes(content)
    try:
        kind.read(path, good)
    except HsnnError as error:
        return "refused" if str(error).strip() else "refused without a word"
    except Invalid as error:
        return f"accepted: {error}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(place.filename).name}:{place.name}: {str(error)[:100]}"
    return "valid"


# Schema and recipe


def _make_schema(folder: Path, run: Path) -> Path:
    path = folder / "schema.yaml"
    schema = json.loads((run / "schema.json").read_text())
    path.write_text(yaml.safe_dump(schema, sort_keys=False))
    return path


def _mutate_yaml(rng: np.random.Generator, good: bytes) -> bytes:
    if rng.random() < 0.5:
        return mutated(rng, good)
    value = mutated_json(rng, json.dumps(yaml.safe_load(good)).encode())
    try:
        return yaml.safe_dump(json.loads(value), sort_keys=False).encode(errors="surrogatepass")
    except (ValueError, RecursionError):
        return value


def _read_schema(path: Path, good: bytes) -> None:
    schema = load_schema(path)
    if Schema.from_json(schema.to_json()) != schema:
        raise Invalid("a schema that is not what its own JSON says")
    schema.layout("user"), schema.layout("item"), schema.user_wire(), schema.context_wire()


def _make_recipe(folder: Path, run: Path) -> Path:
    return Path(shutil.copy(run / "recipe.yaml", folder / "recipe.yaml"))


def _read_recipe(path: Path, good: bytes) -> None:
    from hsnn_train.recipe import load_recipe, recipe_from_dict

    recipe = load_recipe(path)
    again = recipe_from_dict(recipe.to_dict(), recipe.name, recipe.base)
    if again.to_dict() != recipe.to_dict():
        raise Invalid("a recipe that is not what it writes")


# Tables


def _tables(run: Path) -> dict[str, pa.Table]:
    from hsnn_train.checkpoint import load_recipe_of_run
    from hsnn_train.data.dataset import recipe_tables

    recipe = load_recipe_of_run(run)
    tables = recipe_tables(recipe.schema, recipe.data, recipe.base)
    impressions = tables.impressions.slice(0, _ROWS)
    return {"impressions": impressions, "items": tables.items, "users": tables.users}


def _write_table(table: pa.Table, path: Path) -> None:
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        flat = [
            pa.array(["" if row is None else "|".join(map(str, row)) for row in column.to_pylist()])
            if pa.types.is_list(column.type) else column
            for column in table.columns
        ]  # fmt: skip
        pa.csv.write_csv(pa.table(dict(zip(table.column_names, flat))), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


def _make_table(name: str, ending: str) -> Callable[[Path, Path], Path]:
    def make(folder: Path, run: Path) -> Path:
        shutil.copy(run / "schema.json", folder)
        tables = _tables(run)
        for other, table in tables.items():
            if other != name:
                _write_table(table, folder / f"{other}.parquet")
        _write_table(tables[name], folder / f"{name}{ending}")
        return folder / f"{name}{ending}"

    return make


def _mutate_lines(rng: np.random.Generator, good: bytes) -> bytes:
    """One line's bytes or JSON, or bytes anywhere."""
    if rng.random() < 0.3:
        return mutated(rng, good)
    lines = good.splitlines()
    at = rng.integers(len(lines))
    lines[at] = mutated_json(rng, lines[at]) if lines[at].startswith(b"{") else mutated(rng, lines[at])
    return b"\n".join(lines) + b"\n"


def _mutate_parquet(rng: np.random.Generator, good: bytes) -> bytes:
    """Bytes, or a column of another type, with other values, twice, or not there."""
    if rng.random() < 0.5:
        return mutated(rng, good)
    table = pa.parquet.read_table(pa.BufferReader(good))
    at = int(rng.integers(table.num_columns))
    name, values = table.column_names[at], table.column(at).to_pylist()
    if rng.random() < 0.2:
        table = table.remove_column(at)
    else:
        for row in rng.integers(len(values), size=int(rng.integers(1, 4))):
            values[row] = any_value(rng)
        if rng.random() < 0.2:
            values = [any_text(rng) for _ in values]
        try:
            table = table.set_column(at, name, pa.array(values))
        except (pa.ArrowException, OverflowError, UnicodeError, ValueError, TypeError):
            table = table.append_column(name, table.column(at))
    sink = pa.BufferOutputStream()
    try:
        pa.parquet.write_table(table, sink)
    except pa.ArrowException:  # what Parquet cannot hold
        return mutated(rng, good)
    return bytes(sink.getvalue())


def _read_table(path: Path, good: bytes) -> None:
    """As training reads a log: every check, and the encoding of every row."""
    from hsnn_train.data.dataset import build_dataset
    from hsnn_train.data.splits import Split
    from hsnn_train.data.tables import load_tables

    schema = Schema.from_json((path.parent / "schema.json").read_text())
    paths = {name: path.parent / f"{name}.parquet" for name in ("impressions", "items", "users")}
    paths[path.stem] = path
    split = Split.from_dict({"by": "time", "fractions": [0.8, 0.1, 0.1]})
    dataset = build_dataset(schema, load_tables(schema, paths), split, seed=1)
    for examples in (dataset.train, dataset.valid, dataset.test):
        if len(examples) and not (
            np.isin(examples.labels, (0, 1)).all() and np.isfinite(examples.users.dense).all()
        ):
            raise Invalid("labels that are neither 0 nor 1, or features that are no numbers")
        if len(examples) and not 0 <= examples.item_row.min() <= examples.item_row.max() < len(
            dataset.item_keys
        ):
            raise Invalid("items outside the table of items")


def _make_updates(ending: str) -> Callable[[Path, Path], Path]:
    def make(folder: Path, run: Path) -> Path:
        shutil.copy(run / "schema.json", folder)
        path = folder / f"updates{ending}"
        _write_table(_tables(run)["items"].slice(0, 40), path)
        return path

    return make


def _read_updates(path: Path, good: bytes) -> None:
    """As `hsnn items upsert` and the server after it: every row is taken or refused by itself."""
    from hsnn_cli.item_files import ItemFile

    schema = Schema.from_json((path.parent / "schema.json").read_text())
    with ItemFile(str(path), schema) as file:
        for row in file.updates():
            try:
                update = parse_update(schema, {"sequence": 1} | row if isinstance(row, dict) else row)
            except HsnnError:
                continue
            if Update.from_json(update.to_json()) != update:
                raise Invalid("an update that is not what the log would give back")


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
    _seal(path, good)
    _search(path.parent, path.parent.parent)


def _seal(path: Path, good: bytes) -> None:
    """Put the sha256 and length of a changed file into the manifest, and into the header of an array file its own."""
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


_WEIGHTS: dict[bytes, Any] = {}


def _read_checkpoint(path: Path, good: bytes) -> None:
    """What loads must be the run that was saved, to the bit."""
    from hsnn_train.checkpoint import load_run

    loaded = load_run(path.parent)
    if "run" not in _WEIGHTS.setdefault(b"", {}):
        changed = path.read_bytes()
        path.write_bytes(good)
        _WEIGHTS[b""]["run"] = load_run(path.parent)
        path.write_bytes(changed)
    right = _WEIGHTS[b""]["run"]
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


KINDS = {
    kind.name: kind
    for kind in (
        Kind("schema.yaml", _make_schema, _mutate_yaml, _read_schema),
        Kind("recipe.yaml", _make_recipe, _mutate_yaml, _read_recipe),
        *(
            Kind(f"{name}{ending}", _make_table(name, ending),
                 _mutate_parquet if ending == ".parquet" else _mutate_lines, _read_table)
            for name in ("impressions", "items") for ending in (".parquet", ".csv", ".jsonl")
        ),
        *(
            Kind(f"updates{ending}", _make_updates(ending),
                 _mutate_parquet if ending == ".parquet" else _mutate_lines, _read_updates)
            for ending in (".parquet", ".csv", ".jsonl")
        ),
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
    )
}  # fmt: skip
