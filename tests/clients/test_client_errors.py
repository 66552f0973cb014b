"""What a failed call becomes, and which calls are tried again."""

from __future__ import annotations

import pytest
from tritonclient.utils import InferenceServerException

from clients.errors import Patience, translate
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
    with pytest.raises(DeadlineExceeded, match="no answer from m at h:1 within 0 ms"):
        patience.remaining()
    with pytest.raises(ServerError, match="unavailable"):
        patience.pause_after(failure("UNAVAILABLE", "connection reset"))


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_timeout_is_positive(timeout: float) -> None:
    with pytest.raises(RequestError, match="expected seconds > 0"):
        Patience("h:1", "m", timeout=timeout, retries=2)
