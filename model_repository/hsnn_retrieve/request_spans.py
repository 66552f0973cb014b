"""The spans of traced requests: waiting, preparation, user tower and each layer, below the span that Triton makes.

Triton's OpenTelemetry mode decides which requests are traced and hands the request's context over. These spans go, as
OTLP's JSON over HTTP, to where Triton's own go: the address in OpenTelemetry's variable ENDPOINT, which both read.
Without it nothing is made. Handing Triton's trace on to BLS calls would give spans of the networks as well, but this
model answers after ``execute``, when Triton may have released the trace: 2.51 crashed.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

import triton_python_backend_utils as pb_utils

ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
PERIOD = 0.5  # seconds between two exports
WAITING = 1000  # requests whose spans wait for the next export; of more, the newest
_TIMEOUT = 5.0
_PATIENCE = 2.0  # seconds that an unload waits for the last spans
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
_ERROR = 2  # OTLP's Status.STATUS_CODE_ERROR


@dataclass(frozen=True)
class Parent:
    """The span of Triton's that a request's spans belong under, in hexadecimal."""

    trace: str
    span: str

    @classmethod
    def of(cls, request: Any) -> Parent | None:
        """Of a request inside ``execute``; None when it is not traced, or its context can't be read: a request is
        answered all the same."""
        context = request.trace().get_context()
        try:
            matched = _TRACEPARENT.fullmatch(json.loads(context)["traceparent"]) if context else None
        except (ValueError, KeyError, TypeError):
            return None
        return cls(*matched.groups()) if matched else None


@dataclass(frozen=True)
class Stage:
    """A part of a request: unix nanoseconds at which it began and ended."""

    name: str
    began: int
    ended: int
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Spans:
    """A request's stages under a span of their own; ``failure``: the text of its error."""

    parent: Parent
    whole: Stage
    stages: Sequence[Stage]
    failure: str | None = None


class SpanExporter:
    """Sends spans in the background; what cannot be delivered is dropped, and said once until it works again."""

    def __init__(self, endpoint: str, version: int) -> None:
        self._url = urlsplit(endpoint)
        self._resource = _attributes({"service.name": "hsnn_retrieve", "service.version": str(version)})
        self._waiting: deque[Spans] = deque(maxlen=WAITING)
        self._failing = False
        self._closing = Event()
        self._sender = Thread(target=self._follow, name="hsnn-spans", daemon=True)
        self._sender.start()

    @classmethod
    def from_environment(cls, version: int) -> SpanExporter | None:
        """None when no address is set."""
        endpoint = os.environ.get(ENDPOINT)
        return cls(endpoint, version) if endpoint else None

    def add(self, spans: Spans) -> None:
        """Export them with the next batch."""
        self._waiting.append(spans)

    def close(self) -> None:
        """Send what is left and stop; a collector that does not answer is not waited for."""
        self._closing.set()
        self._sender.join(_PATIENCE)

    def _follow(self) -> None:
        last = False
        while not last:
            last = self._closing.wait(PERIOD)
            batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if batch:
                self._send([span for spans in batch for span in _as_json(spans)])

    def _send(self, spans: list[dict[str, Any]]) -> None:
        scope = {"scope": {"name": "hsnn_retrieve"}, "spans": spans}
        body = {"resourceSpans": [{"resource": {"attributes": self._resource}, "scopeSpans": [scope]}]}
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._url.netloc, timeout=_TIMEOUT)
        try:
            connection.request(
                "POST", self._url.path or "/", json.dumps(body), {"Content-Type": "application/json"}
            )
            status = connection.getresponse().status
            why = None if status < 300 else f"it answered {status}"
        except Exception as error:  # whatever it is, tracing must not end for it, nor requests fail
            why = str(error)
        finally:
            connection.close()
        if why and not self._failing:
            pb_utils.Logger.log_warn(
                f"hsnn_retrieve: spans could not be sent to {self._url.geturl()}: {why}; "
                "they are dropped until they can"
            )
        self._failing = why is not None


def _as_json(spans: Spans) -> list[dict[str, Any]]:
    own = secrets.token_hex(8)
    whole = _span(spans.parent.trace, own, spans.parent.span, spans.whole)
    if spans.failure is not None:
        whole["status"] = {"code": _ERROR, "message": spans.failure}
    return [whole, *(_span(spans.parent.trace, secrets.token_hex(8), own, stage) for stage in spans.stages)]


def _span(trace: str, span: str, parent: str, stage: Stage) -> dict[str, Any]:
    return {
        "traceId": trace,
        "spanId": span,
        "parentSpanId": parent,
        "name": stage.name,
        "kind": 1,  # internal
        "startTimeUnixNano": str(stage.began),
        "endTimeUnixNano": str(stage.ended),
        "attributes": _attributes(stage.attributes),
    }


def _attributes(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"key": key, "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}}
        for key, value in values.items()
    ]
