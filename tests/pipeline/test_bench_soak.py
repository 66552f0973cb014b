"""hsnn bench soak: a short one on a real Triton, and the arithmetic of growth."""

import csv
import json

import numpy as np
import pytest

from clients.load import OK, REFUSED, Fates
from hsnn_bench.soak import growth
from hsnn_cli.main import main


def test_growth_is_taken_after_it_has_settled():
    minutes = np.arange(0, 60, 0.5)
    values = np.where(minutes < 5, 50.0, 100.0 + minutes)  # 1 a minute
    found = growth(minutes, values)
    assert found["per_hour"] == pytest.approx(60, rel=1e-6)
    assert found["growth"] == pytest.approx(found["last"] - found["first"])
    assert 45 < found["growth"] < 50 and found["most"] == values.max()
    flat = growth(minutes, np.full(len(minutes), 7.0))
    assert flat["growth"] == 0 and flat["per_hour"] == pytest.approx(0, abs=1e-9)
    assert growth(np.array([0.0]), np.array([3.0]))["per_hour"] == 0


def test_refusals_do_not_make_a_server_look_fast():
    latency, outcome = np.array([0.001] * 7 + [0.03, 0.05]), np.array([REFUSED] * 7 + [OK, OK], np.int8)
    fates = Fates(1.0, np.zeros(9), latency, outcome, 0.1, ())
    assert fates.milliseconds(50) == pytest.approx(40)
    nobody = Fates(1.0, np.zeros(7), latency[:7], outcome[:7], 0.1, ())
    assert np.isnan(nobody.milliseconds(99))


@pytest.mark.triton
def test_a_short_soak(shop, tmp_path):
    command = [
        "bench",
        "soak",
        str(shop / "run"),
        "--repository",
        str(shop / "repository"),
        "--capacity",
        "25",
    ]
    options = ["--minutes", "0.1", "--latency-ms", "2000", "--k", "20", "--results", str(tmp_path)]
    assert main([*command, *options]) == 0
    report = json.loads((tmp_path / "soak-shop-200-bls.json").read_text())
    asked = report["requests"]
    assert asked["sent"] > 0 and asked["failed"] == 0
    assert report["resident_mib"]["first"] > 1 and report["shared_mib"]["first"] > 0
    assert report["cpu_cores"] > 0
    rows = list(csv.DictReader((tmp_path / "soak-shop-200-bls.csv").read_text().splitlines()))
    assert len(rows) >= 4 and float(rows[-1]["minutes"]) > float(rows[0]["minutes"])
    page = (tmp_path / "soak-shop-200-bls.md").read_text()
    assert "--capacity 25 --minutes 0.1" in page and "p50 / p99 of the answers" in page
    assert (tmp_path / "soak-shop-200-bls.png").read_bytes().startswith(b"\x89PNG")


def test_what_it_refuses(shop, capsys):
    command = [
        "bench",
        "soak",
        str(shop / "run"),
        "--repository",
        str(shop / "repository"),
        "--capacity",
        "0",
    ]
    assert main(command) == 1
    assert "--capacity: got 0.0, expected a number > 0" in capsys.readouterr().err
