"""Targeting on a real Triton: every user gets the best of the items that their request may get, and no others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tiny_snapshot import (
    ITEMS,
    LAYERS,
    SCHEMA,
    TinySnapshot,
    item_ids,
    tiny_users,
    write_configs,
    write_snapshot,
)

from clients.aio import AsyncRetrievalClient
from clients.retrieval import Hit, RetrievalClient
from hsnn_core.errors import FeatureError, RequestError
from hsnn_core.exhaustive import exhaustive
from hsnn_core.item_attributes import ItemAttributes
from hsnn_core.item_filter import MaskFilter
from hsnn_core.onnx_runner import OnnxRunner
from hsnn_core.schema import Schema
from hsnn_server.triton import TritonServer

pytestmark = pytest.mark.triton

TARGETED = Schema.from_dict(
    SCHEMA
    | {
        "eligibility": {
            "market": {"kind": "set", "type": "string", "max": 2, "ask": 2},
            "running": {"kind": "range", "from": "start", "until": "end", "default": "now"},
            "age": {"kind": "range", "from": "youngest", "until": "oldest"},
            "paused": {"kind": "flag"},
            "owner": {"kind": "key"},
        },
        "bid": "bid",
    }
)
NOW = time.time()
ROWS: list[dict[str, Any]] = [
    {
        "market": [[], ["IT"], ["IT", "DE"], ["JP"]][row % 4],
        "running": [[None, None], [NOW - 100, NOW + 10_000], [None, NOW - 100]][row % 3],
        "age": [None, 18] if row % 10 == 9 else None,
        "paused": row % 7 == 0,
        "owner": row % 5,
    }
    for row in range(ITEMS)
]
BIDS = [0.1 + row * 7 % 13 for row in range(ITEMS)]
FULL = (4, 16)  # every node is kept
REQUESTS: list[dict[str, Any]] = [
    {},
    {"context": {"market": "IT"}},
    {"context": {"market": ["DE", "JP"], "running": NOW - 200}},
    {"context": {"market": "nowhere", "age": 17.5}, "exclude": {"owner": [1, 3]}},
    {"exclude_items": [*item_ids()[:30].tolist(), 5]},
    {
        "context": {"market": "IT"},
        "exclude": {"owner": 2},
        "exclude_items": item_ids()[::2],
        "rank_by": "bid",
    },
    {"rank_by": "bid", "tasks": ["conversion"]},
    {"exclude_items": item_ids()},
]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> TinySnapshot:
    attributes = ItemAttributes.from_rows(TARGETED, ROWS, BIDS)
    snapshot = write_snapshot(
        tmp_path_factory.mktemp("repository"), 1, schema=TARGETED, attributes=attributes
    )
    write_configs(snapshot.root, TARGETED, {"hsnn_retrieve": {"mode": "in_process"}})
    return snapshot


@pytest.fixture(scope="module")
def server(snapshot: TinySnapshot) -> Iterator[TritonServer]:
    models = [
        "hsnn_user_tower",
        *(f"hsnn_scorer_l{layer}" for layer in range(1, LAYERS + 1)),
        "hsnn_retrieve",
    ]
    with TritonServer(snapshot.root, models=models) as running:
        yield running


@pytest.fixture
def client(server: TritonServer) -> Iterator[RetrievalClient]:
    with RetrievalClient(server.urls.grpc, timeout=20) as connected:
        yield connected


def may_get(row: int, request: dict[str, Any]) -> bool:
    """Item by item, in plain words."""
    item, context = ROWS[row], request.get("context", {})
    asked = context.get("market", [])
    markets = {asked} if isinstance(asked, str) else set(asked)
    start, until = item["running"]
    running = context.get("running", NOW)
    age = context.get("age")
    barred = np.atleast_1d(request.get("exclude", {}).get("owner", []))
    return (
        (not item["market"] or bool(markets & set(item["market"])))
        and (start is None or running >= start)
        and (until is None or running < until)
        and (item["age"] is None or (age is not None and age < 18))
        and not item["paused"]
        and item["owner"] not in barred
        and item_ids()[row] not in request.get("exclude_items", [])
    )


def best_of(snapshot: TinySnapshot, request: dict[str, Any], users: int = 8) -> list[list[int]]:
    """The best 20 of every item that the request may get, scored by all networks offline."""
    row_of = {item: row for row, item in enumerate(item_ids().tolist())}
    rows = np.array([row_of[item] for item in snapshot.index.item_ids.tolist()])  # by position
    allowed = np.array([may_get(row, request) for row in range(ITEMS)])[rows]
    tasks = request.get("tasks")
    rank = TARGETED.rank if tasks is None else np.array([float(t.name in tasks) for t in TARGETED.tasks])
    scorer = snapshot.bundle.scorer(OnnxRunner(snapshot.user_tower, snapshot.scorers))
    encoded = snapshot.bundle.transform.encode_users(snapshot.users)
    mask = MaskFilter(snapshot.index, np.tile(allowed, (users, 1)))
    found = exhaustive(snapshot.index, scorer, encoded, ITEMS, rank, mask)
    answer = []
    for row, valid in enumerate(found.valid):
        scores = found.rank_score[row, :valid].astype(np.float64)
        if request.get("rank_by") == "bid":
            bids = np.array(BIDS, np.float32)[rows[found.positions[row, :valid]]]
            scores = scores + np.log(bids)
        order = np.argsort(-scores, kind="stable")[:20]
        answer.append(found.item_ids[row, :valid][order].tolist())
    return answer


def ids(hits: list[list[Hit]]) -> list[list[int]]:
    return [[hit.item_id for hit in row] for row in hits]


@pytest.mark.parametrize("request_", REQUESTS)
def test_the_best_of_what_a_request_may_get(
    client: RetrievalClient, snapshot: TinySnapshot, request_: dict[str, Any]
) -> None:
    assert ids(client.retrieve(tiny_users(), k=20, widths=FULL, **request_)) == best_of(snapshot, request_)


def test_every_user_has_a_context_of_their_own_and_requests_of_all_kinds_mix(
    server: TritonServer, client: RetrievalClient, snapshot: TinySnapshot
) -> None:
    alone = REQUESTS[:5]
    expected = [best_of(snapshot, request)[row] for row, request in enumerate(alone)]
    together = client.retrieve(
        tiny_users()[:5],
        k=20,
        widths=FULL,
        context=[request.get("context") for request in alone],
        exclude=[request.get("exclude") for request in alone],
        exclude_items=[request.get("exclude_items", []) for request in alone],
    )
    assert ids(together) == expected

    def ask(number: int) -> list[list[int]]:
        request = alone[number % 5]
        return ids(client.retrieve([tiny_users()[number % 5]], k=20, widths=FULL, **request))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(60))) == [[expected[number % 5]] for number in range(60)]

    async def ask_too() -> list[list[int]]:
        async with AsyncRetrievalClient(server.urls.grpc, timeout=20) as aio:
            return ids(await aio.retrieve(tiny_users(), k=20, widths=FULL, **REQUESTS[5]))

    assert asyncio.run(ask_too()) == best_of(snapshot, REQUESTS[5])


@pytest.mark.parametrize("widths", [(1, 1), (3, 6)])
def test_k_come_back_from_the_narrowest_beam(client: RetrievalClient, widths: tuple[int, int]) -> None:
    for request in REQUESTS[:4]:
        there = sum(may_get(row, request) for row in range(ITEMS))
        for k in (1, 5, 20):
            answer = client.retrieve(tiny_users(), k=k, widths=widths, **request)
            assert {len(hits) for hits in answer} == {min(k, there)}
            rows = {(hit.item_id - 1000) // 7 for hits in answer for hit in hits}
            assert all(may_get(row, request) for row in rows)


@pytest.mark.parametrize(
    ("request_", "kind", "text"),
    [
        ({"context": {"marketed": "IT"}}, FeatureError, "unknown attribute 'marketed'"),
        (
            {"context": {"market": 3}},
            FeatureError,
            "attribute 'market': got 3 (int) as a key, expected a string",
        ),
        (
            {"exclude": {"market": ["IT"]}},
            FeatureError,
            "unknown attribute 'market', expected among ['owner']",
        ),
        ({"rank_by": "price"}, RequestError, "rank_by: got 'price', expected one of ['probability', 'bid']"),
    ],
)
def test_what_is_wrong_is_said(
    client: RetrievalClient, request_: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind) as caught:
        client.retrieve(tiny_users(), **request_)
    assert text in str(caught.value)
