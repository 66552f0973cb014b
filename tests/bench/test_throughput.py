"""The throughput bench: both trainings are run, and the ratio is that of its times."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hsnn_bench.throughput import run_throughput
from hsnn_core.errors import SchemaError


def test_report(recipe_file, tmp_path):
    report = run_throughput(str(recipe_file), steps=3, rounds=2, results=tmp_path)
    joint, alone = (row["seconds"] for row in report["rows"])
    assert report["ratio"] == pytest.approx(np.median([b / a for a, b in zip(joint, alone)]))
    rates = [row["impressions_per_second"] for row in report["rows"]]
    assert rates == pytest.approx([3 * 32 / np.median(joint), 3 * 32 / np.median(alone)])
    assert json.loads((tmp_path / "throughput-halves.json").read_text()) == report
    page = (tmp_path / "throughput-halves.md").read_text()
    assert f"{report['ratio']:.3f}" in page and "--steps 3 --rounds 2" in page


def test_what_it_refuses(recipe_file, tmp_path):
    with pytest.raises(SchemaError, match=r"--steps: got 0, expected at least 1"):
        run_throughput(str(recipe_file), steps=0, results=tmp_path)
    with pytest.raises(SchemaError, match=r"no model.codebooks, so no index is learnt"):
        run_throughput("completejourney", results=tmp_path)
