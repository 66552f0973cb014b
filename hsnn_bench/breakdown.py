"""Where the microseconds of a request go: every step of the search by layer, and what server and client add.

The search is taken apart in this process, by stopwatches around what it calls: the index and the filter (candidates),
rows of embeddings (gather), crossings (I2IF), networks (scorer). What is left of a layer is ranking, pruning and beams.
They show the thread's CPU time, which other processes hardly lengthen. The same requests go through Triton, in process
and by BLS, timed by the clock; Triton's statistics say what the networks' own processes do. Request i goes through
all of it before request i + 1, and the order rotates.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from tritonclient.grpc import InferenceServerClient

from clients.retrieval import RetrievalClient, WireUsers
from clients.wire import Codec, Question, Timings
from export.exported import open_export
from export.open_items import OpenTargeting
from hsnn_cli.tables import table
from hsnn_core.bundle import Bundle
from hsnn_core.errors import DataError
from hsnn_core.onnx_runner import OnnxRunner
from hsnn_core.row_table import RowTable
from hsnn_core.search import search

from .orchestrator import MODES, TIMEOUT_SECONDS, WARM_UP, Wire, served
from .plots import parts_of_request
from .report_files import write_report

STEPS = ("candidates", "gather", "I2IF", "scorer", "the rest")
BEFORE, TOWER = "encode, filter", ("user tower", "I2IF query")
BARE, OUT, USER = "bare loop", "outside the search", "user"
OUTSIDE = ("client: encode", "gRPC, Triton, decode, answer", "client: parse")


class Stopwatch:
    """Nanoseconds of this thread's CPU time in the calls of one search, by layer (0: the user's) and step."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forget what was measured; the next layer is the user's."""
        self.layer, self.marks = -1, list[int]()
        self.spent = defaultdict[tuple[int, str], int](int)

    def next_layer(self) -> None:
        """The search calls its deadline before the user tower and before every layer; so should its caller at the
        end."""
        self.layer += 1
        self.marks.append(time.thread_time_ns())

    def timed(self, step: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time counted for the layer that the search is at."""

        def run(*args: Any) -> Any:
            began = time.thread_time_ns()
            try:
                return call(*args)
            finally:
                self.spent[self.layer, step] += time.thread_time_ns() - began

        return run


class _Timed:
    """``inner`` with the methods named in ``steps`` counted under these steps."""

    def __init__(self, inner: Any, watch: Stopwatch, steps: Mapping[str, str]) -> None:
        self._inner = inner
        for name, step in steps.items():
            setattr(self, name, watch.timed(step, getattr(inner, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _TimedRows(RowTable):
    def __init__(self, rows: np.ndarray, watch: Stopwatch) -> None:
        super().__init__(rows)
        self.take = watch.timed("gather", super().take)  # type: ignore[method-assign]
        self.part = watch.timed("gather", super().part)  # type: ignore[method-assign]


class TimedSearch:
    """`orchestrator.BareLoop` by steps: (N + 1) x steps in microseconds, see `steps_of`."""

    def __init__(self, source: Path, widths: Sequence[int], k: int) -> None:
        exported = open_export(source)
        bundle = Bundle.open(exported.bundle)
        files = [exported.path / graph.file for graph in exported.graphs]
        self._watch = watch = Stopwatch()
        self._bundle, self._widths, self._k = bundle, widths, k
        self._targeting = OpenTargeting(bundle)
        runner = _Timed(
            OnnxRunner(files[0], files[2:]), watch, {"user_tower": "user tower", "score": "scorer"}
        )
        crossing = {"query": "I2IF query", "query_of_nodes": "I2IF query", "walk": "I2IF", "probe": "I2IF"}
        i2if: Any = None if bundle.i2if is None else _Timed(bundle.i2if, watch, crossing)
        rows = [_TimedRows(embeddings, watch) for embeddings in bundle.embeddings]
        self._scorer = bundle.scorer(runner).over(bundle.index, i2if, rows)
        found = {"children": "candidates", "present": "candidates"}
        self._index = _Timed(bundle.index, watch, found)

    def __call__(self, wire: Wire) -> dict[str, float]:
        """Microseconds by name: of CPU "encode, filter", "user tower", "I2IF query", "layer 1: gather", ...; and by the
        clock what `TimedClient` gives."""
        watch, bundle = self._watch, self._bundle
        watch.start()
        began, cpu = time.perf_counter_ns(), time.thread_time_ns()
        users = bundle.transform.encode_users(dict(wire))
        allowed: Any = self._targeting.filter(len(users))
        outside, before = time.perf_counter_ns() - began, time.thread_time_ns() - cpu
        if allowed is not None:
            allowed = _Timed(allowed, watch, {"counts": "candidates"})
        found = search(
            self._index, self._scorer, users, self._widths, self._k, bundle.schema.rank, allowed,
            deadline=watch.next_layer,
        )  # fmt: skip
        watch.next_layer()
        cpu_of = {BEFORE: before} | {step: watch.spent[0, step] for step in TOWER}
        for layer, took in enumerate(np.diff(watch.marks)[1:], start=1):
            steps = {step: watch.spent[layer, step] for step in STEPS[:-1]}
            steps[STEPS[-1]] = took - sum(steps.values())
            cpu_of |= {f"layer {layer}: {step}": value for step, value in steps.items()}
        timings = Timings(
            found.user_microseconds,
            tuple(layer.microseconds for layer in found.layers),
            found.total_microseconds,
        )
        return {step: value / 1000 for step, value in cpu_of.items()} | _stages(timings, outside / 1000)


def _stages(timings: Timings, outside: float) -> dict[str, float]:
    """What a search says of itself; ordering the answer is the last layer's."""
    *layers, last = timings.layers
    rest = timings.total - timings.user_tower - sum(timings.layers)
    numbered = {
        f"layer {number}": float(value) for number, value in enumerate([*layers, last + rest], start=1)
    }
    return {OUT: outside, USER: float(timings.user_tower), **numbered}


class TimedClient:
    """A server's way: what the client does, what the search in the server says of itself, and what lies between."""

    def __init__(self, client: RetrievalClient, triton: InferenceServerClient, question: Question) -> None:
        self._codec, self._triton, self._question = Codec(client.connect()), triton, question

    def __call__(self, wire: Wire) -> dict[str, float]:
        marks = [time.perf_counter_ns()]
        request = self._codec.request(WireUsers(dict(wire)), self._question)
        marks.append(time.perf_counter_ns())
        result = self._triton.infer(**request, client_timeout=TIMEOUT_SECONDS)
        marks.append(time.perf_counter_ns())
        timings = self._codec.answer(result).timings
        marks.append(time.perf_counter_ns())
        assert timings is not None
        encode, call, parse = np.diff(marks) / 1000
        outside = encode, call - timings.total, parse
        return dict(zip(OUTSIDE, outside)) | _stages(timings, sum(outside))


def measure(
    run: str | Path,
    wire: Wire,
    *,
    widths: Sequence[int] | None,
    k: int | None,
    rounds: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Take requests ``wire`` ((R, ...) raw wire tensors, each asked ``rounds`` times) over the export of ``run`` apart;
    ``widths`` and ``k`` default to the snapshot's. Returns plain JSON values.

    Raises PublishError without an export, DataError without requests, ServerError when a server fails.
    """
    count = len(next(iter(wire.values()))) if wire else 0
    if count == 0:
        raise DataError("no requests to measure with; expected at least one row of user features")
    exported = open_export(Path(run))
    bundle = Bundle.open(exported.bundle, verify=False)
    manifest, index = bundle.manifest, bundle.index
    widths = list(manifest["widths"] if widths is None else widths)
    k = min(manifest["k"] if k is None else k, index.items)
    requests = [{name: value[i : i + 1] for name, value in wire.items()} for i in range(count)]
    with ExitStack() as stack:
        ways: dict[str, Callable[[Wire], dict[str, float]]] = {BARE: TimedSearch(exported.path, widths, k)}
        for mode in MODES:
            client, url = served(stack, run, mode)
            triton = stack.enter_context(InferenceServerClient(url))
            ways[f"triton, {mode}"] = TimedClient(client, triton, Question(k, widths, timings=True))
        for request in requests[:WARM_UP]:
            for ask in ways.values():
                ask(request)
        names = [manifest["models"]["user_tower"], *manifest["models"]["scorers"]]
        already = _statistics(triton, names)
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for number in tqdm(range(rounds * count), desc="measure", unit="request", disable=not progress):
            order = list(ways)
            turn = number % len(order)
            for name in order[turn:] + order[:turn]:
                taken[name].append(ways[name](requests[number % count]))
        networks = {
            name: _per_call(before, after)
            for (name, before), after in zip(already.items(), _statistics(triton, names).values())
        }
    return {
        "index": [index.nodes(layer) for layer in range(1, index.layers + 1)],
        "widths": widths,
        "k": k,
        "requests": count,
        "rounds": rounds,
        "microseconds": {name: _medians(given) for name, given in taken.items()},
        "networks": networks,
    }


def _medians(given: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {step: float(np.median([row[step] for row in given])) for step in given[0]}


def _statistics(triton: InferenceServerClient, models: Sequence[str]) -> dict[str, dict[str, int]]:
    """Per model: calls so far, and nanoseconds that they waited, were given their inputs, ran and gave outputs."""
    found = {}
    for model in models:
        (of,) = triton.get_inference_statistics(model).model_stats
        parts = of.inference_stats
        found[model] = {
            "calls": of.execution_count,
            "queue": parts.queue.ns,
            "inputs": parts.compute_input.ns,
            "run": parts.compute_infer.ns,
            "outputs": parts.compute_output.ns,
        }
    return found


def _per_call(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, float]:
    """Microseconds per call, and calls."""
    calls = after["calls"] - before["calls"]
    spent = {name: (after[name] - before[name]) / 1000 / calls for name in before if name != "calls"}
    return {"calls": calls, **spent}


def report(found: dict[str, Any], command: str, name: str, results: Path, simulated: bool) -> Path:
    """Write breakdown-NAME.json, .md and .png under ``results``; returns the .md."""
    return write_report(
        found,
        results / f"breakdown-{name}",
        command,
        simulated,
        lambda shown: page(shown, name),
        lambda shown, path: parts_of_request(parts(shown), simulated, path),
    )


def parts(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Way -> stage -> microseconds by the clock."""
    stages = [OUT, USER, *(f"layer {number}" for number in range(1, len(found["index"]) + 1))]
    return {way: {stage: given[stage] for stage in stages} for way, given in found["microseconds"].items()}


def page(found: Mapping[str, Any], name: str) -> str:
    """The report as Markdown."""
    layers = [f"layer {number}" for number in range(1, len(found["index"]) + 1)]
    bare = found["microseconds"][BARE]
    steps = [[layer, *(f"{bare[f'{layer}: {step}']:,.0f}" for step in STEPS),
              f"{sum(bare[f'{layer}: {step}'] for step in STEPS):,.0f}"] for layer in layers]  # fmt: skip
    ways = parts(found)
    rows = [[way, *(f"{value:,.0f}" for value in given.values()), f"{sum(given.values()):,.0f}"]
            for way, given in ways.items()]  # fmt: skip
    outside = [[way, *(f"{given[step]:,.0f}" for step in OUTSIDE)]
               for way, given in found["microseconds"].items() if way != BARE]  # fmt: skip
    calls = found["requests"] * found["rounds"]
    networks = [[model, f"{of['calls'] / calls:.2f}", *(f"{of[part]:,.0f}" for part in ("queue", "inputs", "run",
                "outputs"))] for model, of in found["networks"].items()]  # fmt: skip
    nodes = ", ".join(f"{count:,}" for count in found["index"])
    return "\n".join([
        f"# Where the microseconds of a request go: {name}",
        "",
        *(["Simulated data.", ""] if found["simulated"] else []),
        f"`{found['command']}` at commit {found['commit']}, {found['machine']}, {found['date']}. Nodes per layer "
        f"{nodes}; widths {found['widths']}, K = {found['k']}; {found['requests']} requests, {found['rounds']} times "
        "each, in turns. All figures are medians in microseconds, so they need not add up.",
        "",
        f"CPU time of the search in one thread without a server: the user's encoding and filter {bare[BEFORE]:,.0f}, "
        f"user tower {bare[TOWER[0]]:,.0f}, I2IF query {bare[TOWER[1]]:,.0f}, and by layer:",
        "",
        "```",
        table(["", *STEPS, "sum"], steps),
        "```",
        "",
        "Latency of the same requests, by what the search says of itself and the client waits:",
        "",
        "```",
        table(["way", *ways[BARE], "sum"], rows),
        "```",
        "",
        "What is outside the search:",
        "",
        "```",
        table(["way", *OUTSIDE], outside),
        "```",
        "",
        "By BLS, per call, what Triton counts for each network (means):",
        "",
        "```",
        table(["network", "calls per request", "waiting", "inputs", "run", "outputs"], networks),
        "```",
    ])  # fmt: skip
