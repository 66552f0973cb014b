"""What a request costs in Triton: the HSNN beside its peers in one server, asked by one client in turns.

Every round asks every model a block of requests, so a machine that slows down slows all of them alike; each round has
an order of its own, so that no model always comes behind the same one. Latency is what the client waits for the
answer's bytes (it does not parse them). CPU time is that of all processes of the server, read before a block and a
moment after it, without what the server uses when nobody asks. Recall is that of the served answers against scoring
every item with the same model.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tqdm import tqdm

from clients.load import METHOD, each_user, serialise
from clients.retrieval import RetrievalClient, WireUsers
from export.open_items import open_filter
from hsnn_cli.commands_training import load_data
from hsnn_cli.provenance import commit, machine
from hsnn_core.bundle import Bundle
from hsnn_core.errors import DataError
from hsnn_core.exhaustive import exhaustive
from hsnn_core.features import Encoded
from hsnn_core.onnx_runner import OnnxRunner
from hsnn_server.triton import TritonServer
from hsnn_server.usage import cpu_seconds
from hsnn_train.checkpoint import check_inputs, load_run

from .serving_peers import Grown, Peer, build_peers

BLOCK = 10  # requests of a model in a round
WARM_UP = 20
# Seconds after a block for what a model does behind its answer: metrics are reported every 0.25.
_SETTLE = 0.3
_SEED = 1  # of the orders
P99_SAMPLES = 1000  # requests from which on a 99th percentile says something


@dataclass(frozen=True)
class Measured:
    """One model's rounds: ``milliseconds`` (rounds, BLOCK), what the client waited; ``cpu`` (rounds,) CPU
    milliseconds per request."""

    milliseconds: np.ndarray
    cpu: np.ndarray


def run_serving(
    run_dir: Path,
    k: int,
    requests: int,
    rounds: int,
    recall_requests: int,
    workers: int,
    widths: tuple[int, ...] | None,
    command: str,
    grown: Grown | None = None,
) -> dict[str, Any]:
    """Build the peers of a run, serve and measure them; returns the report (see `serving_report.write_report`).

    ``k``: items per request, cut to what the run allows; ``requests``: distinct test requests; ``rounds``: of BLOCK
    requests per model; ``recall_requests``: how many of them recall is taken over; ``workers``,
    ``widths``, ``grown``: see `build_peers`. Raises DataError when the test
    split has no requests, and what `build_peers` raises.
    """
    made_at = commit()  # not what the checkout has become when all is measured
    run = load_run(run_dir)
    dataset = load_data(run.recipe)
    check_inputs(run_dir, dataset.schema, dataset.transform, dataset.items, dataset.item_keys)
    wire, users = dataset.requests("test", requests)
    if not len(users):
        raise DataError(f"run {run_dir}: no request in its test split; change the recipe's split:")
    items = len(run.item_ids) if grown is None else grown.items
    k = min(k, run.recipe.search.max_k, items)
    with tempfile.TemporaryDirectory(prefix=".serving-", dir=run_dir) as folder:
        repository = Path(folder) / "repository"
        peers = build_peers(run, dataset, repository, k, workers, widths, grown)
        names = [name for peer in peers for name in (*peer.networks, peer.model)]
        with TritonServer(repository, models=names) as server:
            measured, idle = measure(server, peers, wire, k, rounds)
            answers = {peer.model: _ask(server, peer, wire, k, recall_requests) for peer in peers}
    twins = _Twins(users, k, recall_requests)
    rows = [_row(peer, measured[peer.model], twins.recall(peer, answers[peer.model])) for peer in peers]
    return {
        "recipe": run.recipe.name, "simulated": dataset.simulated, "command": command, "commit": made_at,
        "machine": machine(), "date": date.today().isoformat(), "items": items, "k": k,
        "layers": list(run.recipe.model.layers), "requests": len(users), "rounds": rounds, "block": BLOCK,
        "recall_requests": min(recall_requests, len(users)), "workers": workers, "idle_cpu_share": idle,
        "rows": _ratios(rows),
    }  # fmt: skip


def measure(
    server: TritonServer,
    peers: Sequence[Peer],
    wire: Mapping[str, np.ndarray],
    k: int,
    rounds: int,
) -> tuple[dict[str, Measured], float]:
    """By model, see the module's text, and the CPU seconds per second that the server uses when nobody asks: the median
    of a pause in each round. ``wire``: wire tensors (R, ...) of the users to ask for, in turn."""
    pids = server.pids
    with grpc.insecure_channel(server.urls.grpc, [("grpc.max_receive_message_length", 64 << 20)]) as channel:
        call = channel.unary_unary(METHOD)
        messages = {}
        for peer in peers:
            with RetrievalClient(server.urls.grpc, timeout=30, model=peer.model) as client:
                messages[peer.model] = serialise(client.connect(), each_user(wire), k=k, widths=peer.widths)
        for peer in peers:
            for message in messages[peer.model][:WARM_UP]:
                call(message, timeout=60)
        waited: dict[str, list[list[float]]] = {peer.model: [] for peer in peers}
        cpu: dict[str, list[tuple[float, float]]] = {
            peer.model: [] for peer in peers
        }  # used, in so many seconds
        pauses = []
        rng = np.random.default_rng(_SEED)
        for number in tqdm(range(rounds), desc="serving", unit="round"):
            pauses.append(_idle_cpu(server, _SETTLE))
            for place in rng.permutation(len(peers)):
                model = peers[place].model
                own = messages[model]
                block = [own[(number * BLOCK + i) % len(own)] for i in range(BLOCK)]
                before, began = cpu_seconds(pids), time.perf_counter()
                waited[model].append([_milliseconds(call, message) for message in block])
                time.sleep(_SETTLE)
                cpu[model].append((cpu_seconds(pids) - before, time.perf_counter() - began))
    idle, found = float(np.median(pauses)), {}
    for model, blocks in cpu.items():
        used, lasted = np.array(blocks).T
        found[model] = Measured(np.array(waited[model]), 1000 * (used - idle * lasted) / BLOCK)
    return found, idle


def _milliseconds(call: Callable[..., Any], message: bytes) -> float:
    began = time.perf_counter()
    call(message, timeout=60)
    return 1000 * (time.perf_counter() - began)


def _idle_cpu(server: TritonServer, seconds: float) -> float:
    """CPU seconds per second that the server uses while nobody asks."""
    pids = server.pids
    before = cpu_seconds(pids)
    time.sleep(seconds)
    return (cpu_seconds(pids) - before) / seconds


def _ask(
    server: TritonServer, peer: Peer, wire: Mapping[str, np.ndarray], k: int, count: int
) -> list[np.ndarray]:
    """Item ids per request, as many as came back; none for a model without retrieval."""
    if peer.exported is None:
        return []
    found = []
    with RetrievalClient(server.urls.grpc, timeout=60, model=peer.model) as client:
        for number, user in enumerate(each_user(wire)):
            if number == count:
                break
            (hits,) = client.retrieve(WireUsers(user), k=k, widths=peer.widths)
            found.append(np.array([hit.item_id for hit in hits], np.int64))
    return found


class _Twins:
    """Exhaustive top K of the models, each computed once."""

    def __init__(self, users: Encoded, k: int, count: int) -> None:
        self._users = Encoded(users.dense[:count], users.ids[:count])
        self._k = k
        self._known: dict[tuple[Path, int | None], list[np.ndarray]] = {}

    def recall(self, peer: Peer, answers: Sequence[np.ndarray]) -> list[float]:
        """Share of the model's own exhaustive top K that was served, by request; none without retrieval, and of a
        request that may get nothing."""
        if peer.exported is None:
            return []
        key = (peer.exported.path, peer.task)
        if key not in self._known:
            self._known[key] = self._exhaustive(peer)
        return [float(np.isin(best, ids).mean()) for ids, best in zip(answers, self._known[key]) if len(best)]

    def _exhaustive(self, peer: Peer) -> list[np.ndarray]:
        """By request the item ids of the best K."""
        assert peer.exported is not None
        bundle = Bundle.open(peer.exported.bundle, verify=False)
        graphs = [peer.exported.path / f"scorer_l{layer}.onnx" for layer in range(1, bundle.index.layers + 1)]
        scorer = bundle.scorer(OnnxRunner(peer.exported.path / "user_tower.onnx", graphs))
        rank = bundle.schema.rank
        if peer.task is not None:  # Faiss ranks by one task alone
            rank = np.eye(len(rank), dtype=np.float32)[peer.task]
        allowed = open_filter(bundle)
        best = []
        for row in tqdm(range(len(self._users)), desc=f"exhaustive twin of {peer.label}", unit="request"):
            user = Encoded(self._users.dense[row : row + 1], self._users.ids[row : row + 1])
            found = exhaustive(bundle.index, scorer, user, self._k, rank, allowed)
            best.append(found.item_ids[0, : found.valid[0]])
        return best


def _row(peer: Peer, measured: Measured, shares: Sequence[float]) -> dict[str, Any]:
    """``recall_error``: the standard error of the mean over requests; ``p99``: None of too few samples."""
    waited = measured.milliseconds
    some = len(shares) > 1
    return {
        "model": peer.model, "label": peer.label, "settings": peer.settings,
        "recall": float(np.mean(shares)) if shares else None,
        "recall_error": float(np.std(shares, ddof=1) / len(shares) ** 0.5) if some else None,
        "latency_ms": {
            "p50": float(np.percentile(waited, 50)),
            "p99": float(np.percentile(waited, 99)) if waited.size >= P99_SAMPLES else None,
        } | _spread(np.median(waited, axis=1)),
        "cpu_ms": {"median": float(np.median(measured.cpu))} | _spread(measured.cpu),
    }  # fmt: skip


def _spread(rounds: np.ndarray) -> dict[str, float]:
    """10th and 90th percentile over rounds."""
    return {name: float(np.percentile(rounds, q)) for name, q in (("low", 10), ("high", 90))}


def _ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with its CPU time and p50 relative to EBR-IVF's."""
    base = next(row for row in rows if row["model"] == "ebr_ivf")
    for row in rows:
        row["against_ebr_ivf"] = {
            "cpu": row["cpu_ms"]["median"] / base["cpu_ms"]["median"],
            "p50": row["latency_ms"]["p50"] / base["latency_ms"]["p50"],
        }
    return rows
