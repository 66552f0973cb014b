"""Do rollouts lose requests? Load on a server while snapshots are published, promoted and rolled back."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from clients.load import Fates, each_user, serialise
from export.candidate import promote_candidate, publish_candidate
from export.export_run import export_source, source_of
from export.pbtxt import ServingOptions
from export.publish import publish
from export.retire import retire
from export.rollout import promote, rollback
from hsnn_cli.commands_training import load_data
from hsnn_cli.provenance import commit, machine
from hsnn_server.triton import TritonServer
from hsnn_train.checkpoint import load_run

from .capacity import connect, real_requests, summary, warm_up
from .rollouts_load import TOLERANCE, Expected, check, closed_loop, load_until

EXPORTS = ("as trained", "changed")
_NOISE = 0.05  # of a parameter's own deviation, so that the second export answers otherwise
_CLOSED_SECONDS = 5.0
_SETTLED = 2.0  # seconds of load before the first rollout and after each step


def run_rollouts(
    run_dir: Path,
    *,
    rollouts: int,
    rollbacks: int,
    capacity: float | None,
    load: float,
    mode: Literal["bls", "in_process"],
    workers: int,
    queue: int,
    k: int,
    deadline: float,
    requests: int,
    command: str,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure; returns the report (see `rollouts_report.write_report`).

    The run is exported twice, once with its weights changed a little, and the two are published in turns. ``capacity``:
    requests a second, None: measured with as many requests under way as ``workers``; ``load``: the share of it that
    is sent; ``deadline``: seconds that each request is allowed."""
    made_at = commit()  # not what the checkout has become when all is measured
    run = load_run(run_dir)
    dataset = load_data(run.recipe)
    wire = real_requests(dataset, requests)
    k = min(k, run.recipe.search.max_k, len(run.item_ids))
    with tempfile.TemporaryDirectory(prefix="hsnn-rollouts-") as folder:
        work = Path(folder)
        folders = {name: work / str(number) for number, name in enumerate(EXPORTS)}
        repository = work / "repository"
        export_source(source_of(run), folders[EXPORTS[0]], progress=False)
        options = ServingOptions(mode=mode, workers=workers, queue=queue)
        export_of = {publish(folders[EXPORTS[0]], repository, options=options): EXPORTS[0]}
        with TritonServer(repository) as server:
            promote(repository, server.admin)
            fresh = _to_serving(run_dir, folders[EXPORTS[1]], repository, server)
            export_of[fresh.pop("version")] = EXPORTS[1]
            say(f"from checkpoint to serving: {fresh['total']:.1f} s")
            expected = {name: Expected.of(path, wire, k) for name, path in folders.items()}
            apart = expected[EXPORTS[0]].apart(expected[EXPORTS[1]])
            served = connect(run, server.urls.grpc, server.urls.metrics)
            warm_up(served, wire, k)
            messages = serialise(served.model, each_user(wire), k=k, deadline=deadline)
            if capacity is None:
                capacity = closed_loop(server.urls.grpc, messages, workers, _CLOSED_SECONDS)
            say(f"load {load:g} of a closed-loop throughput of {capacity:.1f} requests a second")
            with _loaded(work, server.urls.grpc, messages, load * capacity, deadline) as future:
                _wait_for_load(work / "answers", future)
                steps = _steps(repository, server, folders, export_of, rollouts, rollbacks, say)
            fates = future.result()
        found = check(work / "answers", len(messages), export_of, expected)
    counts = fates.counts()
    return {
        "recipe": run.recipe.name, "simulated": dataset.simulated, "command": command, "commit": made_at,
        "machine": machine(), "date": date.today().isoformat(), "items": len(run.item_ids), "k": k, "mode": mode,
        "workers": workers, "queue": queue, "capacity": capacity, "load": load, "rollouts": rollouts,
        "rollbacks": rollbacks, "requests": summary(fates, capacity) | {
            "seconds": fates.seconds, "not_answered": len(fates) - counts["answered"],
            "p50_ms": fates.milliseconds(50), "p99_ms": fates.milliseconds(99), "most_ms": fates.milliseconds(100),
        },
        "answers": asdict(found) | {"tolerance": TOLERANCE, "distinct_requests": len(messages),
                                    "apart": {"least": float(apart.min()), "median": float(np.median(apart)),
                                              "alike": int((apart <= 2 * TOLERANCE).sum())}},
        "steps": steps, "to_serving": fresh,
    }  # fmt: skip


def _to_serving(run_dir: Path, folder: Path, repository: Path, server: TritonServer) -> dict[str, Any]:
    """From a trained checkpoint on disk to a snapshot that serves, with nothing else to do; seconds by step."""
    marks = [time.perf_counter()]
    run = load_run(run_dir)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(1)
        for parameter in run.model.parameters():
            if parameter.numel() > 1:
                deviation = torch.randn(parameter.shape, generator=noise) * parameter.std()
                parameter.add_(_NOISE * deviation)
    marks.append(time.perf_counter())
    export_source(source_of(run), folder, progress=False)
    marks.append(time.perf_counter())
    publish_candidate(folder, repository, server.admin)
    marks.append(time.perf_counter())
    version = promote_candidate(repository, server.admin)
    marks.append(time.perf_counter())
    took = dict(zip(("load", "export", "publish", "promote"), np.diff(marks).tolist()))
    return took | {"total": marks[-1] - marks[0], "version": version}


@contextmanager
def _loaded(
    work: Path, url: str, messages: list[bytes], rate: float, deadline: float
) -> Iterator[Future[Fates]]:
    """Requests from a process of its own, while the block runs; gives the future of their fates."""
    stop = work / "stop"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        future = pool.submit(load_until, stop, url, messages, rate, deadline, work / "answers")
        try:
            yield future
        finally:
            stop.touch()


def _steps(
    repository: Path,
    server: TritonServer,
    folders: dict[str, Path],
    export_of: dict[int, str],
    rollouts: int,
    rollbacks: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rollouts, and rollbacks spread evenly among them; seconds of each."""
    steps: list[dict[str, Any]] = []
    back = 0
    for number in range(rollouts):
        name = EXPORTS[number % 2]
        began = time.perf_counter()
        version = publish_candidate(folders[name], repository, server.admin)
        export_of[version] = name
        published = time.perf_counter()
        promote_candidate(repository, server.admin)
        ended = time.perf_counter()
        steps.append(
            {
                "kind": "rollout",
                "version": version,
                "publish": published - began,
                "promote": ended - published,
            }
        )
        say(f"rollout {number + 1} of {rollouts}: version {version}, {ended - began:.1f} s")
        time.sleep(_SETTLED)
        if (number + 1) * rollbacks // rollouts > back:
            back += 1
            began = time.perf_counter()
            version = rollback(repository, server.admin)
            steps.append({"kind": "rollback", "version": version, "rollback": time.perf_counter() - began})
            say(f"rollback {back} of {rollbacks}: version {version}, {steps[-1]['rollback']:.1f} s")
            time.sleep(_SETTLED)
        retire(repository, server.admin)
    return steps


def _wait_for_load(answers: Path, load: Future[Fates]) -> None:
    while not answers.exists():
        if load.done():
            load.result()
        time.sleep(0.1)
    time.sleep(_SETTLED)
