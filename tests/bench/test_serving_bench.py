"""What `hsnn bench serving` makes of its samples, without a server."""

from pathlib import Path

import numpy as np
import pytest

from hsnn_bench import serving
from hsnn_bench.serving import Measured
from hsnn_bench.serving_peers import Peer
from hsnn_bench.serving_report import render


def row(rounds, shares, model="ebr_ivf"):
    waited = np.arange(rounds * serving.BLOCK, dtype=float).reshape(rounds, serving.BLOCK)
    return serving._row(Peer(model, model, None, {}), Measured(waited, np.ones(rounds)), shares)


def test_few_samples_have_no_p99_and_recall_has_its_error():
    few, many = row(99, [0.9, 1.0]), row(100, [])
    assert few["latency_ms"]["p99"] is None and many["latency_ms"]["p99"] == pytest.approx(989.01)
    assert few["recall"] == pytest.approx(0.95) and few["recall_error"] == pytest.approx(0.05)
    assert (many["recall"], many["recall_error"]) == (None, None)
    assert row(1, [0.9])["recall_error"] is None


def test_the_page_says_dashes_for_what_there_is_not():
    report = {
        "recipe": "tiny", "simulated": True, "command": "hsnn bench serving runs/tiny", "commit": "abc",
        "machine": "x", "date": "today", "items": 200, "k": 10, "requests": 20, "rounds": 99,
        "block": serving.BLOCK, "recall_requests": 2, "idle_cpu_share": 0.01,
        "rows": serving._ratios([row(99, [0.9, 1.0]), row(99, [], "echo")]),
    }  # fmt: skip
    lines = [line for line in render(report).splitlines() if line.startswith(("| ebr_ivf", "| echo"))]
    assert "| – | 1.00 | 1.00 | 0.9500 ± 0.0500 |" in lines[0]
    assert "| – | 1.00 | 1.00 | – |" in lines[1]


def test_recall_is_the_share_of_each_requests_own_top():
    twins = serving._Twins.__new__(serving._Twins)
    twins._known = {(Path("export"), 0): [np.array([1, 2, 3, 4]), np.array([], int), np.array([5, 6])]}

    class Exported:
        path = Path("export")

    peer = Peer("ebr_ivf", "", Exported(), {}, task=0)
    answers = [np.array([4, 3, 9]), np.array([], int), np.array([5, 6])]
    assert twins.recall(peer, answers) == [0.5, 1.0]
    assert twins.recall(Peer("echo", "", None, {}), []) == []
