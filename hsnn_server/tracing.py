"""Triton's OpenTelemetry mode: which requests are traced, and where their spans go."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from hsnn_core.errors import ServerError

# Read by Triton's exporter and by the orchestrator's, so that all spans of a request go to one place.
ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


@dataclass(frozen=True)
class Tracing:
    """``endpoint``: where a collector takes OTLP over HTTP, usually http://HOST:4318/v1/traces. A request that comes
    with a trace context is traced; of the others every ``rate``-th. ServerError when either is none."""

    endpoint: str
    rate: int = 1000

    def __post_init__(self) -> None:
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc or not parts.path.strip("/"):
            raise ServerError(
                f"trace endpoint: got {self.endpoint!r}, expected a collector's address for OTLP over HTTP with its "
                "path, like http://127.0.0.1:4318/v1/traces"
            )
        if self.rate < 1:
            raise ServerError(
                f"trace rate: got {self.rate}, expected a whole number >= 1: every n-th request"
            )

    def arguments(self) -> list[str]:
        """What tritonserver needs to be told."""
        settings = (
            "mode=opentelemetry",
            "level=TIMESTAMPS",
            f"rate={self.rate}",
            "opentelemetry,resource=service.name=triton",
        )
        return [f"--trace-config={setting}" for setting in settings]

    def environment(self) -> dict[str, str]:
        """What must be in its environment."""
        return {ENDPOINT: self.endpoint}
