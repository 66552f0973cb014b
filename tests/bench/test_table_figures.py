"""Figures: what is read from metrics, means over seeds, what is a tie."""

import pytest

from hsnn_bench.figures import by_figure, gap_closure, read_metrics, relative_change, summarise
from hsnn_core.errors import DataError

METRICS = {
    "pointwise": [
        {"layer": 1, "task": "click", "ne": 0.95, "calibration": 1.02},
        {"layer": 2, "task": "click", "ne": 0.9, "calibration": 1.01},
        {"layer": 2, "task": "buy", "ne": None, "calibration": 0.98},
    ],
    "index": [
        {"layer": 1, "codewords": 4, "occupancy": 0.75, "largest_share": 0.5},
        {"layer": 2, "codewords": 10, "occupancy": 1.0, "largest_share": 0.3},
    ],
    "retrieval": {
        "requests": 3,
        "search": {"recall@100": 0.5, "ndcg@10": 0.1},
        "exhaustive": {"recall@100": 0.6},
        "search_recall": {"@100": 0.8},
        "scored_share": 0.25,
    },
    "seconds": {"train": 120.0},
}


def test_figures_are_of_the_item_layer_and_the_search_and_the_worst_calibration_of_any_layer():
    assert read_metrics(METRICS) == {
        "ne.click": 0.9,
        "calibration.click": 1.01,
        "calibration.buy": 0.98,
        "lowest_calibration": 0.98,
        "highest_calibration": 1.02,
        "recall@100": 0.5,
        "ndcg@10": 0.1,
        "exhaustive_recall@100": 0.6,
        "search_recall@100": 0.8,
        "scored_share": 0.25,
        "occupancy": 0.75,
        "largest_node": 3.0,
        "train_minutes": 2.0,
    }


def test_a_run_without_requests_has_its_pointwise_figures():
    found = read_metrics(METRICS | {"index": [], "retrieval": {"requests": 0}})
    calibrations = {"calibration.click", "calibration.buy", "lowest_calibration", "highest_calibration"}
    assert set(found) == {"ne.click", "train_minutes"} | calibrations


def test_metrics_without_their_parts_are_named():
    with pytest.raises(DataError, match="metrics without 'retrieval': .*train it again"):
        read_metrics({name: value for name, value in METRICS.items() if name != "retrieval"})


def test_mean_and_deviation_over_the_seeds_that_have_a_figure():
    figures = by_figure({1: {"a": 1.0, "b": 5.0}, 2: {"a": 3.0}})
    assert (figures["a"].mean, figures["a"].std) == (2.0, pytest.approx(2**0.5))
    assert (figures["b"].mean, figures["b"].std) == (5.0, None)
    assert summarise({}) is None


def test_a_difference_is_a_tie_when_its_interval_holds_0():
    reference = summarise({1: 1.0, 2: 2.0, 3: 4.0})
    steady = relative_change(summarise({1: 0.99, 2: 1.98, 3: 3.97}), reference)
    # changes -1, -1, -0.75 percent; deviation 0.1443, t(0.975, 2) = 4.3027
    assert steady.percent == pytest.approx(-11 / 12)
    assert steady.interval == pytest.approx(4.3027 * 0.144338 / 3**0.5, rel=1e-4)
    assert steady.tie is False
    shaky = relative_change(summarise({1: 1.02, 2: 1.98, 3: 4.0}), reference)
    assert shaky.tie is True


def test_seeds_are_paired_and_one_seed_says_nothing():
    change = relative_change(summarise({2: 1.1, 3: 9.0}), summarise({1: 5.0, 2: 1.0}))
    assert change.percent == pytest.approx(10.0)
    assert (change.interval, change.tie) == (None, None)
    assert relative_change(summarise({1: 1.0}), summarise({2: 1.0})) is None
    assert relative_change(summarise({1: 1.0}), summarise({1: 0.0})) is None
    assert relative_change(None, summarise({1: 0.0})) is None


def test_equal_rows_tie():
    same = summarise({1: 1.0, 2: 2.0})
    change = relative_change(same, same)
    assert (change.percent, change.tie) == (0.0, True)


def test_gap_closure_needs_a_gap():
    ebr, xl = summarise({1: 0.2}), summarise({1: 0.4})
    assert gap_closure(summarise({1: 0.39}), ebr, xl) == pytest.approx(0.95)
    assert gap_closure(summarise({1: 0.39}), xl, ebr) is None
    assert gap_closure(summarise({1: 0.39}), None, xl) is None
    assert gap_closure(summarise({2: 0.39}), ebr, xl) is None


def test_gap_closure_compares_the_seeds_that_all_have():
    ebr, xl = summarise({1: 0.2, 2: 0.3}), summarise({1: 0.4, 2: 0.9})
    assert gap_closure(summarise({1: 0.3}), ebr, xl) == pytest.approx(0.5)
