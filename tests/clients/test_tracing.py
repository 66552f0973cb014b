"""Trace contexts of requests, and how a server is told to trace."""

from __future__ import annotations

import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from clients.tracing import Trace
from hsnn_core.errors import RequestError, ServerError
from hsnn_server.tracing import Tracing

GOOD = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_headers() -> None:
    assert Trace(GOOD, "vendor=1").headers == {"traceparent": GOOD, "tracestate": "vendor=1"}
    assert Trace(GOOD).headers == {"traceparent": GOOD}
    assert Trace(GOOD).trace_id == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert Trace(GOOD[:-2] + "00").headers == {}, "not sampled"
    assert Trace.new().headers
    assert Trace.new() != Trace.new()


@pytest.mark.parametrize(
    "wrong", ["", GOOD.upper(), GOOD[:-1], "00-" + "0" * 32 + GOOD[35:], GOOD + "\n", f"{GOOD}-more"]
)
def test_what_is_no_context_is_refused(wrong: str) -> None:
    with pytest.raises(RequestError, match="traceparent: got .*, expected 00-TRACE-SPAN-FLAGS"):
        Trace(wrong)


def test_the_current_span(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Trace.current() is None
    with TracerProvider().get_tracer("test").start_as_current_span("outer") as span:
        trace = Trace.current()
    assert trace is not None
    assert trace.traceparent.startswith(f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-")
    assert trace.headers
    with TracerProvider(sampler=ALWAYS_OFF).get_tracer("test").start_as_current_span("outer"):
        unsampled = Trace.current()
    assert unsampled is not None
    assert unsampled.headers == {}
    monkeypatch.setitem(sys.modules, "opentelemetry.trace.propagation.tracecontext", None)
    with pytest.raises(RequestError, match="needs the package opentelemetry-api: pip install"):
        Trace.current()


def test_a_server_is_told_where_and_how_often() -> None:
    tracing = Tracing("http://127.0.0.1:4318/v1/traces", 50)
    assert "--trace-config=rate=50" in tracing.arguments()
    assert tracing.environment() == {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}
    for endpoint in ("127.0.0.1:4318", "http://127.0.0.1:4318", "grpc://127.0.0.1:4317/v1/traces"):
        with pytest.raises(ServerError, match="trace endpoint: got .*, expected a collector's address"):
            Tracing(endpoint)
    with pytest.raises(ServerError, match="trace rate: got 0, expected a whole number >= 1"):
        Tracing("http://127.0.0.1:4318/v1/traces", 0)
