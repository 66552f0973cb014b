"""The whole way in one process: train → export → publish → serve → query, with what was measured on it.

`hsnn pipeline` runs it on any recipe; `hsnn demo` takes the same steps on simulated ads, and may keep the server.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from clients.retrieval import Results, RetrievalClient, WireUsers
from export.export_run import export_run
from export.pbtxt import ServingOptions
from export.publish import publish
from export.rollout import promote
from hsnn_core.bundle import Bundle
from hsnn_core.eligibility import AttributeBitmaps, Context
from hsnn_core.errors import DataError
from hsnn_core.exhaustive import exhaustive
from hsnn_core.features import Encoded
from hsnn_core.item_filter import MaskFilter
from hsnn_core.search import SearchResult, search
from hsnn_server.triton import TritonServer
from hsnn_train.checkpoint import load_run, write_json
from hsnn_train.data.dataset import Dataset
from hsnn_train.plots import latency_per_layer
from hsnn_train.recipe import Recipe
from hsnn_train.runner import TorchRunner

from .commands_training import load_data, train_and_evaluate
from .provenance import commit, machine

Mode = Literal["bls", "in_process"]
SCORE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Served:
    """Answers of the running server to the sampled users, one request each.

    results: per user its hits and timings; seconds: per user the time the client waited."""

    results: list[Results]
    seconds: np.ndarray

    def stages(self) -> tuple[list[str], np.ndarray]:
        """Names of the server's stages, and their microseconds (requests, N + 2)."""
        rows = []
        for result in self.results:
            assert result.timings is not None
            rows.append([result.timings.user_tower, *result.timings.layers, result.timings.total])
        layers = len(rows[0]) - 2
        names = ["user tower", *(f"layer {i}" for i in range(1, layers + 1)), "whole request"]
        return names, np.array(rows, np.float64)


def publish_run(recipe: Recipe, dataset: Dataset, work: Path, mode: Mode) -> tuple[dict[str, Any], Path, int]:
    """Train, evaluate, export and publish; returns the metrics, the repository and the version."""
    run, repository = work / "run", work / "repository"
    metrics = train_and_evaluate(recipe, dataset, run)
    real, _ = dataset.requests("test", 64)
    exported = export_run(run, users=real)
    print(f"\nexported: {exported.path}\n{exported.report.summary()}")
    version = publish(run, repository, options=ServingOptions(mode=mode))
    print(f"published: version {version} in {repository}")
    return metrics, repository, version


def ask(client: RetrievalClient, wire: dict[str, np.ndarray], k: int) -> Served:
    """One request per user of the wire tensors (R, ...), after a few that are not counted."""
    count = len(next(iter(wire.values())))
    users = [WireUsers({name: values[i : i + 1] for name, values in wire.items()}) for i in range(count)]
    for user in users[:5]:
        client.retrieve(user, k=k)
    results, seconds = [], []
    for user in tqdm(users, desc="query", unit="request", mininterval=0.5):
        began = time.perf_counter()
        results.append(client.retrieve(user, k=k, timings=True))
        seconds.append(time.perf_counter() - began)
    return Served(results, np.array(seconds))


def compare(served: Served, offline: SearchResult, tasks: Sequence[str]) -> dict[str, Any]:
    """Served ids and probabilities against the offline search of the torch model, user by user.

    Every served item must stand in the offline list with the same probabilities; only one whose score ties
    (within the tolerance) with the offline list's last may be absent from it.
    """
    worst, in_order, mismatched = 0.0, 0, 0
    for row, hits in enumerate(result[0] for result in served.results):
        count = int(offline.valid[row])
        wanted = {int(item): place for place, item in enumerate(offline.item_ids[row, :count])}
        in_order += [hit.item_id for hit in hits] == list(wanted)
        good = len(hits) == count
        for hit in hits:
            place = wanted.get(hit.item_id)
            if place is None:
                gap = abs(hit.rank_score - float(offline.rank_score[row, count - 1]))
            else:
                scores = np.array([hit.scores[task] for task in tasks])
                gap = float(np.abs(scores - offline.probabilities[row, place]).max())
            worst = max(worst, gap)
            good = good and gap <= SCORE_TOLERANCE
        mismatched += not good
    return {
        "users": len(served.results),
        "same_ids_in_order": in_order,
        "mismatched": mismatched,
        "largest_score_difference": worst,
    }


def check_against_offline(run_dir: Path, users: Encoded, served: Served, k: int) -> dict[str, Any]:
    """What was served beside the offline search of the *torch* model on the published index, and full-width
    search beside exhaustive scoring (must be equal to the bit)."""
    run = load_run(run_dir)
    bundle = Bundle.open(run_dir / "export" / "bundle")
    scorer = bundle.scorer(TorchRunner(run.model))
    rank = run.schema.rank
    widths = bundle.manifest["widths"]
    allowed = _without_context(bundle)
    parts = [
        search(bundle.index, scorer, _row(users, i), widths, k, rank, allowed) for i in range(len(users))
    ]
    offline = SearchResult(
        item_ids=np.concatenate([p.item_ids for p in parts]),
        probabilities=np.concatenate([p.probabilities for p in parts]),
        rank_score=np.concatenate([p.rank_score for p in parts]),
        valid=np.concatenate([p.valid for p in parts]),
        positions=np.concatenate([p.positions for p in parts]),
        layers=(),
        user_microseconds=0,
        total_microseconds=0,
    )
    report = compare(served, offline, [task.name for task in run.schema.tasks])
    full = [bundle.index.nodes(layer) for layer in range(1, bundle.index.layers)]
    equal, found = 0, 0.0
    sample = range(min(len(users), 50))
    for i in sample:
        exact = exhaustive(bundle.index, scorer, _row(users, i), k, rank, allowed)
        wide = search(bundle.index, scorer, _row(users, i), full, k, rank, allowed)
        equal += bool(np.array_equal(wide.item_ids, exact.item_ids)) and bool(
            np.array_equal(wide.rank_score, exact.rank_score)
        )
        n = int(exact.valid[0])
        found += len(np.intersect1d(offline.item_ids[i, :n], exact.item_ids[0, :n])) / max(1, n)
    report["full_width_equals_exhaustive"] = f"{equal} of {len(sample)}"
    report["served_search_recall"] = found / len(sample)
    return report


def _without_context(bundle: Bundle) -> MaskFilter | None:
    """What a request without context may get, as `ask` sends them; None where the schema restricts nothing."""
    if bundle.attributes is None:
        return None
    context = Context.from_wire(bundle.schema, {}, users=1, now=time.time())
    bits = AttributeBitmaps(bundle.attributes).matching(context, 0)
    mask = np.unpackbits(bits, count=bundle.index.items, bitorder="little").astype(bool)
    return MaskFilter(bundle.index, mask[None])


def _row(users: Encoded, i: int) -> Encoded:
    return Encoded(users.dense[i : i + 1], users.ids[i : i + 1])


def run_pipeline(
    recipe: Recipe, work: Path, users: int = 200, k: int = 100, mode: Mode = "bls"
) -> dict[str, Any]:
    """Everything, and a report of it (also written to work/report.json)."""
    began = time.monotonic()
    dataset = load_data(recipe)
    if not dataset.relevant("test", 1)[1]:
        raise DataError(
            "no user has a positive of the first task in test, so nothing served could be checked; change split: "
            "in the recipe, or run hsnn train, export, publish and serve one by one"
        )
    metrics, repository, version = publish_run(recipe, dataset, work, mode)
    requests, encoded = dataset.requests("test", users)
    k = min(k, len(dataset.item_keys))
    with TritonServer(repository, log_file=work / "triton.log") as server:
        promote(repository, server.admin)
        with RetrievalClient(server.urls.grpc, timeout=30.0) as client:
            served = ask(client, requests, k)
    names, stages = served.stages()
    plot = latency_per_layer(names, stages, work / "run" / "plots" / "latency.png")
    report = {
        "recipe": recipe.name,
        "simulated": dataset.simulated,
        "notes": list(dataset.notes),
        "machine": machine(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "seed": recipe.train.seed,
        "mode": mode,
        "minutes": (time.monotonic() - began) / 60,
        "metrics": metrics,
        "served": {
            "version": version,
            "k": k,
            "p50_ms_client": float(np.median(served.seconds) * 1000),
            "p99_ms_client": float(np.percentile(served.seconds, 99) * 1000),
            "p50_ms_stages": dict(zip(names, (np.median(stages, axis=0) / 1000).round(3).tolist())),
        },
        "offline": check_against_offline(work / "run", encoded, served, k),
        "plots": [str(plot)],
    }
    write_json(work / "report.json", report)
    return report
