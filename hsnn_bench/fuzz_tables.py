"""Kinds of files that people write: schemas, recipes, tables, item updates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import yaml

from hsnn_core.errors import HsnnError
from hsnn_core.item_updates import Update, parse_update
from hsnn_core.schema import Schema, load_schema

from .fuzz_bytes import any_text, any_value, mutated, mutated_json
from .fuzz_kind import Invalid, Kind

_ROWS = 300  # of the tables

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


KINDS = (
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
)  # fmt: skip
