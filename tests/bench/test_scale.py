from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "core"))
from core_fakes import fake_scorer, one_user, random_index, random_users

from export.export_run import export_run
from export.open_items import open_items
from export.stream_index import read_items
from hsnn_bench import (
    corpora,
    crashes,
    filtering,
    kept_tops,
    live_items,
    scale,
    serving_peers,
    targeting,
    width_search,
)
from hsnn_bench.width_search import Point, find, grid
from hsnn_cli.commands_training import load_data
from hsnn_cli.main import main
from hsnn_core.bundle import Bundle
from hsnn_core.errors import DataError, SearchError
from hsnn_core.exhaustive import exhaustive
from hsnn_core.features import Encoded
from hsnn_core.search import search
from hsnn_core.targeting import TargetingFilter
from hsnn_train.checkpoint import load_recipe_of_run, load_run, set_widths
from hsnn_train.data.synthetic import WorldConfig, grown_ads, simulate, world_of
from hsnn_train.recipe import load_recipe
from hsnn_train.trainer import Trainer

RANK = np.array([1.0, 0.5], np.float32)
TINY = WorldConfig(users=80, ads=120, impressions=1500, days=7, seed=3)


def test_grown_ads_are_ads_of_the_world_and_depend_on_their_part_alone():
    world = world_of(TINY)
    own = simulate(TINY).ads
    first, again = grown_ads(world, TINY, 0, 500), grown_ads(world, TINY, 0, 500)
    second = grown_ads(world, TINY, 1, 500)
    assert first.equals(again) and not first.equals(second)
    assert first.schema == own.schema
    ids = np.concatenate([table.column("ad_id").to_numpy() for table in (own, first, second)])
    np.testing.assert_array_equal(ids, np.arange(1000, 1000 + 120 + 1000))
    for name in ("campaign_id", "creator_id", "creator_group"):
        assert set(first.column(name).to_pylist()) <= set(range(max(own.column(name).to_pylist()) + 1))
    # A campaign lies under the same creator and group, whoever's ads are looked at.
    tree = {row["campaign_id"]: (row["creator_id"], row["creator_group"]) for row in own.to_pylist()}
    for row in first.to_pylist():
        assert tree.get(row["campaign_id"], (row["creator_id"], row["creator_group"])) == (
            row["creator_id"],
            row["creator_group"],
        )
    spread = [np.std(table.column("price").to_numpy()) for table in (own, first)]
    assert 0.5 < spread[0] / spread[1] < 2


def test_only_a_simulated_world_grows():
    with pytest.raises(DataError, match=r"data\.adapter: got None, expected 'synthetic'"):
        corpora.world_config({"impressions": "f.parquet"})


def tree(seed=0, layers=3, items=300):
    rng = np.random.default_rng(seed)
    index = random_index(rng, layers, items, codes=8)
    scorer, _ = fake_scorer(rng, index)
    return index, scorer, random_users(rng, 6)


def test_the_grid_holds_the_exact_search_and_grows_with_the_layers():
    index, _, _ = tree()
    points = grid(index, 20, least=2)
    assert points[-1] == (index.nodes(1), index.nodes(2))
    assert all(above <= below for above, below in points)
    assert len(set(points)) == len(points)
    # The kept nodes of the last layer can be expected to hold K items.
    assert min(point[-1] for point in points) * index.items >= 20 * index.nodes(2)


def test_the_cheapest_widths_of_the_wanted_recall_are_found():
    index, scorer, users = tree()
    chosen, points = find(index, scorer, users, 20, RANK, 0.9, progress=False)
    assert chosen in points and chosen.recall >= 0.9
    assert all(point.ms >= chosen.ms for point in points if point.recall >= 0.9)
    exact, _ = find(index, scorer, users, 20, RANK, 1.0, progress=False)
    assert exact.recall == 1.0
    expected = exhaustive(index, scorer, users, 20, RANK)
    for row, top in enumerate(width_search.exact_tops(index, scorer, users, 20, RANK, progress=False)):
        np.testing.assert_array_equal(top, expected.item_ids[row])
    assert len(one_user(users, 0)) == 1


def test_widths_are_narrowed_as_far_as_the_recall_allows():
    index, scorer, users = tree(items=3000)
    tops = width_search.exact_tops(index, scorer, users, 20, RANK, progress=False)
    widest = index.nodes(1), index.nodes(2)
    found = width_search.narrowed(index, scorer, users, tops, 20, RANK, widest, 0.8)

    def recall(widths):
        return width_search.measure(index, scorer, users, tops, 20, RANK, [widths], progress=False)[0].recall

    assert recall(found) >= 0.8 and found[1] < widest[1]
    assert recall((widest[0], found[1] - max(1, found[1] // width_search.STEP))) < 0.8
    assert width_search.narrowed(index, scorer, users, tops, 20, RANK, widest, 1.1) == widest


def test_the_rate_of_a_whole_build_leaves_out_what_was_staged():
    built = {"seconds": 10.0, "files_staged_before": 2}
    assert scale._build_rate(1000, built | {"items_staged_before": 200}) == "80"
    assert scale._build_rate(1000, built | {"items_staged_before": 1000}) == "–"
    # Older ones say only how many files there were.
    assert scale._build_rate(10 * corpora.PART, built) == f"≥ {0.8 * corpora.PART:,.0f}"
    assert scale._build_rate(1000, built) == "–"
    assert scale._build_rate(1000, built | {"files_staged_before": 0}) == "100"


def test_targets_that_nothing_reaches():
    index, scorer, users = tree()
    with pytest.raises(SearchError, match=r"no widths reach recall 0\.5 in 1e-06 ms; nearest: widths \["):
        find(index, scorer, users, 20, RANK, 0.5, target_ms=1e-6, progress=False)
    with pytest.raises(SearchError, match=r"target recall 1\.5, expected above 0 and at most 1"):
        find(index, scorer, users, 20, RANK, 1.5, progress=False)
    flat = tree(layers=1)
    with pytest.raises(SearchError, match="a flat index has no widths to tune"):
        find(*flat, 20, RANK, 0.9, progress=False)


def test_what_is_timed_is_no_first_search(monkeypatch):
    index, scorer, users = tree()
    seen = []

    def counted(*arguments):
        seen.append(arguments[3])
        return search(*arguments)

    monkeypatch.setattr(width_search, "search", counted)
    points = [(8, 16), (16, 16)]
    few = Encoded(users.dense[:2], users.ids[:2])
    width_search.measure(index, scorer, few, [np.arange(20)] * 2, 20, RANK, points, progress=False)
    assert seen == points * 3, "once untimed, then for both users"


def test_the_front_is_what_nothing_beats():
    points = [
        Point((n,), recall, ms, ms, ms, (1.0,))
        for n, (recall, ms) in enumerate([(0.5, 1), (0.4, 2), (0.9, 3)])
    ]
    assert [width_search._on_front(point, points) for point in points] == [True, False, True]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A few steps on a tiny world, exported."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("scale") / "tiny"
    recipe = load_recipe("ads-scale")
    recipe = replace(
        recipe,
        data={
            "adapter": "synthetic",
            "options": {"users": 80, "ads": 500, "impressions": 1500, "days": 7, "seed": 3},
        },
        model=replace(recipe.model, layers=("cpu_s", "cpu_s", "cpu_s"), codebooks=(8, 4)),
        train=replace(recipe.train, max_steps=10, batch_size=64, refresh_steps=2),
        search=replace(recipe.search, widths=(4, 16), k=10, max_k=40),
    )
    dataset = load_data(recipe)
    Trainer(recipe, dataset, folder, progress=False).train()
    export_run(folder, progress=False)
    return folder, dataset


def test_corpora_of_two_sizes_share_their_files_and_are_measured(tiny_run, tmp_path, monkeypatch):
    folder, dataset = tiny_run
    monkeypatch.setattr(corpora, "PART", 64)
    monkeypatch.setattr(scale, "BLOCK", 2)
    monkeypatch.setattr(scale, "TOWER_BATCHES", 1)
    (choosing, _), (asked, _) = dataset.requests("valid", 3), dataset.requests("test", 4)
    arguments = folder, [530, 680], choosing, asked, tmp_path / "work"
    found = scale.run_scale(*arguments, k=10, target_recall=0.9, recall_requests=3, progress=False)
    small, large = found["sizes"]
    assert (small["items"], large["items"]) == (530, 680)
    for row in (small, large):
        assert row["recall_chosen_on"] >= 0.9
        assert 0 < row["search_recall"] <= 1 and row["recall_error"] >= 0
        assert row["nodes"][-1] == row["items"] and 0 < row["candidates"][0] <= row["nodes"][0]
        assert 0 < row["microseconds"]["p10"] <= row["microseconds"]["median"]
        assert row["cpu_microseconds"]["median"] > 0
        assert row["load_seconds"] > 0 and row["build"]["peak_rss_bytes"] > 0
    assert (small["ratio"], small["cpu_ratio"]) == (1.0, 1.0) and large["ratio"] > 0
    assert (found["requests"], found["tuned_on"], found["recall_requests"]) == (4, 3, 3)
    assert found["rates"]["tower_items_per_second"] > 0
    # What a request may not get is no part of what is looked for, and is found once.
    bundle = Bundle.open(tmp_path / "work" / "bundle-680")
    barred = bundle.index.item_ids[~open_items(bundle)]
    tops = [np.load(path) for path in (tmp_path / "work" / "tops-680").iterdir()]
    assert len(tops) == 6 and not np.isin(np.concatenate(tops), barred).any() and len(barred)
    with monkeypatch.context() as patch:
        patch.setattr(kept_tops, "best_items", None)
        again = scale.run_scale(*arguments, k=10, target_recall=0.9, recall_requests=3, progress=False)
    assert [row["recall_chosen_on"] >= 0.9 for row in again["sizes"]] == [True, True]
    items = sorted(path.name for path in (tmp_path / "work" / "items").iterdir())
    assert items == [
        "items-00000-30.hsnn", "items-00000.hsnn", "items-00001.hsnn", "items-00002-52.hsnn", "items-own.hsnn",
    ]  # fmt: skip
    (short, ids), (whole, all_ids) = (read_items(tmp_path / "work" / "items" / name) for name in items[:2])
    np.testing.assert_array_equal(ids, all_ids[:30])
    np.testing.assert_array_equal(short.ids, whole.ids[:30])

    again = scale.build(load_run(folder), scale.open_export(folder), 680, tmp_path / "work", progress=False)
    assert again == large["build"]  # the bundle is there: what was measured when it was made
    assert large["build"]["items_staged_before"] == 500 and large["build"]["files_staged_before"] == 1
    page = scale.report(found, "hsnn bench scale runs/tiny", "tiny", tmp_path / "results")
    assert "Simulated data." in page.read_text() and "680" in page.read_text()
    assert "on 3 validation requests" in page.read_text() and "on 3 test requests" in page.read_text()
    assert json.loads(page.with_suffix(".json").read_text())["sizes"][1]["items"] == 680
    assert page.with_suffix(".png").stat().st_size > 1000
    with pytest.raises(DataError, match="a corpus of 10 items, expected at least the 500"):
        corpora.corpus_files(load_run(folder), 10, tmp_path, progress=False)


def test_peers_stand_over_a_grown_corpus(tiny_run, tmp_path, monkeypatch):
    """Beyond MOST_OF_ALL only those that scale; Faiss is tuned on the items that a request may get."""
    folder, dataset = tiny_run
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    monkeypatch.setattr(serving_peers, "MOST_OF_ALL", 600)
    grown = serving_peers.Grown(640, tmp_path / "work")
    peers = serving_peers.build_peers(load_run(run), dataset, tmp_path / "repository", 10, 1, (4, 16), grown)
    assert [peer.model for peer in peers] == [
        "hsnn_in_process", "hsnn_bls", "two_tower_flat", "ebr_ivf", "echo"
    ]  # fmt: skip
    bundles = [Bundle.open(peer.exported.bundle) for peer in peers if peer.exported is not None]
    assert {bundle.index.items for bundle in bundles} == {640}
    np.testing.assert_array_equal(
        np.sort(bundles[0].index.item_ids), np.sort(bundles[-1].index.item_ids), "the same ads"
    )
    allowed = serving_peers._open_to_all(bundles[-1])(slice(0, 3))
    assert allowed.shape == (1, 640) and 0 < allowed.mean() < 1
    assert (tmp_path / "repository" / "ebr_ivf" / "1" / "items.faiss").stat().st_size > 0


def test_filters_of_every_selectivity_are_measured_beside_none(tiny_run, tmp_path):
    folder, dataset = tiny_run
    wire, _ = dataset.requests("test", 3)
    found = targeting.measure(
        folder, 640, wire, [4, 8], tmp_path / "work", 10, now=float(dataset.test.time.max()), progress=False
    )
    rows = {row["filter"]: row for row in found["filters"]}
    assert list(rows)[:2] == ["none", "the world's own"]
    assert rows["none"]["passed"] == rows["none"]["ratio"] == 1.0
    assert 0.1 < rows["the world's own"]["passed"] < 0.9
    # A filter that everything passes is searched like none.
    assert rows["drawn, 100.0%"]["candidates"] == rows["none"]["candidates"]
    assert rows["drawn, 100.0%"]["recall"] == rows["none"]["recall"]
    assert abs(rows["drawn, 10.0%"]["passed"] - 0.1) < 0.05
    assert all(row["returned"] == 1.0 for row in rows.values())
    page = targeting.report(found, "hsnn bench targeting runs/tiny", "tiny", tmp_path / "results")
    assert "Simulated data." in page.read_text() and "drawn, 1.0%" in page.read_text()
    assert page.with_suffix(".png").stat().st_size > 1000


def test_random_histories_return_nothing_that_must_not_be(tiny_run, tmp_path, monkeypatch):
    folder, dataset = tiny_run
    monkeypatch.setattr(filtering, "COMPACTED", 0.2)
    _, users = dataset.requests("test", 20)
    tally = filtering.run_filtering(folder, 600, 1, users, progress=False)
    assert (tally.wrong, tally.short) == ([], [])
    assert tally.queries == 640 and tally.items > 1000 and tally.updates > 50 and tally.deletes > 50
    page = filtering.report(tally, "hsnn bench filtering runs/tiny", "tiny", 1, tmp_path)
    assert "640 requests" in page.read_text() and "**0**" in page.read_text()
    # The check sees a filter that lets everything through.
    monkeypatch.setattr(TargetingFilter, "passes", lambda self, users, items: np.ones(len(items), bool))
    assert filtering.run_filtering(folder, 60, 1, users, progress=False).wrong


@pytest.mark.triton
def test_no_acknowledged_update_is_lost_when_something_is_killed(tiny_run, tmp_path, monkeypatch):
    """Five kills, one of each kind; `hsnn bench crashes` does a hundred."""
    with pytest.raises(DataError, match="max_k is 40, expected at least 60: one answer must hold all copies"):
        crashes.Crashes(tiny_run[0], tmp_path / "work", seed=1)
    monkeypatch.setattr(crashes, "COPIES", 30)
    bench = crashes.Crashes(tiny_run[0], tmp_path / "work", seed=1)
    try:
        outcomes, updates = bench.run(len(crashes.KINDS), progress=False)
    finally:
        bench.close()
    assert [outcome.details for outcome in outcomes.values()] == [[]] * len(crashes.KINDS)
    assert {(o.kills, o.lost, o.not_served) for o in outcomes.values()} == {(1, 0, 0)}
    assert updates > 0
    page = crashes.report(outcomes, updates, "hsnn bench crashes runs/tiny", "tiny", tmp_path)
    assert "5 kills with SIGKILL" in page.read_text()


@pytest.mark.triton
def test_updates_are_found_and_counted_under_load(tiny_run, tmp_path):
    folder, _ = tiny_run
    # All nodes: so few steps make no beam that finds a copy beside its original.
    found = live_items.run_live(
        folder, 640, [8, 32], tmp_path / "work", k=40, probes=4, rate=40.0, turns=1, turn_seconds=0.5, requests=20,
        command="hsnn bench live runs/tiny", say=lambda text: None,
    )  # fmt: skip
    fresh, steady = found["freshness"], found["sustained"]
    assert fresh["probes"] == 4 and fresh["lost"] == fresh["updates_refused"] == steady["refused"] == 0
    assert list(fresh["ways"]) == ["asked for", "repeated"]
    for of in fresh["ways"].values():
        assert 0 < of["p50_ms"] <= of["p99_ms"] <= of["most_ms"] < 5000
    assert steady["per_second"] > 0 and len(steady["turn_medians"]) == 1
    page = live_items.report(found, "tiny", tmp_path / "results")
    assert "Simulated data." in page.read_text() and "ratio of the medians" in page.read_text()
    assert page.with_suffix(".png").stat().st_size > 1000


def test_hsnn_tune_writes_its_choice_into_the_run(tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run[0], run)
    before = (run / "recipe.yaml").read_text()
    assert main(["tune", str(run), "--target-recall", "0.9", "--k", "10", "--requests", "4"]) == 0
    out = capsys.readouterr().out
    assert "search recall@10 on" in out and "simulated data" in out and "chosen" in out
    recipe = load_recipe_of_run(run)
    assert f"search.widths {list(recipe.search.widths)}" in out
    assert load_run(run).recipe == recipe
    assert (run / "plots" / "widths.png").stat().st_size > 1000
    set_widths(run, (4, 16))
    assert (run / "recipe.yaml").read_text() == before
    assert main(["tune", str(run), "--target-recall", "0.5", "--target-latency", "0.000001"]) == 1
    assert "no widths reach recall 0.5 in 1e-06 ms" in capsys.readouterr().err
    assert load_recipe_of_run(run).search.widths == (4, 16)
