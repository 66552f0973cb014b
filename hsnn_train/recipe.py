"""A recipe: one YAML file that says what to train on what, and how to search.

schema: {...}        features, interactions, tasks (hsnn_core.schema)
data: {...}          tables or a data adapter (hsnn_train.data)
split: {...}         how impressions are divided
model: {layers: [cpu_l, cpu_m, cpu_s], codebooks: [32, 16]}
train: {epochs: 2, batch_size: 512}
search: {widths: [8, 64], k: 100}
without_interactions: {model: {...}, train: {...}}   what comparisons change for models that read no interactions
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hsnn_core.errors import SchemaError
from hsnn_core.schema import Schema

from .presets import reads_interactions
from .recipe_sections import (
    CANDIDATES,
    INDEX_METHODS,
    ModelConfig,
    SearchConfig,
    TrainConfig,
    check_listed,
    check_order,
    check_ranges,
    read_section,
)

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
#: What a row of a comparison is made of, or what all its rows share: the seed, and the negatives that NE is taken with.
FIXED_IN_COMPARISONS = (
    "model.layers", "model.index", "model.codebooks", "model.columns", "train.seed", "train.negatives"
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A loaded recipe. ``base`` is the folder that relative data paths start from. ``without_interactions`` has, by
    section, what models that read no interactions need otherwise: comparisons train their two towers with it."""

    name: str
    schema: Schema
    data: Mapping[str, Any]
    split: Mapping[str, Any]
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    without_interactions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    base: Path = Path()

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that `recipe_from_dict` reads back; ``base`` and the teacher become absolute paths."""
        plain = {
            "name": self.name,
            "schema": self.schema.to_dict(),
            "data": dict(self.data),
            "split": dict(self.split),
            "model": _plain(asdict(self.model)),
            "train": _plain(asdict(self.train))
            | {"teacher": self.train.teacher and os.path.abspath(self.train.teacher)},
            "search": _plain(asdict(self.search)),
            "base": str(self.base.resolve()),
        }
        apart = {section: dict(values) for section, values in self.without_interactions.items()}
        return plain | ({"without_interactions": apart} if apart else {})

    def changes_for(self, layers: Sequence[str]) -> dict[str, Any]:
        """What ``without_interactions`` changes, as dotted keys and their values, for a model of these presets: nothing
        where one of them reads interactions."""
        if any(reads_interactions(layers)):
            return {}
        apart = self.without_interactions.items()
        return {f"{section}.{key}": value for section, values in apart for key, value in values.items()}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def recipe_from_dict(raw: Mapping[str, Any], name: str, base: Path) -> Recipe:
    """A recipe from its plain form. Raises SchemaError naming the dotted path that is wrong."""
    known = {"name", "schema", "data", "split", "model", "train", "search", "without_interactions", "base"}
    for key in raw:
        if key not in known:
            raise SchemaError(f"{key}: unknown section; known sections: {', '.join(sorted(known))}")
    for key in ("schema", "data"):
        if key not in raw:
            raise SchemaError(f"{key}: missing section; a recipe needs schema and data")
    for key in ("data", "split"):
        if key in raw and not isinstance(raw[key] or {}, Mapping):
            raise SchemaError(f"{key}: got {raw[key]!r}, expected a mapping")
    model = read_section(ModelConfig, raw.get("model"), "model")
    model.monns()  # names an unknown preset before minutes of loading
    if model.index not in INDEX_METHODS:
        raise SchemaError(f"model.index: got {model.index!r}, expected one of {', '.join(INDEX_METHODS)}")
    search = read_section(SearchConfig, raw.get("search"), "search")
    if len(search.widths) < len(model.layers) - 1:
        raise SchemaError(
            f"search.widths: got {len(search.widths)} widths, expected {len(model.layers) - 1} "
            f"(one per layer above the items)"
        )
    if search.candidates not in CANDIDATES:
        raise SchemaError(
            f"search.candidates: got {search.candidates!r}, expected one of {', '.join(CANDIDATES)}"
        )
    train = read_section(TrainConfig, raw.get("train"), "train")
    check_ranges(model, train, search)
    schema = Schema.from_dict(raw["schema"])
    check_listed(train, schema)
    check_order(train, schema)
    return Recipe(
        name=str(raw.get("name", name)),
        schema=schema,
        data=raw["data"] or {},
        split=raw.get("split") or {"by": "time"},
        model=model,
        train=train,
        search=search,
        without_interactions=_without_interactions(raw, name, base),
        base=Path(raw.get("base", base)),
    )


def _without_interactions(raw: Mapping[str, Any], name: str, base: Path) -> dict[str, dict[str, Any]]:
    """The section of that name. Raises SchemaError for what the recipe could not take, and for what a comparison sets
    or its models share."""
    section = raw.get("without_interactions") or {}
    changed: dict[str, dict[str, Any]] = {}
    for key, values in section.items() if isinstance(section, Mapping) else [("", section)]:
        if key not in ("model", "train") or not isinstance(values, Mapping):
            raise SchemaError(
                f"without_interactions: got {section!r}, expected {{model: {{...}}, train: {{...}}}}"
            )
        for entry in values:
            if f"{key}.{entry}" in FIXED_IN_COMPARISONS:
                raise SchemaError(
                    f"without_interactions.{key}.{entry}: is the comparison's to say; "
                    f"so are {', '.join(FIXED_IN_COMPARISONS)}"
                )
        changed[key] = dict(values)
    if changed:
        plain = {key: value for key, value in raw.items() if key != "without_interactions"}
        try:
            recipe_from_dict(
                plain | {key: dict(raw.get(key) or {}) | values for key, values in changed.items()},
                name,
                base,
            )
        except SchemaError as error:
            raise SchemaError(f"without_interactions: {error}") from error
    return changed


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe of that name in `recipes/`, or at that path; its data paths are relative to the file's folder
    (for the shipped recipes: to the project's root)."""
    path = Path(name_or_path)
    if not path.is_file() and path.suffix == "":
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise SchemaError(f"recipe {str(name_or_path)!r}: no such file, and no shipped recipe ({shipped})")
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SchemaError(f"recipe {path}: is not YAML: {error}") from error
    if not isinstance(raw, Mapping):
        raise SchemaError(f"recipe {path}: got {type(raw).__name__}, expected a mapping of sections")
    base = path.resolve().parent
    return recipe_from_dict(raw, path.stem, base.parent if base == RECIPES else base)
