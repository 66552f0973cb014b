"""The orchestrator and both clients on a real Triton, over a tiny hand-made snapshot."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_snapshot import (
    LAYERS,
    SCHEMA,
    K,
    TinySnapshot,
    item_ids,
    tiny_users,
    write_configs,
    write_snapshot,
)
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from clients.aio import AsyncRetrievalClient
from clients.retrieval import Hit, RetrievalClient, ServedModel
from clients.wire import Codec
from hsnn_core.errors import (
    DeadlineExceeded,
    FeatureError,
    HsnnError,
    RequestError,
    SchemaMismatch,
    ServerError,
)
from hsnn_core.schema import Schema
from hsnn_core.search import SearchResult
from hsnn_server.triton import TritonServer

pytestmark = pytest.mark.triton

VERSION = 7
IN_PROCESS, NARROW = "hsnn_retrieve_in_process", "hsnn_retrieve_narrow"
NETWORKS = ["hsnn_user_tower", *(f"hsnn_scorer_l{layer}" for layer in range(1, LAYERS + 1))]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> TinySnapshot:
    """Version 7 of everything; the networks alone also have a version 8, with other weights."""
    root = tmp_path_factory.mktemp("repository")
    snapshot = write_snapshot(root, VERSION)
    newer = write_snapshot(tmp_path_factory.mktemp("newer"), VERSION + 1, seed=5)
    for model in NETWORKS:
        source = newer.root / model / str(VERSION + 1)
        source.rename(root / model / str(VERSION + 1))
    for copy in (IN_PROCESS, NARROW):
        (root / copy).mkdir()
        (root / copy / str(VERSION)).symlink_to(snapshot.version_directory)
    write_configs(
        root,
        snapshot.schema,
        {
            "hsnn_retrieve": {},
            IN_PROCESS: {"mode": "in_process"},
            NARROW: {"workers": "1", "queue": "0"},
        },
    )
    return snapshot


@pytest.fixture(scope="module")
def server(snapshot: TinySnapshot) -> Iterator[TritonServer]:
    with TritonServer(snapshot.root, models=[*NETWORKS, "hsnn_retrieve", IN_PROCESS, NARROW]) as running:
        yield running


@pytest.fixture
def client(server: TritonServer) -> Iterator[RetrievalClient]:
    with RetrievalClient(server.urls.grpc, timeout=20) as connected:
        yield connected


def assert_equal(hits: list[list[Hit]], expected: SearchResult) -> None:
    for row, (found, valid) in enumerate(zip(hits, expected.valid, strict=True)):
        assert [hit.item_id for hit in found] == expected.item_ids[row, :valid].tolist()
        scores = np.array([list(hit.scores.values()) for hit in found])
        np.testing.assert_allclose(scores, expected.probabilities[row, :valid], atol=1e-6)
        ranks = [hit.rank_score for hit in found]
        np.testing.assert_allclose(ranks, expected.rank_score[row, :valid], atol=1e-6)


@pytest.mark.parametrize("model", ["hsnn_retrieve", IN_PROCESS])
@pytest.mark.parametrize(("k", "widths"), [(None, None), (5, (1, 1)), (20, (4, 16))])
def test_served_equals_offline(
    server: TritonServer, snapshot: TinySnapshot, model: str, k: int | None, widths: tuple[int, ...] | None
) -> None:
    with RetrievalClient(server.urls.grpc, timeout=20, model=model) as client:
        results = client.retrieve(tiny_users(), k=k, widths=widths)
    options: dict[str, Any] = {"k": k or K} | ({"widths": widths} if widths else {})
    assert_equal(results, snapshot.offline(**options))
    assert server.ready("hsnn_user_tower", VERSION + 1)  # newer networks are there, and are not asked
    assert results.version == str(VERSION)
    assert results.timings is None
    assert list(results[0][0].scores) == ["click", "conversion"]


def test_a_batch_equals_its_users_one_by_one(client: RetrievalClient, snapshot: TinySnapshot) -> None:
    users = tiny_users()
    together = client.retrieve(users)
    alone = [client.retrieve([user])[0] for user in users]
    assert [[hit.item_id for hit in hits] for hits in together] == [
        [hit.item_id for hit in hits] for hits in alone
    ]


def test_k_beyond_the_corpus_gives_what_there_is(client: RetrievalClient) -> None:
    (hits,) = client.retrieve(tiny_users()[:1], k=100, widths=(4, 16))
    assert len(hits) == len({hit.item_id for hit in hits}) == 60
    assert all(hit.item_id >= 1000 for hit in hits)
    assert [hit.rank_score for hit in hits] == sorted((hit.rank_score for hit in hits), reverse=True)


def test_timings_come_when_asked_for(client: RetrievalClient) -> None:
    timings = client.retrieve(tiny_users(), timings=True).timings
    assert timings is not None
    assert len(timings.layers) == LAYERS
    assert min(timings.user_tower, *timings.layers) > 0
    assert timings.total >= timings.user_tower + sum(timings.layers)


def test_the_asyncio_client_equals_the_synchronous_one(server: TritonServer, client: RetrievalClient) -> None:
    async def retrieve_many() -> list[Any]:
        async with AsyncRetrievalClient(server.urls.grpc, timeout=20) as aio:
            assert await aio.connect() == client.connect()
            return await asyncio.gather(*(aio.retrieve([user], k=5) for user in tiny_users()))

    results = asyncio.run(retrieve_many())
    assert [result[0] for result in results] == [client.retrieve([user], k=5)[0] for user in tiny_users()]


def test_the_asyncio_client_raises_the_same_errors(server: TritonServer) -> None:
    async def ask(k: int, **options: Any) -> None:
        async with AsyncRetrievalClient(server.urls.grpc, timeout=20, **options) as aio:
            await aio.retrieve(tiny_users(), k=k)

    with pytest.raises(RequestError, match="k: got 101, expected at most 100"):
        asyncio.run(ask(101))
    with pytest.raises(ServerError, match="no nosuch .*; publish a snapshot"):
        asyncio.run(ask(1, model="nosuch"))


@pytest.mark.parametrize("model", ["hsnn_retrieve", IN_PROCESS])
def test_concurrent_requests_do_not_mix(server: TritonServer, snapshot: TinySnapshot, model: str) -> None:
    users = tiny_users()
    with RetrievalClient(server.urls.grpc, timeout=60, model=model) as client:
        expected = [client.retrieve([user])[0] for user in users]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda n: client.retrieve([users[n % 8]])[0], range(96)))
    assert all(answer == expected[number % 8] for number, answer in enumerate(answers))


def test_the_served_model_tells_its_schema_and_defaults(
    client: RetrievalClient, snapshot: TinySnapshot
) -> None:
    model = client.connect()
    assert model.schema == snapshot.schema
    assert (model.k, model.widths, model.mode, model.max_users) == (10, (3, 6), "bls", 64)


def test_an_expected_schema_that_differs_is_refused(server: TritonServer, snapshot: TinySnapshot) -> None:
    ours = Schema.from_dict(SCHEMA | {"name": "other"})
    with (
        RetrievalClient(server.urls.grpc, expected_schema=ours) as client,
        pytest.raises(SchemaMismatch) as failure,
    ):
        client.connect()
    for text in (ours.hash, snapshot.schema.hash, "name: 'other' != 'tiny'"):
        assert text in str(failure.value)


def stale(model: ServedModel, **features: Any) -> Codec:
    """As a client holds it that connected before the server moved to today's schema."""
    user = SCHEMA["features"]["user"] | features  # type: ignore[index]
    changed = SCHEMA | {"features": SCHEMA["features"] | {"user": user}}  # type: ignore[operator]
    return Codec(replace(model, schema=Schema.from_dict(changed)))


@pytest.mark.parametrize("change", [{"age": {"kind": "dense", "default": 1.0}}, {"city": {"kind": "dense"}}])
def test_a_client_follows_the_server_to_another_schema(
    client: RetrievalClient, server: TritonServer, change: dict[str, Any]
) -> None:
    expected, served = client.retrieve(tiny_users()), client.connect()
    client._codec = stale(served, **change)
    assert client.retrieve(tiny_users()) == expected
    assert client.connect() == served

    async def ask() -> Any:
        async with AsyncRetrievalClient(server.urls.grpc, timeout=20) as aio:
            aio._codec = stale(served, **change)
            return await aio.retrieve(tiny_users())

    assert asyncio.run(ask()) == expected
    codec = stale(served, **change)
    with RetrievalClient(server.urls.grpc, timeout=20, expected_schema=codec.model.schema) as strict:
        strict._codec = codec
        with pytest.raises(SchemaMismatch, match=r"first difference .*: features.user\."):
            strict.retrieve(tiny_users())


@pytest.mark.parametrize(
    ("users", "options", "kind", "text"),
    [
        ([{"aeg": 3}], {}, FeatureError, "user 0: unknown feature 'aeg'"),
        ([{"age": float("inf")}], {}, FeatureError, "feature 'age': got inf, expected finite"),
        ([{}] * 65, {}, RequestError, "got 65, expected at most 64"),
        ([{}], {"k": 0}, RequestError, "k: got 0, expected a whole number >= 1"),
        ([{}], {"k": 101}, RequestError, "k: got 101, expected at most 100"),
        ([{}], {"widths": (4,)}, RequestError, "widths: got [4], expected 2 numbers"),
        ([{}], {"widths": (4, 0)}, RequestError, "widths: got 0, expected a whole number"),
        ([{}], {"timeout": 0}, RequestError, "timeout: got 0"),
    ],
)
def test_bad_requests_are_named(
    client: RetrievalClient, users: list[Any], options: dict[str, Any], kind: type[HsnnError], text: str
) -> None:
    with pytest.raises(kind) as failure:
        client.retrieve(users, **options)
    assert text in str(failure.value)


def raw_infer(server: TritonServer, tensors: dict[str, np.ndarray], **options: Any) -> Any:
    """A client that is not ours."""
    names = {np.dtype(np.float32): "FP32", np.dtype(np.float64): "FP64", np.dtype(np.int64): "INT64"}
    inputs = []
    for name, values in tensors.items():
        inputs.append(InferInput(name, list(values.shape), names[values.dtype]))
        inputs[-1].set_data_from_numpy(values)
    client = InferenceServerClient(server.urls.grpc)
    try:
        return client.infer("hsnn_retrieve", inputs, **options)
    finally:
        client.close()


@pytest.mark.parametrize(
    ("change", "options", "status", "text"),
    [
        ({"age": np.full((8, 1), np.nan, np.float32)}, {}, "INVALID_ARGUMENT", "FeatureError: "),
        ({"age": np.zeros((8, 2), np.float32)}, {}, "INVALID_ARGUMENT", "shape for input 'age'"),
        ({"age": np.zeros((8, 1), np.float64)}, {}, "INVALID_ARGUMENT", "data-type is 'FP64'"),
        ({"agee": np.zeros((8, 1), np.float32)}, {}, "INVALID_ARGUMENT", "'agee'"),
        ({}, {"parameters": {"k": "many"}}, "INVALID_ARGUMENT", "RequestError: k: got 'many'"),
        ({}, {"parameters": {"beam": 3}}, "INVALID_ARGUMENT", "unknown request parameters ['beam']"),
        ({}, {"parameters": {"schema_hash": "0" * 16}}, "INVALID_ARGUMENT", "SchemaMismatch: "),
        ({}, {"timeout": 1}, "CANCELLED", "DeadlineExceeded: the request took"),
    ],
)
def test_what_other_clients_get_wrong(
    server: TritonServer,
    snapshot: TinySnapshot,
    change: dict[str, np.ndarray],
    options: dict[str, Any],
    status: str,
    text: str,
) -> None:
    with pytest.raises(InferenceServerException) as failure:
        raw_infer(server, snapshot.users | change, **options)
    assert failure.value.status() == f"StatusCode.{status}"
    assert text in failure.value.message()


def test_a_missing_tensor_is_named(server: TritonServer, snapshot: TinySnapshot) -> None:
    tensors = {name: value for name, value in snapshot.users.items() if name != "country"}
    with pytest.raises(InferenceServerException, match="country"):
        raw_infer(server, tensors)


def test_bytes_that_are_no_text_are_refused_over_http(server: TritonServer, snapshot: TinySnapshot) -> None:
    inputs = [
        {"name": name, "shape": [1, values.shape[1]], "datatype": kind, "data": values[0].tolist()}
        for name, values in snapshot.users.items()
        for kind in ["FP32" if values.dtype == np.float32 else "INT64"]
    ]
    for marked in ({"id": "?"}, {"parameters": {"?": 1}}, {"parameters": {"tasks": "?"}}):
        body = json.dumps({"inputs": inputs, **marked}).encode().replace(b"?", b"\xff")
        connection = http.client.HTTPConnection(server.urls.http, timeout=20)
        connection.request("POST", "/v2/models/hsnn_retrieve/infer", body)
        answer = connection.getresponse()
        assert (answer.status, b"is not valid UTF-8" in answer.read()) == (400, True)
        connection.close()


def test_too_little_time_is_a_deadline(client: RetrievalClient) -> None:
    client.connect()
    with pytest.raises(DeadlineExceeded, match="allow a longer timeout"):
        client.retrieve(tiny_users(), timeout=1e-4)


def test_a_full_server_refuses_at_once_and_stays_well(server: TritonServer) -> None:
    with RetrievalClient(server.urls.grpc, timeout=60, model=NARROW) as client:
        expected = client.retrieve(tiny_users())

        def ask(_: int) -> Any:
            try:
                return client.retrieve(tiny_users())
            except ServerError as error:
                return error

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(40)))
        refused = [answer for answer in answers if isinstance(answer, ServerError)]
        assert refused
        assert {str(error).split(";")[0] for error in refused} == {
            "1 requests are running and 0 are waiting, which is all this server takes"
        }
        assert all(answer == expected for answer in answers if not isinstance(answer, ServerError))
        time.sleep(0.05)
        assert client.retrieve(tiny_users()) == expected


def test_nobody_there(tmp_path: Path) -> None:
    with (
        RetrievalClient("127.0.0.1:9", timeout=2) as client,
        pytest.raises(ServerError, match="127.0.0.1:9 is unavailable .*; check that Triton runs there"),
    ):
        client.retrieve(tiny_users())


def test_metrics_are_exported(server: TritonServer, client: RetrievalClient) -> None:
    with pytest.raises(RequestError):
        client.retrieve(tiny_users(), k=101)
    client.retrieve(tiny_users())
    assert client.retrieve([{}], exclude_items=item_ids()) == [[]]
    server.unload("hsnn_scorer_l2")
    with pytest.raises(ServerError, match="hsnn_scorer_l2 version 7 failed"):
        client.retrieve([{}])
    server.load("hsnn_scorer_l2")
    url = f"http://{server.urls.metrics}/metrics"
    wanted = [
        'hsnn_requests_total{outcome="ok",version="7"}',
        'hsnn_requests_total{outcome="invalid",version="7"}',
        'hsnn_request_seconds_bucket{version="7",le="0.5"}',
        'hsnn_layer_seconds_count{layer="3",version="7"}',
        'hsnn_candidates_total{layer="1",version="7"}',
        'hsnn_users_total{version="7"}',
        'hsnn_empty_results_total{version="7"}',
        'hsnn_eligible_share_count{version="7"}',
        'hsnn_bls_failures_total{model="hsnn_scorer_l2",version="7"}',
    ]
    until = time.monotonic() + 10
    while True:
        with urllib.request.urlopen(url) as reply:
            lines = dict(line.rsplit(" ", 1) for line in reply.read().decode().splitlines() if line[0] != "#")
        if all(float(lines.get(name, 0)) > 0 for name in wanted):
            break
        assert time.monotonic() < until, {name: lines.get(name) for name in wanted}
        time.sleep(0.1)
    assert float(lines['hsnn_requests_in_flight{version="7"}']) == 0
    assert float(lines['hsnn_workers{version="7"}']) in (1, 4), "three models here share their metrics"
    assert abs(time.time() - float(lines['hsnn_snapshot_created_seconds{version="7"}'])) < 600
    assert float(lines['hsnn_eligible_share_bucket{version="7",le="0"}']) >= 1


def test_refused_and_failed_requests_are_logged(server: TritonServer, snapshot: TinySnapshot) -> None:
    secret = 314159.25
    tensors = snapshot.users | {"age": np.full((8, 1), secret, np.float32)}
    tensors["age"][3] = np.inf
    with pytest.raises(InferenceServerException, match="inf"):
        raw_infer(server, tensors, request_id="ad-17")
    lines: list[dict[str, Any]] = []
    until = time.monotonic() + 10
    while not lines and time.monotonic() < until:
        time.sleep(0.1)
        texts = [line for line in server.log_file.read_text().splitlines() if line.startswith("{")]
        lines = [line for line in map(json.loads, texts) if line.get("request_id") == "ad-17"]
    assert [(line["outcome"], line["code"], line["error"]) for line in lines] == [
        ("invalid", "INVALID_ARGUMENT", "FeatureError")
    ]
    assert lines[0]["message"] == "feature 'age': got [#] in row #, expected finite numbers"
    assert (lines[0]["users"], lines[0]["version"], lines[0]["model"]) == (8, VERSION, "hsnn_retrieve")
    assert "314159" not in server.log_file.read_text()


def test_a_config_with_another_schema_does_not_load(snapshot: TinySnapshot, server: TritonServer) -> None:
    name = "hsnn_retrieve_mismatch"
    (snapshot.root / name).mkdir()
    (snapshot.root / name / str(VERSION)).symlink_to(snapshot.version_directory)
    write_configs(snapshot.root, snapshot.schema, {name: {"schema_hash": "f" * 16}})
    with pytest.raises(ServerError, match=f"config.pbtxt says {'f' * 16} .* a new schema needs"):
        server.load(name)
