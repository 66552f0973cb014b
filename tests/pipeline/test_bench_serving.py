"""hsnn bench serving on a small trained run: all peers answer in one Triton, and the report says what they did."""

import json

import pytest

from hsnn_bench import serving
from hsnn_cli.main import main

pytestmark = pytest.mark.triton

MODELS = ["hsnn_in_process", "hsnn_bls", "monn_flat", "two_tower_flat", "ebr_ivf", "ebr_hnsw", "echo"]


@pytest.fixture(scope="module")
def report(shop, tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    command = ["bench", "serving", str(shop / "run"), "--k", "20", "--requests", "20", "--rounds", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "_SETTLE", 0.01)
        assert main([*command, "--recall-requests", "10", "--results", str(results)]) == 0
    return results


def test_every_peer_is_measured(report):
    found = json.loads((report / "serving-shop-200.json").read_text())
    assert [row["model"] for row in found["rows"]] == MODELS
    assert found["items"] == 200 and found["k"] == 20 and not found["simulated"]
    for row in found["rows"]:
        assert 0 < row["cpu_ms"]["low"] <= row["cpu_ms"]["median"] <= row["cpu_ms"]["high"]
        assert row["latency_ms"]["p50"] > 0 and row["latency_ms"]["p99"] is None, "30 requests have no p99"
    by_model = {row["model"]: row for row in found["rows"]}
    assert by_model["ebr_ivf"]["against_ebr_ivf"] == {"cpu": 1.0, "p50": 1.0}
    assert by_model["echo"]["recall"] is None


def test_answers_are_compared_with_the_models_own_exhaustive_scores(report):
    by_model = {
        row["model"]: row for row in json.loads((report / "serving-shop-200.json").read_text())["rows"]
    }
    assert by_model["two_tower_flat"]["recall"] == by_model["monn_flat"]["recall"] == 1.0
    assert by_model["ebr_ivf"]["recall"] > 0.9, "tuned on other requests to 0.95"
    assert by_model["ebr_hnsw"]["recall"] > 0.9
    assert by_model["hsnn_in_process"]["recall"] == by_model["hsnn_bls"]["recall"] > 0.5
    assert by_model["two_tower_flat"]["recall_error"] == 0.0
    assert 0 <= by_model["ebr_ivf"]["recall_error"] < 0.1


def test_the_report_names_the_command_and_draws(report):
    page = (report / "serving-shop-200.md").read_text()
    assert "hsnn bench serving " in page and "--k 20 --requests 20 --rounds 3" in page
    assert all(
        label in page
        for label in (
            "EBR: two-tower + Faiss IVF", "two-tower + Faiss, all items", "echo (floor of the server)",
            "MoNN (small), flat", "| – |", " ± ",
        )
    )  # fmt: skip
    assert (report / "serving-shop-200.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_left_in_the_run(shop, report):
    assert not list((shop / "run").glob(".serving-*"))


def test_what_it_needs(shop, tmp_path, capsys):
    assert main(["bench", "serving", str(shop / "run"), "--rounds", "0"]) == 1
    assert "--rounds: got 0, expected at least 1" in capsys.readouterr().err
    assert main(["bench", "serving", str(tmp_path)]) == 1
    assert "no recipe.yaml there" in capsys.readouterr().err
