"""hsnn bench capacity with the real perf_analyzer against a real Triton, its own and one that runs already."""

import json

import pytest

from export.rollout import promote
from hsnn_bench import capacity_search
from hsnn_bench.perf_analyzer import find
from hsnn_cli.main import main
from hsnn_core.errors import ServerError
from hsnn_server.triton import TritonServer

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module", autouse=True)
def tool():
    try:
        return find()
    except ServerError as error:
        pytest.skip(str(error))


def test_against_its_own_server_and_a_running_one(shop, tmp_path, capsys, monkeypatch):
    for name, value in {
        "CLOSED_LADDER": (1, 2),
        "VOTES": 1,
        "PRECISION": 1.5,
    }.items():  # as few levels as can be
        monkeypatch.setattr(capacity_search, name, value)
    limit = ["--latency-ms", "400", "--percentile", "90", "--seconds", "1", "--arrivals", "20"]
    limit += ["--k", "20", "--requests", "50"]
    command = ["bench", "capacity", str(shop / "run"), *limit, "--results", str(tmp_path)]
    with TritonServer(shop / "repository") as server:
        promote(shop / "repository", server.admin)
        where = ["--url", server.urls.grpc, "--metrics-url", server.urls.metrics]
        assert main([*command, *where]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "capacity-shop-200-bls.json").read_text())
    assert report["closed"]["throughput"] > 0
    assert report["capacity"] > 0
    assert 10 < report["requests"] <= 50, "distinct ones: few users have few features"
    for over in report["overload"]:
        assert [run["failed"] for run in over["runs"]] == [0, 0, 0], over["runs"]
        assert over["median"]["answered"] > 0 and sum(over["outcomes"].values()) > 0
    assert any(name.startswith("nv_inference_request_success") for name in report["metrics"])
    assert {level["kind"] for level in report["levels"]} == {"closed", "open"}


def test_another_schema_and_nobody_there_are_refused(shop, capsys):
    assert main(["bench", "capacity", str(shop / "run"), "--url", "127.0.0.1:9"]) == 1
    assert "127.0.0.1:9 is unavailable" in capsys.readouterr().err
