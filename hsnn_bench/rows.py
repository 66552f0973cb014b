"""The rows of the paper's Tables 1 to 3: what the paper prints for each, and what to change in a recipe to train it.

Three readings where the paper leaves room:

Table 1 prints ten models. The eleventh row is the data set's own recipe, for which the paper prints nothing.

EBR stands in the paper with the cost M_XS * I_1, an NE that is almost XS's, and no word of LTI. So it is read as two
towers under an index that was learnt apart from them: a two-layer HSNN of XS scorers with a k-means index.

The paper has I_1, I_2, V of 1e3, 1e5, 1e7. The two-layer rows have one index layer of K_1 * sqrt(K_2) nodes, half-way
(on a logarithmic scale) between the recipe's two, which for the shipped recipes is about sqrt(V), the usual size of
an inverted file. They keep a tenth of their nodes, which is about the share of the items that a shipped recipe's widths
leave to be scored at most. (The share of the paths that a recipe keeps would be too little: of K_1 * K_2 paths many
lead to no item, and of the few nodes of a two-layer row none is empty.)

Rows of two towers alone take the recipe's ``without_interactions`` section: what suits a model with interactions may
ruin one without, and a baseline is to be no straw man.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hsnn_core.errors import SchemaError
from hsnn_train.recipe import Recipe
from hsnn_train.recipe_sections import ModelConfig

XS, S, M, L, XL = "cpu_xs", "cpu_s", "cpu_m", "cpu_l", "cpu_xl"
TABLES = ("table1", "table2", "table3")
OWN, LADDER = "recipe", "ladder"

#: Index methods of Table 2, by the letters that the paper gives them.
METHODS = {"sil": "kmeans", "em": "em", "lti": "joint"}
#: Table 3: what each row takes from LTI.
REMOVED: dict[str, tuple[str, dict[str, Any]]] = {
    "no-temperature": ("− softmax temperature schedule", {"train.alpha_exponent": 0.0}),
    "no-warmup": ("− warm-up", {"train.warmup": 0.0}),
    "no-balance": ("− balanced index distribution", {"train.balance": 0.0}),
}


@dataclass(frozen=True)
class Paper:
    """What the paper prints of a row, None where it prints nothing.

    Attributes:
        flops: of a single inference, relative to MoNN Small.
        ne: change of NE relative to the table's first row, in percent.
        cost: infra cost relative to two tower XS.
        theory: the paper's formula of the cost.
        recall: gain relative to two tower XS, in percent.
    """

    flops: float | None = None
    ne: float | None = None
    cost: float | None = None
    theory: str | None = None
    recall: float | None = None


@dataclass(frozen=True)
class Row:
    """One model of a table.

    Attributes:
        id: short name, unique in its table.
        label: as the table prints it.
        block: "ladder" for the paper's architecture, "recipe" for the data set's own.
        reference: id of the row that its NE is compared with.
        paper: what the paper prints.
        overrides: dotted path -> value, on the data set's recipe.
    """

    id: str
    label: str
    block: str
    reference: str
    paper: Paper = field(default_factory=Paper)
    overrides: Mapping[str, Any] = field(default_factory=dict)


def table_rows(table: str, recipe: Recipe) -> list[Row]:
    """The rows of "table1", "table2" or "table3" for a data set's recipe, in the paper's order.

    Raises SchemaError for another table, and for a recipe whose index has other than two layers of codewords.
    """
    build = {"table1": _table1, "table2": _table2, "table3": _table3}
    if table not in build:
        raise SchemaError(f"table {table!r}: unknown; known tables: {', '.join(TABLES)}")
    return build[table](recipe)


def select(rows: Sequence[Row], wanted: str | None) -> list[Row]:
    """The rows named in "id,id,..."; a block's name stands for its rows, None for all. A row's reference is kept in.

    Raises SchemaError that lists the known names.
    """
    if wanted is None:
        return list(rows)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    known = {row.id for row in rows} | {row.block for row in rows}
    for name in names:
        if name not in known:
            raise SchemaError(
                f"--rows: unknown row {name!r}; known rows: {', '.join(row.id for row in rows)}; "
                f"known blocks: {', '.join(dict.fromkeys(row.block for row in rows))}"
            )
    chosen = {row.id for row in rows if row.id in names or row.block in names}
    if not chosen:
        raise SchemaError("--rows: names no row; leave it out for all of them")
    chosen |= {row.reference for row in rows if row.id in chosen}
    return [row for row in rows if row.id in chosen]


def three_layers(recipe: Recipe) -> dict[str, Any]:
    """Index and widths of a row of three layers: the recipe's own; the defaults' where it has no codebooks.

    Raises SchemaError when it has one codebook, or more than two.
    """
    codebooks = recipe.model.codebooks or ModelConfig().codebooks
    if len(codebooks) != 2 or len(recipe.search.widths) < 2:
        raise SchemaError(
            f"recipe {recipe.name}: model.codebooks {list(codebooks)} and search.widths {list(recipe.search.widths)}; "
            "the tables need two of each, for their rows of three layers"
        )
    return {
        "model.codebooks": list(codebooks),
        "model.columns": [],
        "search.widths": list(recipe.search.widths[:2]),
    }


def two_layers(recipe: Recipe) -> dict[str, Any]:
    """Index and width of a row of two layers; see the module's text."""
    first, second = three_layers(recipe)["model.codebooks"]
    nodes = max(2, round(first * math.sqrt(second)))
    return {"model.codebooks": [nodes], "model.columns": [], "search.widths": [math.ceil(nodes / 10)]}


def _layers(recipe: Recipe, index: str, *presets: str) -> dict[str, Any]:
    """Overrides of a model of one, two or three layers of these presets."""
    shape: dict[str, Any] = {"model.codebooks": [], "model.columns": [], "search.widths": []}
    if len(presets) > 1:
        shape = two_layers(recipe) if len(presets) == 2 else three_layers(recipe)
    return {**recipe.changes_for(presets), "model.layers": list(presets), "model.index": index, **shape}


def _table1(recipe: Recipe) -> list[Row]:
    def row(name: str, label: str, paper: Paper, index: str, *presets: str) -> Row:
        return Row(name, label, LADDER, "xs", paper, _layers(recipe, index, *presets))

    return [
        row("xs", "Two Tower (XS)", Paper(0.25, 0.0, 1.0, "M_XS·V", 0.0), "joint", XS),
        row("small", "MoNN Small", Paper(1, -0.29, 2.5, "M_S·V", 2.4), "joint", S),
        row("medium", "MoNN Medium", Paper(50, -0.70, 17.3, "M_M·V", 4.2), "joint", M),
        row("large", "MoNN Large", Paper(30_000, -1.70, 24.6, "M_L·V", 9.4), "joint", L),
        row("xl", "MoNN XL", Paper(200_000, -2.20, 64, "M_XL·V", 12.0), "joint", XL),
        row("ebr", "EBR (Two Tower)", Paper(0.25, 0.03, 0.49, "M_XS·I₁", -0.1), "kmeans", XS, XS),
        row("hsnn2-s-xs", "2-layer HSNN (Small, Two Tower)",
            Paper(1.25, -0.23, 1.7, "M_S·I₁ + M_XS·V", 2.2), "joint", S, XS),
        row("hsnn2-m-s", "2-layer HSNN (Medium, Small)",
            Paper(51, -0.47, 3.3, "M_M·I₁ + M_S·V", 3.6), "joint", M, S),
        row("hsnn2-l-s", "2-layer HSNN (Large, Small)",
            Paper(30_001, -0.97, 3.9, "M_L·I₁ + M_S·V", 6.0), "joint", L, S),
        row("hsnn3-xl-l-s", "3-layer HSNN (XL, Large, Small)",
            Paper(230_001, -1.46, 4.5, "M_XL·I₁ + M_L·I₂ + M_S·V", 10.0), "joint", XL, L, S),
        Row(OWN, f"HSNN, default recipe ({', '.join(recipe.model.layers)})", OWN, "xs"),
    ]  # fmt: skip


def _own(recipe: Recipe) -> dict[str, Any]:
    """The recipe's own layers over learnt codebooks. Raises SchemaError for other than three layers."""
    if len(recipe.model.layers) != 3:
        raise SchemaError(
            f"recipe {recipe.name}: {len(recipe.model.layers)} layers, expected three for this table"
        )
    return three_layers(recipe)


def _table2(recipe: Recipe) -> list[Row]:
    printed = {"sil": 0.0, "em": -0.11, "lti": -0.15}
    labels = {"sil": "HSNN w/ SIL", "em": "HSNN + JOIM w/ EM", "lti": "HSNN + JOIM w/ LTI"}
    ladder = [
        Row(name, labels[name], LADDER, "sil", Paper(ne=printed[name]), _layers(recipe, method, S, XS))
        for name, method in METHODS.items()
    ]
    own = [
        Row(f"{OWN}-{name}", f"default recipe, {name.upper()}", OWN, f"{OWN}-sil",
            overrides={"model.index": method, **_own(recipe)})
        for name, method in METHODS.items()
    ]  # fmt: skip
    return ladder + own


def _table3(recipe: Recipe) -> list[Row]:
    printed = {"no-temperature": 0.1, "no-warmup": 0.03, "no-balance": 0.05}
    ladder = _layers(recipe, "joint", S, XS)
    own = {"model.index": "joint", **_own(recipe)}
    rows = [Row("lti", "HSNN w/ LTI (Small, Two Tower)", LADDER, "lti", Paper(ne=0.0), ladder)]
    rows += [
        Row(name, label, LADDER, "lti", Paper(ne=printed[name]), ladder | removed)
        for name, (label, removed) in REMOVED.items()
    ]
    rows.append(Row(f"{OWN}-lti", "default recipe w/ LTI", OWN, f"{OWN}-lti", overrides=own))
    rows += [
        Row(f"{OWN}-{name}", label, OWN, f"{OWN}-lti", overrides=own | removed)
        for name, (label, removed) in REMOVED.items()
    ]
    return rows
