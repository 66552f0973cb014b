"""What tracing costs a request: a server without, one that traces but not this request, and one that traces it.

Two processes of the same server differ by themselves, perhaps by more than tracing costs. So one pair of servers is one
sample: both are started anew, in turn the one that traces first and last. And two ways at a time are compared, asked in
turn: with all three in one round, the server that traces got two requests of three and was never idle for long, and
tracing seemed to make it faster. Reported is the mean of the pairs' differences with its 95% interval.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tqdm import tqdm

from clients.retrieval import RetrievalClient, Trace, WireUsers
from export.exported import open_export
from export.pbtxt import ServingOptions
from export.publish import publish
from export.rollout import promote
from hsnn_cli.provenance import commit, machine
from hsnn_cli.tables import table
from hsnn_core.bundle import Bundle
from hsnn_core.errors import RequestError
from hsnn_core.files import write_bytes
from hsnn_server.processes import HOST, free_ports, listening, wait_until
from hsnn_server.tracing import Tracing
from hsnn_server.triton import TritonServer
from hsnn_train.checkpoint import write_json

from .orchestrator import Answer, Ask, Spread
from .rig import Mode

OFF, NOT_THIS, TRACED = "tracing off", "on, request not traced", "on, request traced"
COSTS = ((NOT_THIS, OFF), (TRACED, OFF), (TRACED, NOT_THIS))  # of the first, against the second
_WARM_UP = 3  # rounds
Compared = tuple[str, str]  # a way and the one that it is compared to
Times = tuple[np.ndarray, np.ndarray]  # of their requests, microseconds (R,)
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


@dataclass(frozen=True)
class Cost:
    """Microseconds that a way adds to another: ``mean`` of the pairs of servers, ``low`` to ``high``: its 95% interval;
    ``pairs``: what each showed, its median over the requests."""

    mean: float
    low: float
    high: float
    pairs: list[float]

    @classmethod
    def of(cls, pairs: Sequence[float]) -> Cost:
        """By Student's t, the pairs, at least two, taken for independent."""
        mean, error = float(np.mean(pairs)), float(stats.sem(pairs))
        width = float(stats.t.ppf(0.975, len(pairs) - 1)) * error
        return cls(mean, mean - width, mean + width, list(pairs))


def measure(run: Path, mode: Mode, pairs: int, rounds: int, progress: bool = True) -> dict[str, Any]:
    """Ask ``pairs`` pairs of servers for the users of the export's smoke request, one by one, ``rounds`` times; plain
    JSON values. Raises PublishError without an export, ServerError when a server fails, RequestError for one pair."""
    if pairs < 2:
        raise RequestError(f"--pairs: got {pairs}, expected at least 2; one has no spread")
    users = Bundle.open(open_export(run).bundle).smoke().users
    requests = [
        {name: values[row : row + 1] for name, values in users.items()}
        for row in range(len(next(iter(users.values()))))
    ]
    times = []
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hsnn-bench-")))
        publish(run, work, options=ServingOptions(mode=mode))
        endpoint = stack.enter_context(_sink())
        for pair in tqdm(range(pairs), desc=mode, unit="pair", disable=not progress):
            times.append(_pair(work, endpoint, requests, rounds, traced_first=pair % 2 == 1))
    return {"mode": mode, "requests": rounds * len(requests), **summary(times)}


def summary(times: Sequence[Mapping[Compared, Times]]) -> dict[str, Any]:
    """Of what every pair of servers showed: what requests took, and `COSTS`."""
    ways: dict[str, list[np.ndarray]] = {OFF: [], NOT_THIS: [], TRACED: []}
    for pair in times:
        for compared, taken in pair.items():
            for way, values in zip(compared, taken, strict=True):
                ways[way].append(values)
    taken_by = {way: np.concatenate(values) for way, values in ways.items()}
    return {
        "ways": {
            way: {"microseconds": asdict(Spread.of(values.tolist())), "p99": float(np.percentile(values, 99))}
            for way, values in taken_by.items()
        },
        "costs": [
            {
                "of": way,
                "against": base,
                # A request against the same one the other way, moments apart.
                **asdict(Cost.of([float(np.median(np.subtract(*pair[way, base]))) for pair in times])),
            }
            for way, base in COSTS
        ],
    }


def compare(ways: tuple[Ask, Ask], requests: Sequence[Mapping[str, np.ndarray]], rounds: int) -> Times:
    """Every request both ways, in turn throughout a round: neither finds its server more used than the other does. The
    first of one round is the second of the next. Microseconds (R,) of each."""
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for wire in requests:
            for way in (0, 1) if number % 2 else (1, 0):
                taken[way].append(ways[way](wire).microseconds)
    return np.array(taken[0]), np.array(taken[1])


def _pair(
    repository: Path,
    endpoint: str,
    requests: Sequence[Mapping[str, np.ndarray]],
    rounds: int,
    traced_first: bool,
) -> dict[Compared, Times]:
    with ExitStack() as stack:
        clients = {}
        for traced in (traced_first, not traced_first):
            tracing = Tracing(endpoint, rate=_NEVER) if traced else None
            clients[traced] = _client(stack, repository, tracing)
        ways = {
            OFF: _through(clients[False], lambda: None),
            NOT_THIS: _through(clients[True], lambda: None),
            TRACED: _through(clients[True], Trace.new),
        }
        for way, base in COSTS:
            compare((ways[way], ways[base]), requests, _WARM_UP)
        return {(way, base): compare((ways[way], ways[base]), requests, rounds) for way, base in COSTS}


def report(found: Sequence[Mapping[str, Any]], command: str, name: str, results: Path) -> Path:
    """Write tracing-NAME.json and .md, of what was `measure`d in each mode, under ``results``; returns the .md."""
    results.mkdir(parents=True, exist_ok=True)
    facts = {"command": command, "commit": commit(), "machine": machine(), "date": date.today().isoformat()}
    stem = results / f"tracing-{name}"
    write_json(stem.with_suffix(".json"), {**facts, "modes": list(found)})
    write_bytes(stem.with_suffix(".md"), (page(found, facts, name) + "\n").encode())
    return stem.with_suffix(".md")


def page(found: Sequence[Mapping[str, Any]], facts: Mapping[str, str], name: str) -> str:
    """The report as Markdown."""
    lines = [
        f"# What tracing costs: {name}",
        "",
        f"`{facts['command']}` at commit {facts['commit']}, {facts['machine']}, {facts['date']}. Requests of one user, "
        "one after the other, for every line of the costs each request both ways in turn; microseconds that the client "
        "waited. Of every pair of servers both are started anew, one with tracing and one without, in turn "
        "the first. The collector takes spans and drops them, on the same machine.",
    ]  # fmt: skip
    for mode in found:
        costs, base = mode["costs"], mode["ways"][OFF]["microseconds"]["median"]
        servers = len(costs[0]["pairs"])
        lines += [
            "",
            f"## {mode['mode']}: {servers} pairs of servers, {mode['requests']} requests a pair and line",
            "",
            "```",
            table(["way", "median (p10 to p90)", "p99"], [
                [way, Spread(**of["microseconds"]).text(), f"{of['p99']:,.0f}"] for way, of in mode["ways"].items()
            ]),
            "",
            table(["what it adds", "mean of the pairs", "95% interval", "pairs from to", "at most, of a request"], [
                _row(cost, base) for cost in costs
            ]),
            "```",
        ]  # fmt: skip
    return "\n".join([
        *lines,
        "",
        "A pair's number is the median difference of the same request, moments apart. *At most*: the upper end of the "
        "interval, over the median request without tracing. An interval around 0 means that nothing was shown, not "
        "that there is nothing. The last line of each is of one process, so that processes that differ don't blur it.",
    ])  # fmt: skip


def _row(cost: Mapping[str, Any], base: float) -> list[str]:
    pairs = cost["pairs"]
    return [
        f"{cost['of']} – {cost['against']}",
        f"{cost['mean']:+,.0f}",
        f"{cost['low']:+,.0f} to {cost['high']:+,.0f}",
        f"{min(pairs):+,.0f} to {max(pairs):+,.0f}",
        f"{max(0.0, cost['high']) / base:.1%}",
    ]


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
