"""Run directories: what a training run leaves behind, written so that a crash never leaves half a file."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from hsnn_core.arrayfile import open_arrays, write_arrays
from hsnn_core.errors import DataError, FormatError, HsnnError, SchemaMismatch
from hsnn_core.features import Encoded, FeatureTransform
from hsnn_core.files import write_bytes, written_aside
from hsnn_core.item_attributes import ItemAttributes
from hsnn_core.schema import Schema

from .batches import IndexState
from .hsnn import HSNN
from .recipe import Recipe, recipe_from_dict

CHECKPOINT_FORMAT = 2


def without_nan(value: Any) -> Any:
    """The same plain value with None for every float that JSON cannot say (NaN, infinite)."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """A JSON file, with null for what JSON cannot say, written aside."""
    write_bytes(path, (json.dumps(without_nan(value), indent=1, allow_nan=False) + "\n").encode())


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """A torch file, written aside."""
    with written_aside(path) as f:
        torch.save({"format": CHECKPOINT_FORMAT, **state}, f)


def load_checkpoint(path: Path, schema: Schema) -> dict[str, Any]:
    """A checkpoint of a run with this schema, read without pickle's code execution.

    Raises FormatError for a missing, damaged or unknown file, SchemaMismatch when it was trained on another
    schema.
    """
    if not path.exists():
        raise FormatError(f"checkpoint {path}: no such file; has the run been trained (hsnn train)?")
    try:
        # torch itself does not compare the checksums that it writes.
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise FormatError(f"checkpoint {path}: cannot be read ({e}); restore it or train again") from e
    if damaged is not None:
        raise FormatError(f"checkpoint {path}: its part {damaged} is damaged; restore it or train again")
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise FormatError(f"checkpoint {path}: format {state.get('format')!r}, expected {CHECKPOINT_FORMAT}")
    if state["schema_hash"] != schema.hash:
        raise SchemaMismatch(
            f"checkpoint {path}: schema {state['schema_hash']}, the run's schema.json is {schema.hash}"
        )
    return state


def follows_stream(run: Path) -> bool:
    """Whether the folder holds a run that follows a stream (`hsnn train --follow`)."""
    path = run / "checkpoint.pt"
    return path.exists() and "follow" in load_checkpoint(path, load_recipe_of_run(run).schema)


def refuse_followed(run: Path) -> None:
    """Raise HsnnError when the folder holds a run that follows a stream."""
    if follows_stream(run):
        raise HsnnError(
            f"run {run}: follows a stream; hsnn train --follow goes on with it, and {run / 'follow.jsonl'} has what "
            "it said of each file before it learnt from it"
        )


def refuse_unfinished(run: Path) -> None:
    """Raise HsnnError when the folder holds an interrupted training, or one that follows a stream, which a new one
    would replace."""
    path = run / "checkpoint.pt"
    if not path.exists():
        return
    state = load_checkpoint(path, load_recipe_of_run(run).schema)
    if "follow" in state:
        raise HsnnError(
            f"run {run}: holds a run that follows a stream; give another --run, or --restart to train anew and lose it"
        )
    if not state.get("finished", False):
        raise HsnnError(
            f"run {run}: holds a training that was interrupted at step {int(state['step'])}; go on with "
            f"hsnn train --resume {run}, or give --restart to train anew and lose it"
        )


def save_meaning(run: Path, recipe: Recipe, transform: FeatureTransform) -> None:
    """Recipe, schema and transform. What an earlier run left in the folder goes first, so that no checkpoint ever
    stands beside another run's recipe."""
    run.mkdir(parents=True, exist_ok=True)
    for name in ("checkpoint.pt", "history.jsonl", "follow.jsonl", "metrics.json", "metrics-valid.json"):
        (run / name).unlink(missing_ok=True)
    write_bytes(run / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode())
    write_bytes(run / "schema.json", recipe.schema.to_json().encode())
    write_arrays(run / "transform.hsnn", "transform", transform.to_arrays(), {"schema": recipe.schema.hash})


def save_inputs(
    run: Path,
    recipe: Recipe,
    transform: FeatureTransform,
    items: Encoded,
    item_keys: np.ndarray,
    attributes: ItemAttributes | None = None,
) -> None:
    """Everything of a run that is known before the first step: see `save_meaning`, and the corpus, with its attributes
    by row where the schema declares some."""
    save_meaning(run, recipe, transform)
    write_arrays(
        run / "corpus.hsnn",
        "corpus",
        {"dense": items.dense, "ids": items.ids, "item_ids": item_keys}
        | (attributes.to_arrays() if attributes is not None else {}),
        {"schema": recipe.schema.hash},
    )


def check_inputs(
    run: Path, schema: Schema, transform: FeatureTransform, items: Encoded, item_keys: np.ndarray
) -> None:
    """Refuse a data set that is encoded otherwise than the one the run was trained on: the same id would mean
    another thing to its embeddings. Raises SchemaMismatch or DataError that names the first difference, and HsnnError
    for a run that follows a stream: what it learnt from is in no table."""
    refuse_followed(run)
    own = load_recipe_of_run(run).schema
    if own.hash != schema.hash:
        raise SchemaMismatch(f"run {run}: trained on schema {own.hash}, asked for schema {schema.hash}")
    now = {
        **transform.to_arrays(),
        "items' dense": items.dense,
        "items' ids": items.ids,
        "item keys": item_keys,
    }
    corpus = open_arrays(run / "corpus.hsnn", "corpus").arrays
    saved = {
        **open_arrays(run / "transform.hsnn", "transform").arrays,
        "items' dense": corpus["dense"], "items' ids": corpus["ids"], "item keys": corpus["item_ids"],
    }  # fmt: skip
    for name in sorted(now):
        if not np.array_equal(now[name], saved[name]):
            raise DataError(
                f"run {run}: the tables have changed since it was trained ({name} differs), or this release derives "
                "other features from them, so its ids mean other things now; bring back those tables, or train again"
            )


@dataclass(frozen=True)
class Run:
    """A trained run, ready to be evaluated or exported. ``items`` (V rows) and ``item_ids`` int64 (V,) are the
    corpus it was trained on, or of a run that follows a stream the items table as it read it last; ``index`` the hard
    index as of the last refresh, ``finished`` whether it reached the last step, ``attributes`` the items' eligibility
    and bids by row, None when the schema declares none."""

    path: Path
    recipe: Recipe
    schema: Schema
    transform: FeatureTransform
    model: HSNN
    items: Encoded
    item_ids: np.ndarray
    index: IndexState
    step: int
    finished: bool
    attributes: ItemAttributes | None


def make_model(recipe: Recipe, transform: FeatureTransform) -> HSNN:
    """The untrained model of a recipe; weights follow torch's current seed."""
    schema = recipe.schema
    spaces = {f.space for f in schema.features if f.encoding is not None}
    cardinality = {space: transform.cardinality(space) for space in sorted(spaces)}
    m = recipe.model
    return HSNN(schema, cardinality, m.monns(), m.index_config(), m.dropout, m.id_dropout)


def load_recipe_of_run(run: Path) -> Recipe:
    """The recipe a run was trained with. Raises FormatError when the folder is no run."""
    path = run / "recipe.yaml"
    if not path.exists():
        raise FormatError(f"run {run}: no recipe.yaml there; expected a folder that hsnn train wrote")
    return recipe_from_dict(yaml.safe_load(path.read_text()), run.name, run)


def set_widths(run: Path, widths: Sequence[int]) -> None:
    """Write other beam widths (N-1) into a run's recipe; nothing that was trained depends on them."""
    recipe = load_recipe_of_run(run)
    changed = replace(recipe, search=replace(recipe.search, widths=tuple(int(width) for width in widths)))
    write_bytes(run / "recipe.yaml", yaml.safe_dump(changed.to_dict(), sort_keys=False).encode())


def load_run(run_dir: str | Path) -> Run:
    """A trained run from its directory; see `Run`."""
    path = Path(run_dir)
    recipe = load_recipe_of_run(path)
    transform = FeatureTransform.from_arrays(
        recipe.schema, open_arrays(path / "transform.hsnn", "transform").arrays
    )
    state = load_checkpoint(path / "checkpoint.pt", recipe.schema)
    if "follow" in state:
        corpus = {name: array.numpy() for name, array in state["corpus"].items()}
    else:
        corpus = dict(open_arrays(path / "corpus.hsnn", "corpus").arrays)
    model = make_model(recipe, transform)
    model.load_state_dict(state["model"])
    return Run(
        path=path,
        recipe=recipe,
        schema=recipe.schema,
        transform=transform,
        model=model.eval(),
        items=Encoded(corpus["dense"], corpus["ids"]),
        item_ids=np.asarray(corpus["item_ids"]),
        index=IndexState(state["paths"].numpy(), state["representative"].numpy()),
        step=int(state["step"]),
        finished=bool(state.get("finished", False)),
        attributes=ItemAttributes.from_arrays(recipe.schema, corpus),
    )
