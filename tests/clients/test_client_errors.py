"""What a failed call becomes, and which calls are tried again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from clients.aio import AsyncRetrievalClient
from clients.errors import Patience, told, translate
from clients.retrieval import RetrievalClient
from hsnn_core.errors import (
    DeadlineExceeded,
    HsnnError,
    Overloaded,
    RequestError,
    SchemaMismatch,
    ServerError,
)


def failure(status: str, message: str) -> InferenceServerException:
    return InferenceServerException(message, status=f"StatusCode.{status}")


@pytest.mark.parametrize(
    ("status", "message", "kind", "text"),
    [
        ("INVALID_ARGUMENT", "FeatureError: feature 'age': got nan", RequestError, "feature 'age': got nan"),
        (
            "INVALID_ARGUMENT",
            "unexpected inference input 'x'",
            RequestError,
            "unexpected inference input 'x'",
        ),
        (
            "INVALID_ARGUMENT",
            "SchemaMismatch: the client encodes by",
            SchemaMismatch,
            "the client encodes by",
        ),
        ("CANCELLED", "DeadlineExceeded: the request took 3 ms", DeadlineExceeded, "the request took 3 ms"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineExceeded, "no answer from m at h:1 within 250 ms"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineExceeded, "it may be dead: ask another server"),
        ("UNAVAILABLE", "connection refused", ServerError, "check that Triton runs there"),
        ("UNAVAILABLE", "QueueFull: 4 requests are running", Overloaded, "4 requests are running"),
        ("UNAVAILABLE", "DeadlineUnmeetable: the request has 3 ms", Overloaded, "the request has 3 ms"),
        ("NOT_FOUND", "Request for unknown model", ServerError, "publish a snapshot, load it"),
        ("INTERNAL", "ServerError: hsnn_scorer_l2 failed", ServerError, "hsnn_scorer_l2 failed"),
        ("INTERNAL", "Stub process 'x_0' is not healthy.", ServerError, "the process of m at h:1 has died"),
        ("INTERNAL", "ValueError: oh", ServerError, "m at h:1 failed with INTERNAL: ValueError: oh"),
    ],
)
def test_every_failure_has_its_error(status: str, message: str, kind: type[HsnnError], text: str) -> None:
    error = translate(failure(status, message), "h:1", "m", 0.25)
    assert type(error) is kind
    assert text in str(error)
    assert error.status == status


def test_a_lost_connection_is_tried_again_while_time_remains() -> None:
    patience = Patience("h:1", "m", timeout=5, retries=2)
    lost = failure("UNAVAILABLE", "connection reset")
    assert 0 < patience.pause_after(lost) < patience.pause_after(lost) * 4 < 1
    with pytest.raises(ServerError, match="m at h:1 is unavailable"):
        patience.pause_after(lost)


@pytest.mark.parametrize(
    "error",
    [
        failure("UNAVAILABLE", "QueueFull: 4 requests are running"),
        failure("INVALID_ARGUMENT", "FeatureError: x"),
        failure("INTERNAL", "ServerError: x"),
        failure("CANCELLED", "DeadlineExceeded: x"),
    ],
)
def test_what_would_do_harm_or_no_good_is_not_tried_again(error: InferenceServerException) -> None:
    with pytest.raises(HsnnError):
        Patience("h:1", "m", timeout=5, retries=2).pause_after(error)


def test_no_time_no_attempt() -> None:
    patience = Patience("h:1", "m", timeout=1e-9, retries=2)
    with pytest.raises(DeadlineExceeded, match="no answer from m at h:1 within 0 ms.*it may be dead"):
        patience.remaining()
    with pytest.raises(ServerError, match="unavailable"):
        patience.pause_after(failure("UNAVAILABLE", "connection reset"))


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_timeout_is_positive(timeout: float) -> None:
    with pytest.raises(RequestError, match="expected seconds > 0"):
        Patience("h:1", "m", timeout=timeout, retries=2)


@pytest.mark.parametrize(
    ("left", "microseconds"), [(20.0, 19_980_000), (0.2, 180_000), (0.05, 45_000), (1e-9, 1)]
)
def test_a_server_is_told_less_than_the_client_waits(left: float, microseconds: int) -> None:
    assert told(left) == pytest.approx(microseconds, abs=1)


class Asked:
    """A connection that notes what it is told, and a codec that has nothing to do."""

    def __init__(self) -> None:
        self.codec = SimpleNamespace(request=lambda users, question: {}, answer=lambda reply: reply)

    def infer(self, timeout: int, client_timeout: float) -> Any:
        self.told, self.waited = timeout, client_timeout
        return []

    async def infer_async(self, timeout: int, client_timeout: float) -> Any:
        return self.infer(timeout, client_timeout)


def test_both_clients_wait_longer_than_they_tell() -> None:
    asked = Asked()
    with RetrievalClient("127.0.0.1:1") as client:
        grpc, client._grpc, client._codec = client._grpc, asked, asked.codec  # type: ignore[assignment]
        client.retrieve([{}], timeout=0.1)
        client._grpc = grpc
    assert asked.told == told(asked.waited) < 90_000

    async def ask() -> None:
        async with AsyncRetrievalClient("127.0.0.1:1") as aio:
            grpc, aio._grpc = aio._grpc, SimpleNamespace(infer=asked.infer_async)
            aio._codec = asked.codec  # type: ignore[assignment]
            await aio.retrieve([{}], timeout=0.2)
            aio._grpc = grpc

    asyncio.run(ask())
    assert 170_000 < asked.told == told(asked.waited) < 180_000
