"""Table 5 presets: widths as printed, FLOPs in the paper's ratios."""

import pytest

from hsnn_core.errors import SchemaError
from hsnn_train.flops import count, preset_table
from hsnn_train.presets import PRESETS, preset
from hsnn_train.recipe import load_recipe


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in preset_table()}


@pytest.mark.parametrize(
    ("name", "user", "item", "interaction"),
    [
        ("two_tower_xs", (1, 40), (1, 40), None),
        ("small", (8, 40), (1, 40), (1, 40)),
        ("medium", (10, 48), (4, 48), (1, 48)),
        ("large", (30, 48), (8, 48), (1, 48)),
        ("xl", (80, 96), (4, 96), (1, 96)),
    ],
)
def test_widths_are_those_of_table_5(name, user, item, interaction):
    c = preset(name)
    assert (c.user.num_embed, c.user.dim) == user
    assert (c.item.num_embed, c.item.dim) == item
    assert (c.interaction and (c.interaction.num_embed, c.interaction.dim)) == interaction


@pytest.mark.parametrize("name", ["two_tower_xs", "small", "medium", "large", "xl"])
def test_flops_stand_in_the_papers_ratio_within_a_factor_of_two(rows, name):
    assert rows[name].paper_ratio / 2 <= rows[name].ratio <= rows[name].paper_ratio * 2


def test_a_dot_product_of_width_40_is_80_flops_per_pair_and_task(rows):
    assert rows["two_tower_xs"].flops.pair == 2 * 80


def test_the_cpu_ladder_has_at_least_the_stated_ratios_per_pair():
    """0.25 : 1 : 8 : 64 : 256, counted where it matters: what one more candidate of a request costs."""
    schema = load_recipe("beauty").schema
    xs, s, m, large, xl = (count(PRESETS[f"cpu_{n}"](), schema).pair for n in ("xs", "s", "m", "l", "xl"))
    assert xs <= s / 4
    assert m >= 8 * s
    assert large >= 64 * s
    assert xl >= 256 * s


def test_unknown_preset_lists_the_known():
    with pytest.raises(SchemaError, match=r"unknown preset 'smal'; known presets: two_tower_xs, small"):
        preset("smal")
