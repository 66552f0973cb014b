"""What a failed call means: Triton's status codes -> the errors of hsnn_core, with what to do about them."""

from __future__ import annotations

import random
import time

from tritonclient.utils import InferenceServerException

from hsnn_core.errors import (
    DeadlineExceeded,
    HsnnError,
    Overloaded,
    RequestError,
    SchemaMismatch,
    ServerError,
)

from .tls import handshake_failure

# The orchestrator starts its messages with the class of its error: "FeatureError: age: got NaN ...".
_OURS = (
    "FeatureError",
    "RequestError",
    "SchemaMismatch",
    "DeadlineExceeded",
    "QueueFull",
    "DeadlineUnmeetable",
    "SearchError",
    "ServerError",
    "LogError",
    "FormatError",
)
_WAY_BACK = 0.02  # seconds that a client waits longer than the server is told, at most
LESS_TO_SEARCH = "ask for smaller widths or k"
_FIRST_PAUSE = (
    0.02  # seconds; doubles with every attempt, with jitter so that many clients do not return together
)


def translate(
    error: InferenceServerException, url: str, model: str, timeout: float, less: str = LESS_TO_SEARCH
) -> HsnnError:
    """The error to raise for a failed call; its text says what happened and what to do about it (``less``: what makes
    a call shorter), its ``status`` is gRPC's."""
    found = _translated(error, url, model, timeout, less)
    found.status = _status(error)
    return found


def _translated(
    error: InferenceServerException, url: str, model: str, timeout: float, less: str
) -> HsnnError:
    status = _status(error)
    kind, text = _split(error.message())
    if kind == "SchemaMismatch":
        return SchemaMismatch(text)
    if status == "INVALID_ARGUMENT":
        return RequestError(text)
    if kind in ("QueueFull", "DeadlineUnmeetable"):
        return Overloaded(text)
    if kind == "DeadlineExceeded":
        return DeadlineExceeded(text)
    if status in ("DEADLINE_EXCEEDED", "CANCELLED"):
        return DeadlineExceeded(
            f"no answer from {model} at {url} within {timeout * 1000:.0f} ms ({text}); {_late(less)}"
        )
    if kind:
        return ServerError(text)
    if (
        "is not healthy" in text
    ):  # Triton's words; it goes on saying that the model is ready, and starts nothing anew
        return ServerError(
            f"the process of {model} at {url} has died ({text}); load the model again, and ask another server meanwhile"
        )
    if (failure := handshake_failure(text)) is not None:
        return ServerError(f"{url}: {failure} ({text})")
    if status == "UNAVAILABLE":
        return ServerError(
            f"{model} at {url} is unavailable ({text}); "
            "check that Triton runs there and that the model is loaded"
        )
    if status == "NOT_FOUND":
        return ServerError(
            f"Triton at {url} has no {model} ({text}); publish a snapshot, load it, then ask again"
        )
    return ServerError(f"{model} at {url} failed with {status or 'no status'}: {text}; see the server's log")


def _late(less: str) -> str:
    """What to do when no answer came in time: of a stub that has died, Triton's calls hang until their deadline."""
    return f"allow a longer timeout, or {less}; when other calls hang too, it may be dead: ask another server"


def told(left: float) -> int:
    """The time, in microseconds, that a server is told for a request which the client waits ``left`` seconds for.

    Less than the client waits, so that the server's own refusal comes first: where a client's cancellation meets the
    answer on its way, Triton 2.51 may keep the request, and with it the version, which then never ends
    unloading."""
    return max(1, int(1e6 * (left - min(_WAY_BACK, left / 10))))  # 0 would mean no deadline


def schema_may_differ(error: InferenceServerException) -> bool:
    """Whether the server may have moved to another schema than the request was encoded by.

    The orchestrator says so; but a tensor that it no longer has is refused by Triton before it is asked.
    """
    kind, _ = _split(error.message())
    return kind == "SchemaMismatch" or (not kind and error.status() == "StatusCode.INVALID_ARGUMENT")


def _status(error: InferenceServerException) -> str:
    return (error.status() or "").removeprefix("StatusCode.")


def _split(message: str) -> tuple[str, str]:
    kind, separator, text = message.partition(": ")
    return (kind, text) if separator and kind in _OURS else ("", message)


class Patience:
    """Time left for one call and whether a failed attempt may be repeated.

    Repeated is only what cannot have done harm and may well go better at once: a retrieval changes nothing on
    the server, and an item update that comes twice is stale the second time, so a lost or refused connection is
    tried again while time remains. A request refused for want of time or room is not: repeating would feed the
    overload.
    """

    def __init__(
        self, url: str, model: str, timeout: float, retries: int, less: str = LESS_TO_SEARCH
    ) -> None:
        if not timeout > 0:
            raise RequestError(f"timeout: got {timeout!r}, expected seconds > 0")
        self._url, self._model, self._timeout = url, model, timeout
        self._until = time.monotonic() + timeout
        self._retries, self._less = retries, less
        self._attempt = 0

    def remaining(self) -> float:
        """Seconds left; DeadlineExceeded when none are."""
        left = self._until - time.monotonic()
        if left <= 0:
            late = DeadlineExceeded(
                f"no answer from {self._model} at {self._url} within {self._timeout * 1000:.0f} ms; "
                f"{_late(self._less)}"
            )
            late.status = "DEADLINE_EXCEEDED"
            raise late
        return left

    def pause_after(self, error: InferenceServerException) -> float:
        """Seconds to wait before the next attempt; raises the translated error when there must be none."""
        final = translate(error, self._url, self._model, self._timeout, self._less)
        refused = error.status() == "StatusCode.UNAVAILABLE" and not _split(error.message())[0]
        pause = _FIRST_PAUSE * 2**self._attempt * random.uniform(0.5, 1.5)
        if not refused or self._attempt >= self._retries or time.monotonic() + pause >= self._until:
            raise final from error
        self._attempt += 1
        return pause
