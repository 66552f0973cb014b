from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "core"))
sys.path.append(str(Path(__file__).parents[1] / "export"))
from core_fakes import fake_scorer, one_user, random_index, random_users
from untrained import JOINT, TARGETED, untrained_run

from clients.wire import Hit, Results, Timings
from export.export_run import export_run
from export.sample_users import sample_users
from hsnn_bench import bare_loops, breakdown, oracle, orchestrator
from hsnn_bench.orchestrator import Answer, interleave
from hsnn_core.bundle import Bundle
from hsnn_core.errors import DataError, HsnnError, PublishError
from hsnn_core.exhaustive import exhaustive
from hsnn_core.item_filter import MaskFilter


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 12, 500])
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_the_oracle_by_pieces_is_the_exhaustive_twin(monkeypatch, layers, k, step):
    monkeypatch.setattr(oracle, "PIECE", 37)
    rng = np.random.default_rng(layers)
    index = random_index(rng, layers, 200)
    scorer, _ = fake_scorer(rng, index, step)
    users, rank = random_users(rng, 3), np.array([1.0, 0.5], np.float32)
    expected = exhaustive(index, scorer, users, k, rank)
    for row in range(3):
        found = oracle.best_items(index, scorer, one_user(users, row), k, rank)
        np.testing.assert_array_equal(found, expected.item_ids[row, : expected.valid[row]])
    mask = rng.random(200) < 0.3
    expected = exhaustive(index, scorer, users, k, rank, MaskFilter(index, np.tile(mask, (3, 1))))
    for row in range(3):
        found = oracle.best_items(index, scorer, one_user(users, row), k, rank, mask)
        np.testing.assert_array_equal(found, expected.item_ids[row, : expected.valid[row]])


def test_every_request_goes_through_every_way_before_the_next():
    calls = []

    def way(name):
        def ask(wire):
            calls.append((name, int(wire["x"][0])))
            return Answer(np.array([1]), 1.0, [1])

        return ask

    requests = [{"x": np.array([number])} for number in range(3)]
    answers = interleave({"a": way("a"), "b": way("b")}, requests, rounds=2)
    counted = calls[6:]  # after the warm-up
    assert counted[:6] == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert [number for _, number in counted] == [0, 0, 1, 1, 2, 2] * 2
    assert {name: len(given) for name, given in answers.items()} == {"a": 6, "b": 6}


def test_of_triton_the_call_is_timed_and_not_the_clients_parsing(monkeypatch):
    class SlowCodec:
        def __init__(self, model):
            pass

        def request(self, users, question):
            time.sleep(0.05)
            return {"model_name": "m"}

        def answer(self, given):
            time.sleep(0.05)
            return Results([[Hit(7, {}, 0.5)]], "1", Timings(1, (2, 3), 9))

    monkeypatch.setattr(orchestrator, "Codec", SlowCodec)
    client, triton = (
        SimpleNamespace(connect=lambda: None),
        SimpleNamespace(infer=lambda **_: time.sleep(0.01)),
    )
    answer = orchestrator.through(client, triton, [4], 1)({"age": np.zeros((1, 1), np.float32)})
    assert 10_000 <= answer.microseconds < 50_000
    assert answer.item_ids.tolist() == [7] and answer.stages == [1, 2, 3, 9]


@pytest.fixture(scope="module")
def exported_run(tmp_path_factory):
    """An exported run and four requests."""
    run = tmp_path_factory.mktemp("ways") / "run"
    untrained_run(run, JOINT, TARGETED)
    bundle = Bundle.open(export_run(run, progress=False).bundle)
    return run, sample_users(bundle.schema, bundle.transform, 4, seed=2)


def test_a_search_by_steps_is_the_search(exported_run):
    run, wire = exported_run
    timed = breakdown.TimedSearch(run, [3, 6], 7)
    taken = timed({name: value[:1] for name, value in wire.items()})
    steps = [f"layer {layer}: {step}" for layer in (1, 2, 3) for step in breakdown.STEPS]
    assert set(steps) < set(taken) and all(taken[step] > 0 for step in steps)
    # What the stopwatches saw of a layer is less than the layer took.
    assert all(sum(taken[f"layer {n}: {step}"] for step in breakdown.STEPS) > 0 for n in (1, 2, 3))
    again = timed({name: value[:1] for name, value in wire.items()})
    assert set(again) == set(taken), "a second search begins at zero"


def test_bare_loops_alone_and_at_once(exported_run):
    run, wire = exported_run
    found = bare_loops.bare_loops(run, wire, k=7, seconds=0.2)
    assert found["loops"] >= 1 and found["widths"] == [2, 2]
    for kind in ("alone", "at_once"):
        assert found[kind]["requests_per_second"] > 5 and found[kind]["cpu_ms"] > 0
    # A loop alone has no more CPU time than the time that passes.
    assert found["alone"]["requests_per_second"] * found["alone"]["cpu_ms"] < 1100


def test_a_bare_loop_that_fails_does_not_keep_the_others(exported_run):
    run, wire = exported_run
    broken = wire | {"age": wire["age"].astype(np.int64)}
    with pytest.raises(HsnnError, match="age"):
        bare_loops.bare_loops(run, broken, k=7, seconds=60.0)


@pytest.mark.triton
def test_the_breakdown_and_its_report(exported_run, tmp_path):
    run, wire = exported_run
    found = breakdown.measure(run, wire, widths=[3, 6], k=7, rounds=1, progress=False)
    assert list(found["microseconds"]) == ["bare loop", "triton, in_process", "triton, bls"]
    assert {of["calls"] for of in found["networks"].values()} == {4}, "one message per network and request"
    assert all(of["run"] > 0 for of in found["networks"].values())
    page = breakdown.report(found, "hsnn bench breakdown runs/x", "x", tmp_path / "results", True)
    text = page.read_text()
    assert "Simulated data." in text and "hsnn_scorer_l3" in text and "gRPC, Triton" in text
    assert json.loads(page.with_suffix(".json").read_text())["widths"] == [3, 6]
    assert page.with_suffix(".png").stat().st_size > 1000
    with pytest.raises(DataError, match="no requests to measure with"):
        breakdown.measure(run, {}, widths=None, k=None, rounds=1)


@pytest.mark.triton
def test_the_three_ways_and_their_report(exported_run, tmp_path):
    run, wire = exported_run
    found = orchestrator.measure(run, wire, widths=[3, 6], k=7, rounds=2, progress=False)
    assert list(found["ways"]) == ["bare loop", "triton, in_process", "triton, bls"]
    for given in found["ways"].values():
        spread = given["microseconds"]
        assert 0 < spread["p10"] <= spread["median"] <= spread["p90"]
        assert len(given["stages"]) == 5 and given["stages"][-1] <= spread["p90"]
    assert found["index"][-1] == 60 and 0 < found["search_recall"] <= 1
    everything = orchestrator.measure(run, wire, widths=[100, 100], k=7, recall_requests=2, progress=False)
    assert everything["search_recall"] == 1.0 and everything["recall_requests"] == 2

    page = orchestrator.report(found, "hsnn bench orchestrator runs/x", "x", tmp_path / "results", True)
    text = page.read_text()
    assert "Simulated data." in text and "triton, bls" in text and "widths [3, 6], K = 7" in text
    saved = json.loads(page.with_suffix(".json").read_text())
    assert saved["search_recall"] == found["search_recall"] and saved["simulated"] is True
    assert page.with_suffix(".png").stat().st_size > 1000


def test_ways_that_disagree_are_refused():
    def answers(*ids):
        return [Answer(np.array(given), 1.0, [1]) for given in ids]

    orchestrator._same_items({"bare loop": answers([1, 2]), "triton, bls": answers([1, 2])})
    with pytest.raises(
        DataError, match=r"request 1: triton, bls returned other items than bare loop \(1 of 2"
    ):
        orchestrator._same_items({"bare loop": answers([1], [1, 2]), "triton, bls": answers([1], [2, 3])})


def test_what_cannot_be_measured(tmp_path):
    with pytest.raises(DataError, match="no requests to measure with"):
        orchestrator.measure(tmp_path, {})
    with pytest.raises(PublishError, match=r"no export\.json"):
        orchestrator.measure(tmp_path, {"age": np.zeros((1, 1), np.float32)})
