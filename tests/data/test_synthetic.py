"""The simulated world: deterministic, with a truth that its log follows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from hsnn_core.errors import DataError
from hsnn_core.schema import Schema
from hsnn_train.data.adapters import synthetic
from hsnn_train.data.dataset import load_dataset
from hsnn_train.data.synthetic import FIRST_AD, FIRST_USER, Simulation, WorldConfig, simulate, write_synthetic

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "synthetic.yaml"
SMALL = WorldConfig(users=500, ads=400, impressions=20_000)


@pytest.fixture(scope="module")
def world() -> Simulation:
    return simulate(SMALL)


def column(simulation: Simulation, name: str) -> np.ndarray:
    return simulation.impressions.column(name).to_numpy()


def test_the_seed_says_everything(world: Simulation) -> None:
    again = simulate(SMALL)
    for name in ("impressions", "users", "ads"):
        assert getattr(world, name).equals(getattr(again, name))
    other = simulate(WorldConfig(users=500, ads=400, impressions=20_000, seed=8))
    assert not world.impressions.equals(other.impressions)


def test_rates_are_those_asked_for_and_the_truth_explains_the_clicks(world: Simulation) -> None:
    click, conversion = column(world, "click"), column(world, "conversion")
    assert 0.09 < click.mean() < 0.11
    assert 0.11 < conversion[click == 1].mean() < 0.19
    assert (conversion <= click).all()
    # calibrated in every tenth of the true probability, and far better than the base rate
    tenths = np.array_split(np.argsort(world.click), 10)
    for rows in tenths:
        expected = world.click[rows].mean()
        assert abs(click[rows].mean() - expected) < 5 * np.sqrt(expected / len(rows))
    assert world.click[tenths[9]].mean() > 10 * world.click[tenths[0]].mean()


def test_probabilities_of_the_world_are_those_of_the_log(world: Simulation) -> None:
    device = np.zeros(len(world.click), np.int64)
    click, conversion = world.world.probabilities(
        column(world, "user_id") - FIRST_USER,
        column(world, "ad_id") - FIRST_AD,
        (column(world, "timestamp") - column(world, "timestamp").min() // 86_400 * 86_400) / 86_400,
        device,
    )
    phone = column(world, "device") == "phone"
    np.testing.assert_allclose(click[phone], world.click[phone], rtol=1e-9)
    np.testing.assert_allclose(conversion, world.conversion, rtol=1e-9)


def test_ads_are_shown_after_their_creation(world: Simulation) -> None:
    created = world.ads.column("created").to_numpy()[column(world, "ad_id") - FIRST_AD]
    assert (created <= column(world, "day") + 1e-5).all()


def test_the_hierarchy_is_a_tree_and_siblings_are_alike(world: Simulation) -> None:
    truth = world.world
    for child, parent in ((truth.ad_campaign, truth.ad_creator), (truth.ad_creator, truth.ad_group)):
        pairs = np.unique(np.stack([child, parent], axis=1), axis=0)
        assert len(pairs) == len(np.unique(child))
    alike = truth.ad_vector @ truth.ad_vector.T
    same_creator = truth.ad_creator[:, None] == truth.ad_creator
    same_group = truth.ad_group[:, None] == truth.ad_group
    other = ~same_group
    assert alike[same_creator].mean() > alike[same_group & ~same_creator].mean() > alike[other].mean() + 0.2


def test_written_tables_are_loaded_as_simulated(tmp_path: Path, world: Simulation) -> None:
    paths = write_synthetic(tmp_path / "ads", SMALL)
    assert [path.name for path in paths.values()] == ["impressions.parquet", "users.parquet", "items.parquet"]
    assert pq.read_table(paths["impressions"]).equals(world.impressions)
    assert not list(tmp_path.rglob("*.tmp"))
    recipe = yaml.safe_load(RECIPE.read_text())
    schema = Schema.from_dict(recipe["schema"])
    section = {name: f"ads/{name}.parquet" for name in ("impressions", "users", "items")}
    from_files = load_dataset(schema, section, recipe["split"], tmp_path, seed=1, progress=False)
    options = {"users": 500, "ads": 400, "impressions": 20_000}
    section = {"adapter": "synthetic", "options": options}
    from_memory = load_dataset(schema, section, recipe["split"], tmp_path, seed=1, progress=False)
    assert from_files.simulated
    assert from_memory.simulated
    assert from_memory.notes[0].startswith("simulated: no figure made from this data")
    np.testing.assert_array_equal(from_files.train.users.ids, from_memory.train.users.ids)
    np.testing.assert_array_equal(from_files.items.dense, from_memory.items.dense)


def test_a_world_of_one(tmp_path: Path) -> None:
    raw = synthetic(users=1, ads=1, impressions=1, days=1)
    assert raw.items.num_rows == raw.impressions.num_rows == 1
    with pytest.raises(DataError, match=r"synthetic.users: got 0, expected at least 1"):
        WorldConfig(users=0)
