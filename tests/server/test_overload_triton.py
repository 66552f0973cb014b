"""A real Triton under more load than it can bear: who is answered, who is refused, and when."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tiny_snapshot import LAYERS, TinySnapshot, tiny_users, write_configs, write_snapshot

from clients.encode import UserEncoder
from clients.load import FAILED, Fates, each_user, poisson_load, serialise
from clients.retrieval import RetrievalClient
from hsnn_core.errors import DeadlineExceeded, HsnnError, Overloaded, RequestError, ServerError
from hsnn_server.probe import HEALTHY, _Probe
from hsnn_server.triton import TritonServer

pytestmark = pytest.mark.triton

VERSION, DEADLINE = 1, 1.0
USERS = 64  # per request, so that a search is slow beside what generator and server do for each request
NETWORKS = ["hsnn_user_tower", *(f"hsnn_scorer_l{layer}" for layer in range(1, LAYERS + 1))]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> TinySnapshot:
    snapshot = write_snapshot(tmp_path_factory.mktemp("repository"), VERSION)
    parameters = {"mode": "in_process", "workers": "1", "queue": "1000"}
    write_configs(snapshot.root, snapshot.schema, {"hsnn_retrieve": parameters})
    return snapshot


@pytest.fixture(scope="module")
def server(snapshot: TinySnapshot) -> Iterator[TritonServer]:
    with TritonServer(snapshot.root, models=["hsnn_retrieve"]) as running:
        yield running


@pytest.fixture(scope="module")
def requests() -> list[list[dict[str, Any]]]:
    """Different ones."""
    users = tiny_users()
    return [[users[(row + shift) % 8] for row in range(USERS)] for shift in range(8)]


@pytest.fixture(scope="module")
def capacity(server: TritonServer, requests: list[list[dict[str, Any]]]) -> float:
    """Requests a second that one client gets answered after another."""
    with RetrievalClient(server.urls.grpc, timeout=20) as client:
        client.retrieve(requests[0])
        began = time.perf_counter()
        for number in range(40):
            client.retrieve(requests[number % 8])
    return 40 / (time.perf_counter() - began)


def load(server: TritonServer, requests: list[list[dict[str, Any]]], rate: float, seconds: float) -> Fates:
    with RetrievalClient(server.urls.grpc, timeout=20) as client:
        model = client.connect()
    encoder = UserEncoder(model.schema)
    messages = serialise(model, map(encoder.encode, requests), deadline=DEADLINE)
    assert len(messages) == len(set(messages)) == 8
    return poisson_load(server.urls.grpc, messages, rate, seconds, DEADLINE)


def test_below_capacity_all_are_answered(
    server: TritonServer, requests: list[list[dict[str, Any]]], capacity: float
) -> None:
    fates = load(server, requests, capacity / 5, 3.0)
    assert fates.failures == ()
    assert fates.counts()["answered"] == len(fates) > 0
    assert (fates.slip >= 0).all()
    assert (fates.latency > 0).all()


def test_at_overload_the_others_are_refused_in_time(
    server: TritonServer, requests: list[list[dict[str, Any]]], capacity: float
) -> None:
    """Several times what one client gets through, for longer than the deadline: without admission the queue alone
    would take longer. Times are compared with the deadline only, hundreds of searches long."""
    fates = load(server, requests, 4 * capacity, 5.0)
    counts = fates.counts()
    assert counts["failed"] == 0, fates.failures
    assert counts["answered"] > 0
    assert fates.answered_in_time >= 0.9 * counts["answered"], counts
    assert fates.answered_late == counts["answered"] - fates.answered_in_time
    assert fates.refused_in_time >= 0.9 * (counts["refused"] + counts["expired"]), counts
    with RetrievalClient(server.urls.grpc, timeout=20) as client:
        assert client.retrieve(tiny_users()), "and it is well afterwards"


def test_the_client_tells_a_refusal(server: TritonServer) -> None:
    with RetrievalClient(server.urls.grpc, timeout=20) as client:
        for _ in range(20):
            client.retrieve(tiny_users())
        with pytest.raises((Overloaded, DeadlineExceeded)) as failure:
            client.retrieve(tiny_users() * 8, timeout=0.0011)
        assert "ms" in str(failure.value)


def test_what_the_generator_refuses(server: TritonServer) -> None:
    with pytest.raises(RequestError, match="rate: got 0, expected a number > 0"):
        poisson_load(server.urls.grpc, [b""], 0, 1.0, 1.0)
    with pytest.raises(RequestError, match="messages: got none"):
        poisson_load(server.urls.grpc, [], 1.0, 1.0, 1.0)
    with pytest.raises(ServerError, match="nobody answers at 127.0.0.1:9"):
        poisson_load("127.0.0.1:9", [b""], 1.0, 1.0, 1.0)


def test_other_failures_are_told_apart(server: TritonServer, snapshot: TinySnapshot) -> None:
    with RetrievalClient(server.urls.grpc, timeout=20) as client:
        model = replace(client.connect(), name="nosuch")
    messages = serialise(model, each_user(snapshot.users))
    fates = poisson_load(server.urls.grpc, messages, 50.0, 0.5, 1.0)
    assert (fates.outcome == FAILED).all()
    assert any("nosuch" in failure for failure in fates.failures)


def test_the_probe_counts_answers_and_no_refusals(server: TritonServer, snapshot: TinySnapshot) -> None:
    """What tells an overload from workers that hang."""
    asked = _Probe(server.urls.http, snapshot.root, time.monotonic() + 60, 60)
    assert asked.found()[0] == HEALTHY
    time.sleep(0.5)  # counters are reported four times a second
    before = asked.answered(server.urls.metrics)
    assert before is not None and before > 0
    with RetrievalClient(server.urls.grpc, timeout=20) as client:
        for _ in range(3):
            client.retrieve(tiny_users())
        with pytest.raises(HsnnError):
            client.retrieve(tiny_users() * 8, timeout=0.0011)
    time.sleep(0.5)
    assert asked.answered(server.urls.metrics) == before + 3
