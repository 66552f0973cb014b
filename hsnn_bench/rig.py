"""A run that is served under supervision, for benches that break what serves it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

import numpy as np

from clients.items import ItemClient
from clients.retrieval import RetrievalClient, WireUsers
from export.pbtxt import ServingOptions
from export.publish import publish
from export.rollout import promote
from export.supervised import models, supervised
from hsnn_cli.commands_training import load_data
from hsnn_core.errors import HsnnError, ServerError
from hsnn_core.item_updates import APPLIED
from hsnn_server.stubs import model_of
from hsnn_server.supervisor import PATIENCE, Patience
from hsnn_server.triton import TritonServer
from hsnn_train.checkpoint import Run, load_run

from .capacity import real_requests

Mode = Literal["bls", "in_process"]
WORKERS = 2
FIRST_ITEM = 1 << 41
_WARM_UP = 50


@dataclass
class Rig:
    """``run``'s newest export, served by ``server`` from ``repository``. ``users``: wire tensors (R, ...) of real
    requests, each for ``k`` items; ``lines``: what the supervisor did, with the monotonic times."""

    run: Run
    run_dir: Path
    repository: Path
    server: TritonServer
    users: Mapping[str, np.ndarray]
    k: int
    mode: str
    simulated: bool
    lines: list[tuple[float, str]] = field(default_factory=list)

    def stub(self, model: str) -> int:
        """The process of the newest version of ``model``; ServerError when none lives."""
        found = {model_of(pid): pid for pid in self.server.pids}
        of_model = {key[1]: pid for key, pid in found.items() if key is not None and key[0] == model}
        if not of_model:
            raise ServerError(f"no process of {model} among {self.server.pids}, expected its Python stub")
        return of_model[max(of_model)]

    def kill_stub(self, model: str) -> None:
        """SIGKILL, as the system sends it to a process that takes too much memory."""
        os.kill(self.stub(model), signal.SIGKILL)


@contextmanager
def rig(
    run_dir: Path,
    work: Path,
    *,
    mode: Mode,
    k: int,
    requests: int,
    patience: Patience = PATIENCE,
    say: Callable[[str], None] = print,
    prepare: Callable[[Path], None] | None = None,
) -> Iterator[Rig]:
    """Publish the run's export into a new repository under ``work``, which is emptied first, and serve it; ``prepare``
    is called with the repository in between."""
    run = load_run(run_dir)
    dataset = load_data(run.recipe)
    shutil.rmtree(work, ignore_errors=True)
    repository = work / "repository"
    publish(run_dir, repository, options=ServingOptions(mode=mode, workers=WORKERS))
    if prepare is not None:
        prepare(repository)
    users = real_requests(dataset, requests)
    k = min(k, run.recipe.search.max_k, len(run.item_ids))
    with TritonServer(
        repository, preload=partial(models, repository), log_file=work / "triton.log"
    ) as server:
        promote(repository, server.admin)
        ready = Rig(run, run_dir, repository, server, users, k, mode, dataset.simulated)

        def note(line: str) -> None:
            ready.lines.append((time.monotonic(), line))
            say(line)

        with supervised(server, repository, patience, note):
            with RetrievalClient(server.urls.grpc, timeout=60.0) as client:
                for row in range(_WARM_UP):
                    at = row % len(next(iter(users.values())))
                    client.retrieve(
                        WireUsers({name: values[at : at + 1] for name, values in users.items()}), k=k
                    )
            yield ready


def from_here(text: str) -> str:
    """``text`` with paths below the working folder relative to it: reports name no machine's folders."""
    return text.replace(f"{Path.cwd()}/", "")


class ItemChanges:
    """Upserts and deletes of ``items`` made-up items, ``rate`` a second, in a thread while it is entered.

    ``applied``, ``failed``: updates; ``failures``: what the client was told of failed ones, with how many."""

    def __init__(self, url: str, rate: float, items: int = 500, batch: int = 5) -> None:
        self._client = ItemClient(url, timeout=2.0, retries=0, batch=batch)
        self._rng = np.random.default_rng(2)
        self._items, self._batch, self._period = items, batch, batch / rate
        self._closing = Event()
        self._thread = Thread(target=self._work, name="hsnn-item-changes", daemon=True)
        self.applied = self.failed = 0
        self.failures: dict[str, int] = {}

    def __enter__(self) -> ItemChanges:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        self._client.close()

    def _work(self) -> None:
        due = time.monotonic()
        while not self._closing.wait(max(0.0, due - time.monotonic())):
            due = max(due + self._period, time.monotonic())  # what an outage held up is not made up for
            rows = [
                self._row(int(item)) for item in self._rng.choice(self._items, self._batch, replace=False)
            ]
            try:
                results = self._client.upsert(rows)
            except HsnnError as error:
                self._count(f"{error.status} {type(error).__name__}: {error}", self._batch)
                continue
            good = results.count(APPLIED)
            self.applied += good
            for _, message in results.reasons("failed", "refused", "stale"):
                self._count(message, 1)

    def _row(self, item: int) -> dict[str, Any]:
        row: dict[str, Any] = {"id": FIRST_ITEM + item}
        return row | {"deleted": True} if self._rng.random() < 0.3 else row

    def _count(self, what: str, updates: int) -> None:
        self.failed += updates
        what = from_here(what)
        self.failures[what] = self.failures.get(what, 0) + updates
