"""Item updates through a real Triton: the client, hsnn_index and the log on the disk."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from index_repository import ELIGIBLE, write_index
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from clients.items import ItemClient
from hsnn_core.errors import DeadlineExceeded, RequestError, ServerError
from hsnn_core.item_log import Entry, ItemLog, LogReader
from hsnn_core.item_updates import Update
from hsnn_server.probe import _Probe
from hsnn_server.processes import wait_until
from hsnn_server.triton import TritonServer

pytestmark = pytest.mark.triton

LOG = Path(".items") / "log.db"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    write_index(root, 1)
    return root


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, models=["hsnn_index"]) as running:
        yield running


@pytest.fixture
def client(server: TritonServer) -> Iterator[ItemClient]:
    with ItemClient(server.urls.grpc, batch=50) as connected:
        yield connected


@pytest.fixture
def reader(repository: Path) -> Iterator[LogReader]:
    with LogReader(repository / LOG, ELIGIBLE.hash) as reader:
        yield reader


def test_what_is_acknowledged_is_in_the_log(client: ItemClient, reader: LogReader) -> None:
    before = client.stats()
    rows = [{"id": n, "features": {"category": [n, 2], "price": 1.5}, "bid": 0.5} for n in range(120)]
    counted: list[int] = []
    results = client.upsert(rows, progress=counted.append)
    assert (results.status, results.messages) == (["applied"] * 120, [""] * 120)
    assert counted == [50, 50, 20]
    assert results.position == reader.position() == before.position + 120
    entries = reader.since(before.position, 1000)
    assert [entry.item for entry in entries] == list(range(120))
    assert entries[7].payload is not None
    assert Update.from_json(entries[7].payload) == Update(
        7, entries[7].sequence, features={"category": [7, 2], "price": 1.5}, bid=0.5
    )
    assert abs(entries[7].sequence / 1e6 - time.time()) < 60  # this client's clock
    deleted = client.delete([3, 4])
    assert deleted.count("applied") == 2
    assert [(e.item, e.deleted, e.payload) for e in reader.since(results.position, 9)] == [
        (3, True, None),
        (4, True, None),
    ]
    stats = client.stats()
    assert (stats.live - before.live, stats.deleted - before.deleted) == (118, 2)
    assert (stats.position, stats.oldest, stats.schema_hash) == (deleted.position, 0, ELIGIBLE.hash)
    assert stats.identity == reader.identity()
    assert client.schema() == ELIGIBLE


def test_bad_updates_are_refused_alone(client: ItemClient, reader: LogReader) -> None:
    rows = [
        {"id": 500, "sequence": 5, "features": {"price": 2}},
        {"id": 501, "sequence": 5, "features": {"price": float("nan")}},
        {"id": 502, "sequence": 5, "features": {"price": np.float32(2), "category": np.array([1, 2])}},
        {"id": "x", "sequence": 5},
        {"id": 503, "sequence": -1},
        {"id": 504, "sequence": 5, "features": {"prize": 2}},
        {
            "id": 505,
            "sequence": 5,
            "eligibility": {"country": ["IT"], "running": [None, 2e9], "paused": False},
        },
        {"id": 506, "sequence": 5, "features": {"price": {1, 2}}},
        {"id": 507, "sequence": 5, "deleted": True},
        {"id": 508, "sequence": 2**62 + 1},
    ]
    results = client.upsert(rows)
    assert [row["id"] for row, status in zip(rows, results.status) if status == "applied"] == [
        500,
        502,
        505,
        507,
    ]
    reasons = dict(results.reasons("refused"))
    assert set(results.status) == {"applied", "refused"}
    for number, text in {
        1: "item 501: feature 'price': got nan, expected finite float32 numbers",
        3: "id: got 'x' (str), expected an integer of 64 bits",
        4: "item 503: sequence: got -1 (int), expected a whole number from 0 to 2**62",
        5: "item 504: unknown item feature 'prize', expected one of item, category, price; did you mean 'price'?",
        7: "expected values that JSON can hold",
        9: "item 508: sequence: got 4611686018427387905",
    }.items():
        assert text in reasons.pop(number)
    assert not reasons
    assert {entry.item for entry in reader.since(results.position - 4, 9)} == {500, 502, 505, 507}


def test_repeated_and_older_updates_are_stale(client: ItemClient) -> None:
    first = client.upsert(
        [{"id": 900, "sequence": 5}, {"id": 900, "sequence": 7}, {"id": 900, "sequence": 6}]
    )
    assert first.status == ["applied", "applied", "stale"]
    assert first.messages[2] == "item 900: sequence 6 is older than 7, which the log has"
    again = client.delete([900], sequence=7)
    assert (again.status, again.messages) == (["stale"], ["item 900: sequence 7 is in the log already"])
    assert again.position == first.position


def test_a_clock_that_is_far_off_is_refused(server: TritonServer) -> None:
    with ItemClient(server.urls.grpc, clock=lambda: time.time_ns() + 3600 * 10**9) as ahead:
        with pytest.raises(
            RequestError, match=r"clock: the client's is 3[56]\d\d s ahead of this server's.*at most 300"
        ):
            ahead.upsert([{"id": 1}])
        assert ahead.upsert([{"id": 1, "sequence": 2**60}]).status == ["applied"]


def test_calls_that_are_refused_as_a_whole(server: TritonServer, client: ItemClient) -> None:
    with ItemClient(server.urls.grpc, batch=10_000) as large:
        assert large.upsert({"id": n, "sequence": 1} for n in range(10_000)).position > 0
    with pytest.raises(RequestError, match=r"batch: got 10001, expected 1\.\.10000 updates in one call"):
        ItemClient(server.urls.grpc, batch=10_001)
    grpc = InferenceServerClient(server.urls.grpc)
    many = InferInput("updates", [10_001], "BYTES")
    many.set_data_from_numpy(np.full(10_001, b"{}", np.object_))
    with pytest.raises(
        InferenceServerException, match="updates: got 10001, expected at most 10000 in one call; split"
    ):
        grpc.infer("hsnn_index", [many])
    with pytest.raises(
        InferenceServerException, match=r"unknown request parameters \['clok'\], expected among \['clock'"
    ):
        grpc.infer("hsnn_index", [many], parameters={"clok": 1})
    with (
        pytest.raises(DeadlineExceeded, match="allow a longer timeout, or send fewer updates at a time"),
        ItemClient(server.urls.grpc, timeout=1e-4, batch=10_000) as hasty,
    ):
        hasty.upsert({"id": n} for n in range(10_000))  # one alone may be answered in time
    with (
        ItemClient("127.0.0.1:9", timeout=2) as nobody,
        pytest.raises(ServerError, match="check that Triton runs"),
    ):
        nobody.delete([1])


def metrics(server: TritonServer) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{server.urls.metrics}/metrics") as reply:
        lines = [line.rsplit(" ", 1) for line in reply.read().decode().splitlines() if line[0] != "#"]
    return {series: float(value) for series, value in lines}


def failed_calls(server: TritonServer) -> float:
    """Calls of the item writer that Triton counts as failed, whatever the reason."""
    return sum(
        value
        for series, value in metrics(server).items()
        if series.startswith('nv_inference_request_failure{model="hsnn_index"')
    )


def test_metrics_count_outcomes(server: TritonServer, client: ItemClient) -> None:
    results = client.upsert(
        [{"id": 950, "sequence": 1}, {"id": 950, "sequence": 1}, {"id": 950}, {"id": "x"}]
    )
    assert sorted(set(results.status)) == ["applied", "refused", "stale"]
    counted = metrics(server)
    for outcome in ("applied", "stale", "refused"):
        assert counted[f'hsnn_item_updates_total{{outcome="{outcome}",version="1"}}'] >= 1
    assert counted['hsnn_item_log_position{version="1"}'] == results.position


def test_versions_of_one_server_write_side_by_side_and_another_server_is_refused(
    server: TritonServer, client: ItemClient, repository: Path, tmp_path: Path
) -> None:
    """A rollout: version 2 is loaded while 1 serves. Then a second server on the same log, and at last alone."""
    write_index(repository, 2)
    server.load("hsnn_index")
    assert server.admin.versions("hsnn_index") == [1, 2]
    for version in ("1", "2"):
        one = InferInput("updates", [1], "BYTES")
        one.set_data_from_numpy(np.array([b'{"id": 20990, "sequence": %s}' % version.encode()], np.object_))
        answer = InferenceServerClient(server.urls.grpc).infer("hsnn_index", [one], model_version=version)
        assert answer.as_numpy("status").tolist() == [0]
    other = tmp_path / "other"
    write_index(other, 1, item_log=str(repository / LOG))
    with TritonServer(other, models=["hsnn_index"]) as second:
        with ItemClient(second.urls.grpc) as elsewhere:
            before = client.stats().position
            refused = elsewhere.upsert([{"id": 991}, {"id": 992}])
            assert refused.status == ["failed", "failed"]
            assert f"another server, process {server.pid} on " in refused.messages[0]
            assert "give each server a log of its own" in refused.messages[1]
            assert client.stats().position == before
            server.unload("hsnn_index")
            assert elsewhere.upsert([{"id": 991}]).status == ["applied"]
        server.load("hsnn_index")
        assert client.upsert([{"id": 993}]).status == ["failed"]
    assert wait_until(lambda: client.upsert([{"id": 993}]).status == ["applied"], 5.0)


def test_a_killed_stub_is_loaded_again_and_a_killed_server_leaves_the_log_to_the_next(tmp_path: Path) -> None:
    write_index(tmp_path, 1)
    server = TritonServer(tmp_path, models=["hsnn_index"]).start()
    asked = _Probe(server.urls.http, tmp_path, time.monotonic() + 60, 60)
    with ItemClient(server.urls.grpc) as client:
        client.upsert([{"id": 1, "sequence": 4}])
        assert asked.dead_writer() == "" and client.stats().position == 1, "a probe changes nothing"
        (stub,) = (pid for pid in server.pids if pid != server.pid)
        os.kill(stub, signal.SIGKILL)
        assert asked.dead_writer() == "Stub process 'hsnn_index_0_0' is not healthy."
        failures = failed_calls(server)
        with pytest.raises(
            ServerError, match="the process of hsnn_index at .* has died .*; load the model again"
        ):
            client.upsert([{"id": 1, "sequence": 5}])
        assert wait_until(lambda: failed_calls(server) > failures, 10.0), "what HsnnUpdatesUnanswered sees"
        server.load("hsnn_index")
        assert client.upsert([{"id": 1, "sequence": 5}]).status == ["applied"]
    os.killpg(server.pid, signal.SIGKILL)
    server.stop()
    with TritonServer(tmp_path, models=["hsnn_index"]) as again, ItemClient(again.urls.grpc) as client:
        assert wait_until(lambda: client.upsert([{"id": 2, "sequence": 5}]).status == ["applied"], 5.0)
    with LogReader(tmp_path / LOG, ELIGIBLE.hash) as reader:
        assert [(e.item, e.sequence) for e in reader.since(0, 9)] == [(1, 5), (2, 5)]


def test_a_log_that_cannot_be_opened_refuses_with_the_reason(tmp_path: Path) -> None:
    """Another schema's log, then none: the model loads all the same, and takes updates as soon as it can."""
    write_index(tmp_path, 1)
    ItemLog.open(tmp_path / LOG, "0" * 16).close()
    with TritonServer(tmp_path, models=["hsnn_index"]) as server:
        assert "item updates are refused for now" in server.log_file.read_text()
        with ItemClient(server.urls.grpc) as client:
            refused = client.upsert([{"id": 1}])
            assert (refused.status, refused.position) == (["failed"], 0)
            assert f"holds updates of the schema {'0' * 16}, expected {ELIGIBLE.hash}" in refused.messages[0]
            with pytest.raises(ServerError, match="holds updates of the schema"):
                client.stats()
            for file in (tmp_path / LOG).parent.glob("log.db*"):
                if file.suffix != ".owner":
                    file.unlink()
            assert client.upsert([{"id": 1, "sequence": 3}]).position == 1
    with LogReader(tmp_path / LOG, ELIGIBLE.hash) as reader:
        assert reader.since(0, 9) == [Entry(1, 1, 3, False, Update(1, 3).to_json())]
