"""What tracing costs a request: a server without, one that traces but not this request, and one that traces it.

Two servers over one export, on loopback, of which the second sends its spans to a collector that drops them. Every
request goes all three ways before the next, in changing order, so a machine that slows down slows all alike.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clients.retrieval import RetrievalClient, Trace, WireUsers
from export.exported import open_export
from export.pbtxt import ServingOptions
from export.publish import publish
from export.rollout import promote
from hsnn_cli.provenance import commit, machine
from hsnn_cli.tables import table
from hsnn_core.bundle import Bundle
from hsnn_core.files import write_bytes
from hsnn_server.processes import HOST, free_ports, listening, wait_until
from hsnn_server.tracing import Tracing
from hsnn_server.triton import TritonServer
from hsnn_train.checkpoint import write_json

from .orchestrator import Answer, Ask, Spread, interleave

OFF, NOT_THIS, TRACED = "tracing off", "on, request not traced", "on, request traced"
_NEVER = 10**9  # of the requests without a context, one in as many
_SINK = """
import http.server, sys
class Sink(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
    def log_message(self, *arguments):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Sink).serve_forever()
"""


def measure(
    run: Path, mode: Literal["bls", "in_process"], rounds: int, progress: bool = True
) -> dict[str, Any]:
    """Ask for the users of the export's smoke request, one by one, ``rounds`` times; plain JSON values. Raises
    PublishError without an export, ServerError when a server fails."""
    users = Bundle.open(open_export(run).bundle).smoke().users
    requests = [
        {name: values[row : row + 1] for name, values in users.items()}
        for row in range(len(next(iter(users.values()))))
    ]
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hsnn-bench-")))
        publish(run, work, options=ServingOptions(mode=mode))
        endpoint = stack.enter_context(_sink())
        plain, tracing = (_client(stack, work, traced) for traced in (None, Tracing(endpoint, rate=_NEVER)))
        ways = {
            OFF: _through(plain, lambda: None),
            NOT_THIS: _through(tracing, lambda: None),
            TRACED: _through(tracing, Trace.new),
        }
        answers = interleave(ways, requests, rounds, progress)
    times = {name: np.array([answer.microseconds for answer in given]) for name, given in answers.items()}
    return {
        "mode": mode,
        "requests": len(times[OFF]),
        "ways": {
            name: {
                "microseconds": asdict(Spread.of(values.tolist())),
                "p99": float(np.percentile(values, 99)),
                # Of a request against the same one without tracing, moments apart.
                "added": float(np.median(values - times[OFF])),
            }
            for name, values in times.items()
        },
    }


def report(found: Mapping[str, Any], command: str, name: str, results: Path) -> Path:
    """Write tracing-NAME.json and .md under ``results``; returns the .md."""
    results.mkdir(parents=True, exist_ok=True)
    facts = {"command": command, "commit": commit(), "machine": machine(), "date": date.today().isoformat()}
    stem = results / f"tracing-{name}"
    write_json(stem.with_suffix(".json"), {**facts, **found})
    write_bytes(stem.with_suffix(".md"), (page({**facts, **found}, name) + "\n").encode())
    return stem.with_suffix(".md")


def page(found: Mapping[str, Any], name: str) -> str:
    """The report as Markdown."""
    rows = [
        [way, Spread(**of["microseconds"]).text(), f"{of['p99']:,.0f}", f"{of['added']:+,.0f}"]
        for way, of in found["ways"].items()
    ]
    return "\n".join([
        f"# What tracing costs: {name}",
        "",
        f"`{found['command']}` at commit {found['commit']}, {found['machine']}, {found['date']}. Mode {found['mode']}, "
        f"{found['requests']} requests of one user, one after the other, every one all three ways before the next; "
        "microseconds that the client waited. The collector takes spans and drops them, on the same machine.",
        "",
        "```",
        table(["way", "median (p10 to p90)", "p99", "median difference to off"], rows),
        "```",
    ])  # fmt: skip


def _through(client: RetrievalClient, trace: Callable[[], Trace | None]) -> Ask:
    def ask(wire: Mapping[str, np.ndarray]) -> Answer:
        context = trace()
        began = time.perf_counter()
        hits = client.retrieve(WireUsers(dict(wire)), trace=context)[0]
        return Answer(np.array([hit.item_id for hit in hits]), 1e6 * (time.perf_counter() - began), [])

    return ask


def _client(stack: ExitStack, repository: Path, tracing: Tracing | None) -> RetrievalClient:
    server = stack.enter_context(TritonServer(repository, tracing=tracing))
    promote(repository, server.admin)
    return stack.enter_context(RetrievalClient(server.urls.grpc, timeout=60))


@contextmanager
def _sink() -> Iterator[str]:
    """A collector in a process of its own, which drops what it gets: its address."""
    (port,) = free_ports(1)
    process = subprocess.Popen([sys.executable, "-c", _SINK, str(port)])
    try:
        wait_until(lambda: listening(port), 10)
        yield f"http://{HOST}:{port}/v1/traces"
    finally:
        process.kill()
        process.wait()
