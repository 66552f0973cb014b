"""The simulated world: deterministic, with a truth that its log follows."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from hsnn_core.eligibility import AttributeBitmaps, Context
from hsnn_core.errors import DataError
from hsnn_core.schema import Schema
from hsnn_train.data.adapters import synthetic
from hsnn_train.data.attributes import read_attributes
from hsnn_train.data.dataset import load_dataset
from hsnn_train.data.synthetic import (
    COUNTRIES,
    FIRST_AD,
    FIRST_USER,
    Simulation,
    WorldConfig,
    grown_ads,
    simulate,
    world_of,
    write_synthetic,
)
from hsnn_train.data.targeting import targeting_columns

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


def test_what_was_drawn_before_ads_had_targeting_is_as_it_was(world: Simulation) -> None:
    """Trained runs and published figures belong to these bytes."""
    names = [
        "ad_id",
        "campaign_id",
        "creator_id",
        "creator_group",
        "topics",
        "format",
        "made_for",
        "price",
        "quality",
    ]

    def digest(table: pa.Table, names: list[str]) -> str:
        return hashlib.sha256(str(table.select(names).to_pydict()).encode()).hexdigest()[:16]

    grown = grown_ads(world_of(SMALL), SMALL, 2, 500)
    assert digest(world.ads, [*names, "created"]) == "a7fdb66f921d8e7c"
    assert digest(grown, [*names, "created"]) == "64da51e11db43e9e"
    assert digest(world.impressions, world.impressions.column_names) == "3c3295246b9d8594"
    assert digest(world.users, world.users.column_names) == "898dcf5233aea3db"


def test_targeting_follows_from_the_ads_number(world: Simulation) -> None:
    def columns(number: np.ndarray) -> pa.Table:
        start = 1e9 + number.astype(np.float64)
        found = targeting_columns(number, 7, 0.5, number % len(COUNTRIES), COUNTRIES, start, 2_000_000_000)
        return pa.table(found)

    many = columns(np.arange(20_000))
    assert columns(np.arange(40, 90)).equals(many.slice(40, 50))
    lists = {name: many.column(name).to_pylist() for name in ("country", "placement")}
    assert 0.48 < np.mean([row is not None for row in lists["country"]]) < 0.52
    assert 0.23 < np.mean([row is not None for row in lists["placement"]]) < 0.27
    assert {len(row) for row in lists["country"] if row} == {1, 2, 3, 4}
    for number, row in enumerate(lists["country"]):
        assert row is None or (row[0] == COUNTRIES[number % len(COUNTRIES)] and len(set(row)) == len(row))
    assert 0.11 < np.mean(many.column("paused").to_pylist()) < 0.14
    ends = many.column("end_time").to_numpy(zero_copy_only=False)
    assert 0.23 < np.mean(~np.isnan(ends)) < 0.27
    assert np.nanmin(ends) >= 2_000_000_000
    bids = many.column("bid").to_numpy()
    assert bids.min() > 0 and 0.97 < np.median(bids) < 1.03
    own = targeting_columns(np.arange(400), 7, 0.5, world.world.ad_country, COUNTRIES, np.zeros(400), 0)
    assert world.ads.column("bid").combine_chunks().equals(own["bid"])


def test_the_demos_ads_are_nearly_all_open_to_a_request_without_context() -> None:
    recipe = yaml.safe_load(RECIPE.read_text())
    schema = Schema.from_dict(recipe["schema"])
    ads = simulate(WorldConfig(**recipe["data"]["options"] | {"users": 100, "impressions": 100})).ads
    attributes = read_attributes(schema, ads, "items")
    assert attributes is not None
    bits = AttributeBitmaps(attributes).matching(Context.from_wire(schema, {}, 1, 1.8e9), 0)
    assert 0.9 < np.unpackbits(bits).sum() / len(ads) < 0.93


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
    with pytest.raises(DataError, match=r"synthetic.targeted: got 1.5, expected a share from 0 to 1"):
        WorldConfig(targeted=1.5)
