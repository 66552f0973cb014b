"""Where a request belongs in a distributed trace: W3C's Trace Context (https://www.w3.org/TR/trace-context/)."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from hsnn_core.errors import RequestError

_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})")
_SAMPLED = 1


@dataclass(frozen=True)
class Trace:
    """A place in a trace, below which the server's spans of one request come.

    >>> client.retrieve(users, trace=Trace.current())      # below OpenTelemetry's current span
    >>> client.retrieve(users, trace=Trace.new())          # a trace of this request alone

    ``traceparent`` and ``tracestate``: as in the headers of those names. RequestError when the first is no such header.
    A trace whose flag says that it is not sampled is not sent, since Triton 2.51 would trace it all the same.
    """

    traceparent: str
    tracestate: str = ""

    def __post_init__(self) -> None:
        if not _TRACEPARENT.fullmatch(self.traceparent):
            raise RequestError(
                f"traceparent: got {self.traceparent!r}, expected 00-TRACE-SPAN-FLAGS in lower-case hexadecimal of 32, "
                "16 and 2 digits, not all zero"
            )

    @classmethod
    def new(cls) -> Trace:
        """A new, sampled trace."""
        return cls(f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01")

    @classmethod
    def current(cls) -> Trace | None:
        """OpenTelemetry's current span in this thread or task; None when there is none. RequestError without the
        package opentelemetry-api."""
        try:
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise RequestError(
                "Trace.current() needs the package opentelemetry-api: pip install 'hsnn-triton[tracing]'"
            ) from error
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        if "traceparent" not in carrier:
            return None
        return cls(carrier["traceparent"], carrier.get("tracestate", ""))

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits, by which a collector finds it."""
        return self.traceparent.split("-")[1]

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a call; none when the trace is not sampled."""
        if not int(self.traceparent.rpartition("-")[2], 16) & _SAMPLED:
            return {}
        state = {"tracestate": self.tracestate} if self.tracestate else {}
        return {"traceparent": self.traceparent, **state}
