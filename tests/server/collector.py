"""What stands in for an OpenTelemetry collector: takes OTLP's JSON over HTTP and keeps the spans."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Collector:
    """``endpoint``: where to send to. A span is as OTLP has it, with plain attributes and its service's name."""

    endpoint: str
    spans: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200

    def take(self, body: bytes) -> None:
        for resource in json.loads(body)["resourceSpans"]:
            service = _values(resource["resource"])["service.name"]
            for scope in resource["scopeSpans"]:
                for span in scope["spans"]:
                    self.spans.append(span | {"attributes": _values(span), "service": service})

    def traced(self, send: Callable[[], str], names: set[str]) -> dict[str, dict[str, Any]]:
        """The spans of a request by their names, as soon as there are all ``names``. ``send``: sends one and returns
        its trace id; again where nothing comes, since Triton 2.51 overlooks the context of some."""
        for _ in range(5):
            trace_id = send()
            until = time.monotonic() + 5
            while time.monotonic() < until:
                found = {span["name"]: span for span in self.spans if span["traceId"] == trace_id}
                if names <= set(found):
                    return found
                time.sleep(0.05)
        raise AssertionError(f"no trace with {names}")


def _values(holder: dict[str, Any]) -> dict[str, Any]:
    return {one["key"]: next(iter(one["value"].values())) for one in holder.get("attributes", [])}


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port of loopback."""
    collector = Collector("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            collector.take(body)
            self.send_response(collector.status)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
        thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield collector
        server.shutdown()
        thread.join()
