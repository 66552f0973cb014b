"""The trained model on the real Triton: torch = ONNX Runtime = served, one version beside the next."""

import threading

import numpy as np
import pytest

from clients.retrieval import RetrievalClient, WireUsers
from export.pbtxt import ServingOptions
from export.publish import publish
from export.rollout import promote, rollback
from hsnn_cli.commands_training import load_data
from hsnn_cli.main import main
from hsnn_cli.pipeline import ask, check_against_offline, run_pipeline
from hsnn_server.triton import TritonServer
from hsnn_train.recipe import load_recipe

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def dataset(shop):
    return load_data(load_recipe(shop / "shop.yaml"))


@pytest.fixture(scope="module")
def server(shop):
    with TritonServer(shop / "repository") as running:
        assert promote(shop / "repository", running.admin) == 1
        yield running


def test_served_equals_the_offline_search_of_the_torch_model(shop, server, dataset):
    wire, users = dataset.requests("test", 60)
    with RetrievalClient(server.urls.grpc, timeout=20) as client:
        served = ask(client, wire, k=20)
    report = check_against_offline(shop / "run", users, served, 20)
    assert report["mismatched"] == 0
    assert report["largest_score_difference"] < 1e-4
    assert report["same_ids_in_order"] >= 58
    assert report["full_width_equals_exhaustive"] == "50 of 50"


def test_users_searched_together_get_what_they_get_alone(server, dataset):
    wire, _ = dataset.requests("test", 17)
    with RetrievalClient(server.urls.grpc, timeout=20) as client:
        together = client.retrieve(WireUsers(wire), k=15)
        for row in range(17):
            alone = client.retrieve(WireUsers({n: v[row : row + 1] for n, v in wire.items()}), k=15)[0]
            assert [h.item_id for h in together[row]] == [h.item_id for h in alone]
            np.testing.assert_allclose(
                [h.rank_score for h in together[row]], [h.rank_score for h in alone], atol=1e-5
            )


def test_a_person_can_query_with_plain_features(server, capsys):
    user = '{"age": 31, "country": "IT", "history": [1003, 1017]}'
    assert main(["query", "--url", server.urls.grpc, "--user", user, "--k", "7"]) == 0
    out = capsys.readouterr().out
    assert "P(click)" in out
    assert "layer 3" in out
    assert len([line for line in out.splitlines() if line.strip()[:1].isdigit()]) == 7
    assert main(["query", "--url", server.urls.grpc, "--user", '{"agee": 31}']) == 1
    assert "unknown feature 'agee'" in capsys.readouterr().err
    assert main(["query", "--url", server.urls.grpc, "--user", "{}", "--widths", "2,3", "--json"]) == 0


def test_an_unknown_user_with_an_empty_history_gets_an_answer(server):
    with RetrievalClient(server.urls.grpc, timeout=20) as client:
        hits = client.retrieve([{"country": "nowhere", "history": [999_999]}, {}], k=5)
    assert [len(h) for h in hits] == [5, 5]


def test_a_new_version_replaces_the_old_under_load_and_rolls_back(shop, server):
    repository = shop / "repository"
    stop, failures, versions = threading.Event(), [], set()

    def load():
        with RetrievalClient(server.urls.grpc, timeout=20) as client:
            while not stop.is_set():
                try:
                    versions.add(client.retrieve([{"age": 20}], k=5).version)
                except Exception as error:
                    failures.append(repr(error))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert publish(shop / "run", repository) == 2
        assert promote(repository, server.admin) == 2
        with RetrievalClient(server.urls.grpc, timeout=20) as client:
            assert client.retrieve([{}], k=3).version == "2"
        assert rollback(repository, server.admin) == 1
        with RetrievalClient(server.urls.grpc, timeout=20) as client:
            assert client.retrieve([{}], k=3).version == "1"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert versions == {"1", "2"}


def test_in_process_mode_serves_the_same(shop, tmp_path, dataset):
    publish(shop / "run", tmp_path / "repository", options=ServingOptions(mode="in_process"))
    wire, users = dataset.requests("test", 30)
    with TritonServer(tmp_path / "repository") as running:
        promote(tmp_path / "repository", running.admin)
        with RetrievalClient(running.urls.grpc, timeout=20) as client:
            assert client.connect().mode == "in_process"
            served = ask(client, wire, k=20)
    assert check_against_offline(shop / "run", users, served, 20)["mismatched"] == 0


def test_pipeline_reports_what_it_measured(shop, tmp_path):
    report = run_pipeline(load_recipe(shop / "shop.yaml"), tmp_path / "work", users=10, k=10)
    assert report["offline"]["users"] == 10
    assert report["offline"]["mismatched"] == 0
    assert report["served"]["p50_ms_client"] > 0
    assert report["simulated"] is False
    assert (tmp_path / "work" / "report.json").exists()
