"""The rows of the tables are the paper's, and every shipped recipe can train them."""

import dataclasses
from pathlib import Path

import pytest

from hsnn_bench.ours import changed, variant
from hsnn_bench.rows import TABLES, select, table_rows, three_layers, two_layers
from hsnn_bench.serving_peers import flat_recipe
from hsnn_bench.spaces import METHODS
from hsnn_bench.tables import _job
from hsnn_core.errors import SchemaError
from hsnn_train.recipe import RECIPES, load_recipe

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.fixture(scope="module")
def beauty():
    recipe = load_recipe("beauty")
    model = dataclasses.replace(recipe.model, layers=("small",) * 3, codebooks=(32, 16))
    return dataclasses.replace(
        recipe, model=model, search=dataclasses.replace(recipe.search, widths=(16, 120))
    )


def test_table_1_has_the_papers_ten_rows_and_the_recipes_own(beauty):
    rows = table_rows("table1", beauty)
    printed = [(r.paper.flops, r.paper.ne, r.paper.cost, r.paper.recall) for r in rows]
    assert printed == [
        (0.25, 0.0, 1.0, 0.0),
        (1, -0.29, 2.5, 2.4),
        (50, -0.70, 17.3, 4.2),
        (30_000, -1.70, 24.6, 9.4),
        (200_000, -2.20, 64, 12.0),
        (0.25, 0.03, 0.49, -0.1),
        (1.25, -0.23, 1.7, 2.2),
        (51, -0.47, 3.3, 3.6),
        (30_001, -0.97, 3.9, 6.0),
        (230_001, -1.46, 4.5, 10.0),
        (None, None, None, None),
    ]
    layers = [row.overrides.get("model.layers") for row in rows]
    assert layers == [
        *([f"cpu_{size}"] for size in ("xs", "s", "m", "l", "xl")),
        ["cpu_xs", "cpu_xs"],
        ["cpu_s", "cpu_xs"],
        ["cpu_m", "cpu_s"],
        ["cpu_l", "cpu_s"],
        ["cpu_xl", "cpu_l", "cpu_s"],
        None,
    ]
    assert [row.overrides.get("model.index") for row in rows[5:7]] == ["kmeans", "joint"]


def test_tables_2_and_3_have_the_papers_rows_and_a_block_of_the_recipe(beauty):
    two, three = table_rows("table2", beauty), table_rows("table3", beauty)
    assert [r.paper.ne for r in two] == [0.0, -0.11, -0.15, None, None, None]
    assert [r.overrides["model.index"] for r in two] == ["kmeans", "em", "joint"] * 2
    assert [r.paper.ne for r in three] == [0.0, 0.1, 0.03, 0.05, None, None, None, None]
    removed = [{k: v for k, v in r.overrides.items() if k.startswith("train.")} for r in three]
    assert removed == 2 * [{}, {"train.alpha_exponent": 0.0}, {"train.warmup": 0.0}, {"train.balance": 0.0}]
    assert two[2].overrides == three[0].overrides


def test_ids_are_unique_and_references_are_rows(beauty):
    for table in TABLES:
        ids = [row.id for row in table_rows(table, beauty)]
        assert len(set(ids)) == len(ids)
        assert {row.reference for row in table_rows(table, beauty)} <= set(ids)


def test_an_index_of_one_layer_stands_between_the_recipes_two_and_keeps_a_tenth(beauty):
    two = two_layers(beauty)
    assert two["model.codebooks"] == [128]  # 32 * sqrt(16)
    assert two["search.widths"] == [13]  # 128 / 10, rounded up
    assert three_layers(beauty)["search.widths"] == [16, 120]


def test_a_recipe_without_codebooks_takes_the_defaults(beauty):
    given = dataclasses.replace(
        beauty, model=dataclasses.replace(beauty.model, codebooks=(), columns=("a", "b"))
    )
    assert three_layers(given)["model.codebooks"] == [32, 16]
    assert three_layers(given)["model.columns"] == []


def test_a_recipe_of_another_depth_is_refused(beauty):
    one = dataclasses.replace(beauty, model=dataclasses.replace(beauty.model, codebooks=(32,)))
    with pytest.raises(SchemaError, match=r"model.codebooks \[32\] .* need two of each"):
        table_rows("table1", one)
    flat = dataclasses.replace(beauty, model=dataclasses.replace(beauty.model, layers=("small",)))
    with pytest.raises(SchemaError, match="1 layers, expected three"):
        table_rows("table2", flat)


def test_rows_are_chosen_by_id_or_block_and_keep_their_reference(beauty):
    rows = table_rows("table3", beauty)
    assert [row.id for row in select(rows, "no-warmup")] == ["lti", "no-warmup"]
    assert [row.id for row in select(rows, "ladder")] == ["lti", "no-temperature", "no-warmup", "no-balance"]
    assert select(rows, None) == rows
    with pytest.raises(SchemaError, match=r"unknown row 'no-warm'; known rows: lti, .*known blocks: ladder"):
        select(rows, "lti,no-warm")
    with pytest.raises(SchemaError, match="names no row"):
        select(rows, ",")
    with pytest.raises(SchemaError, match="known tables: table1, table2, table3"):
        table_rows("table4", beauty)


def test_rows_without_interactions_take_the_recipes_section_for_them_and_no_other_row_knows_of_it(beauty):
    apart = dataclasses.replace(beauty, without_interactions={"model": {"min_positives": 7}})
    for mine, plain in zip(table_rows("table1", apart), table_rows("table1", beauty), strict=True):
        job, same = (_job(row, recipe, 1, Path("work")) for row, recipe in ((mine, apart), (plain, beauty)))
        assert job.recipe.without_interactions == {}
        if mine.id in ("xs", "ebr"):
            assert job.recipe.model.min_positives == 7 and mine.overrides["model.min_positives"] == 7
        else:
            assert (mine, job.folder) == (plain, same.folder)


def test_every_comparison_takes_that_section_where_no_layer_reads_interactions(beauty):
    apart = dataclasses.replace(
        beauty, without_interactions={"model": {"min_positives": 7}, "train": {"lr": 0.5}}
    )
    for name, found in METHODS.items():
        if found.ours:
            made = variant(apart, {**found.recipe, "train.lr": 0.1})
            assert made.train.lr == 0.1, "what a trial sets stands"
            assert made.model.min_positives == (7 if name in ("two_tower", "mol") else 1)
    assert [flat_recipe(apart, p).model.min_positives for p in ("cpu_xs", "cpu_mol", "cpu_s")] == [7, 7, 1]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_takes_every_row(name):
    recipe = load_recipe(name)
    for table in TABLES:
        for row in table_rows(table, recipe):
            made = changed(recipe, row.overrides)
            assert len(made.search.widths) >= len(made.model.layers) - 1
            for path, value in row.overrides.items():
                section, key = path.split(".")
                got = getattr(getattr(made, section), key)
                assert (list(got) if isinstance(got, tuple) else got) == value
