"""What the server adds to a search: the bare loop, the orchestrator with its networks in process, and by BLS.

Three ways from one request's wire tensors to its items, over one export: a plain Python loop over the same kernels
without any server, and two Triton servers on loopback that differ in `mode` alone. Request i goes through all three
before request i + 1, so a machine that slows down slows all alike. Beside the latency stands the search recall: the
share of the exhaustive top K, by the same scores, that the search returned.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from tritonclient.grpc import InferenceServerClient

from clients.retrieval import RetrievalClient, WireUsers
from clients.wire import Codec, Question
from export.exported import Exported, open_export
from export.open_items import OpenTargeting, open_items
from export.pbtxt import ServingOptions
from export.publish import publish
from export.rollout import promote
from hsnn_cli.tables import table
from hsnn_core.bundle import Bundle
from hsnn_core.errors import DataError
from hsnn_core.features import Encoded
from hsnn_core.onnx_runner import OnnxRunner
from hsnn_core.search import SearchResult, search
from hsnn_server.triton import TritonServer

from .oracle import best_items
from .plots import stages_of_ways
from .report_files import write_report

WARM_UP = 5
TIMEOUT_SECONDS = 60.0
MODES = ("in_process", "bls")

Wire = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Spread:
    """Of a sample: median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, middle, high = np.percentile(np.asarray(values, np.float64), [10, 50, 90])
        return cls(float(middle), float(low), float(high))

    def text(self) -> str:
        """median (p10 to p90)."""
        return f"{self.median:,.0f} ({self.p10:,.0f} to {self.p90:,.0f})"


@dataclass(frozen=True)
class Answer:
    """One request: item ids in order (valid ones only), microseconds the caller waited for them, and of each stage
    (user tower, layers 1..N, whole search)."""

    item_ids: np.ndarray
    microseconds: float
    stages: list[int]


Ask = Callable[[Wire], Answer]


class BareLoop:
    """The orchestrator's work without an orchestrator: encode, filter, search, in this process and one thread, with
    ``widths``, which may be changed."""

    def __init__(self, exported: Exported, bundle: Bundle, widths: Sequence[int], k: int) -> None:
        files = [exported.path / graph.file for graph in exported.graphs]
        self._bundle, self.widths, self.k = bundle, widths, k
        self.targeting = OpenTargeting(bundle)
        self.scorer = bundle.scorer(OnnxRunner(files[0], files[2:]))

    def encode(self, wire: Wire) -> Encoded:
        """The request's users as the networks read them."""
        return self._bundle.transform.encode_users(dict(wire))

    def search(self, wire: Wire) -> SearchResult:
        """The search of one request."""
        bundle = self._bundle
        users = self.encode(wire)
        allowed = self.targeting.filter(len(users))
        return search(bundle.index, self.scorer, users, self.widths, self.k, bundle.schema.rank, allowed)

    def __call__(self, wire: Wire) -> Answer:
        began = time.perf_counter()
        found = self.search(wire)
        took = 1e6 * (time.perf_counter() - began)
        stages = [found.user_microseconds, *(layer.microseconds for layer in found.layers)]
        return Answer(found.item_ids[0, : found.valid[0]], took, [*stages, found.total_microseconds])


def through(client: RetrievalClient, triton: InferenceServerClient, widths: Sequence[int], k: int) -> Ask:
    """The same over gRPC. Timed is the call: making its tensors and parsing the answer into hits is the client's."""
    codec, question = Codec(client.connect()), Question(k, widths, timings=True)

    def ask(wire: Wire) -> Answer:
        request = codec.request(WireUsers(dict(wire)), question)
        began = time.perf_counter()
        answer = triton.infer(**request, client_timeout=TIMEOUT_SECONDS)
        took = 1e6 * (time.perf_counter() - began)
        results = codec.answer(answer)
        timings = results.timings
        assert timings is not None
        ids = np.array([hit.item_id for hit in results[0]], np.int64)
        return Answer(ids, took, [timings.user_tower, *timings.layers, timings.total])

    return ask


def measure(
    run: str | Path,
    wire: Wire,
    *,
    widths: Sequence[int] | None = None,
    k: int | None = None,
    rounds: int = 1,
    recall_requests: int = 20,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the three ways over the export of ``run`` on the requests ``wire`` ((R, ...) raw wire tensors, each sent
    ``rounds`` times); ``widths`` and ``k`` default to the snapshot's. Returns plain JSON values.

    Raises PublishError without an export, DataError without requests, ServerError when a server fails, and DataError
    when the ways do not return the same items.
    """
    count = len(next(iter(wire.values()))) if wire else 0
    if count == 0:
        raise DataError("no requests to measure with; expected at least one row of user features")
    exported = open_export(Path(run))
    bundle = Bundle.open(exported.bundle)
    widths = list(bundle.manifest["widths"] if widths is None else widths)
    k = min(bundle.manifest["k"] if k is None else k, bundle.index.items)
    requests = [{name: value[i : i + 1] for name, value in wire.items()} for i in range(count)]
    loop = BareLoop(exported, bundle, widths, k)
    with ExitStack() as stack:
        ways: dict[str, Ask] = {"bare loop": loop}
        for mode in MODES:
            client, url = served(stack, run, mode)
            triton = stack.enter_context(InferenceServerClient(url))
            ways[f"triton, {mode}"] = through(client, triton, widths, k)
        answers = interleave(ways, requests, rounds, progress)
    _same_items(answers)
    return {
        "index": [bundle.index.nodes(layer) for layer in range(1, bundle.index.layers + 1)],
        "widths": widths,
        "k": k,
        "requests": count,
        "rounds": rounds,
        "search_recall": recall(loop, bundle, requests[:recall_requests], k, progress),
        "recall_requests": min(recall_requests, count),
        "candidates": _candidates(loop, requests),
        "ways": {name: _summary(given) for name, given in answers.items()},
    }


def interleave(
    ways: Mapping[str, Ask], requests: Sequence[Wire], rounds: int, progress: bool = False
) -> dict[str, list[Answer]]:
    """Every request through every way, after a few that are not counted; the order of the ways rotates."""
    for wire in requests[:WARM_UP]:
        for ask in ways.values():
            ask(wire)
    answers: dict[str, list[Answer]] = {name: [] for name in ways}
    names = list(ways)
    todo = [wire for _ in range(rounds) for wire in requests]
    for number, wire in enumerate(tqdm(todo, desc="measure", unit="request", disable=not progress)):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            answers[name].append(ways[name](wire))
    return answers


def recall(loop: BareLoop, bundle: Bundle, requests: Sequence[Wire], k: int, progress: bool) -> float:
    """Mean share of the exhaustive top ``k`` that the search returns."""
    shares, allowed = [], open_items(bundle)
    for wire in tqdm(requests, desc="exhaustive", unit="request", disable=not progress):
        best = best_items(bundle.index, loop.scorer, loop.encode(wire), k, bundle.schema.rank, allowed)
        shares.append(float(np.isin(best, loop(wire).item_ids).mean()))
    return float(np.mean(shares))


def report(found: dict[str, Any], command: str, name: str, results: Path, simulated: bool) -> Path:
    """Write orchestrator-NAME.json, .md and .png under ``results``; returns the .md."""
    return write_report(
        found,
        results / f"orchestrator-{name}",
        command,
        simulated,
        lambda shown: page(shown, name),
        stages_of_ways,
    )


def page(found: Mapping[str, Any], name: str) -> str:
    """The report as Markdown."""
    layers = len(found["index"])
    stages = ["user tower", *(f"layer {n}" for n in range(1, layers + 1)), "search"]
    base = found["ways"]["bare loop"]["microseconds"]["median"]
    rows = []
    for way, given in found["ways"].items():
        spread = Spread(**given["microseconds"])
        rows.append([way, spread.text(), f"{spread.median / base:.2f}", *map(str, given["stages"])])
    nodes = ", ".join(f"{count:,}" for count in found["index"])
    return "\n".join([
        f"# What the server adds: {name}",
        "",
        *(["Simulated data.", ""] if found["simulated"] else []),
        f"`{found['command']}` at commit {found['commit']}, {found['machine']}, {found['date']}. "
        f"Nodes per layer {nodes}; widths "
        f"{found['widths']}, K = {found['k']}. {found['requests']} requests, {found['rounds']} times each, every one "
        "through all ways before the next. Scored per request (median): "
        f"{', '.join(f'{count:,.0f}' for count in found['candidates'])}. Search recall@{found['k']} against the "
        f"exhaustive twin, {found['recall_requests']} requests: {found['search_recall']:.4f}. All ways returned the "
        "same items.",
        "",
        "```",
        table(["way", "microseconds, median (p10 to p90)", "of bare loop", *stages], rows),
        "```",
        "",
        "Stages are medians of what the search itself measured, in microseconds. Of Triton the call is timed, as in "
        "`hsnn bench breakdown`: the client's making of tensors and its parsing into hits, which the bare loop does "
        "not do, are left out.",
    ])  # fmt: skip


def served(stack: ExitStack, run: str | Path, mode: Any) -> tuple[RetrievalClient, str]:
    """A client of a server of its own over the run's export in that mode, both closed with the stack, and the server's
    gRPC address."""
    work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hsnn-bench-")))
    publish(run, work / "repository", options=ServingOptions(mode=mode))
    server = stack.enter_context(TritonServer(work / "repository"))
    promote(work / "repository", server.admin)
    client = stack.enter_context(RetrievalClient(server.urls.grpc, timeout=TIMEOUT_SECONDS))
    return client, server.urls.grpc


def _same_items(answers: Mapping[str, Sequence[Answer]]) -> None:
    """One graph on one machine gives one answer, whoever calls it."""
    (first, expected), *others = answers.items()
    for name, given in others:
        for number, (ours, theirs) in enumerate(zip(expected, given)):
            if not np.array_equal(ours.item_ids, theirs.item_ids):
                raise DataError(
                    f"request {number}: {name} returned other items than {first} "
                    f"({len(np.intersect1d(ours.item_ids, theirs.item_ids))} of {len(ours.item_ids)} in common), "
                    "expected the same ones in the same order"
                )


def _candidates(loop: BareLoop, requests: Sequence[Wire]) -> list[float]:
    counts = [[int(layer.candidates[0]) for layer in loop.search(wire).layers] for wire in requests]
    return [float(value) for value in np.median(counts, axis=0)]


def _summary(given: Sequence[Answer]) -> dict[str, Any]:
    return {
        "microseconds": asdict(Spread.of([answer.microseconds for answer in given])),
        "stages": [int(value) for value in np.median([answer.stages for answer in given], axis=0)],
    }
