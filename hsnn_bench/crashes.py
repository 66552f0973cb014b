"""Are acknowledged updates lost when something is killed? A client changes items all the time, while one process after
another is killed with SIGKILL: the log's writer, the orchestrator, the whole server, a compaction, a rollout.

After every kill what is broken is brought back, and two things must hold for every item: the log has its last
acknowledged update or a later one, and a search finds it, or does not, as the log says. The items are copies of the one
that a user's search puts first, so that this user's answer must hold all that are live.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
from tqdm import tqdm

from clients.encode import WireUsers
from clients.item_rows import ItemRows
from clients.items import ItemClient
from clients.retrieval import RetrievalClient
from export.pbtxt import INDEX, ORCHESTRATOR, ServingOptions
from export.publish import publish
from export.repository import versions
from export.rollout import promote
from hsnn_cli.commands_training import load_data
from hsnn_cli.provenance import commit, machine
from hsnn_cli.tables import table
from hsnn_core.errors import DataError, HsnnError, ServerError
from hsnn_core.files import write_bytes
from hsnn_core.item_log import LogReader
from hsnn_core.item_updates import APPLIED
from hsnn_server.triton import TritonServer
from hsnn_train.checkpoint import load_run, write_json
from hsnn_train.data.synthetic import simulate

from .capacity import real_requests
from .corpora import world_config

WRITER, ORCHESTRATOR_STUB, SERVER = "writer", "orchestrator", "server"
COMPACTION, ROLLOUT = "compaction", "rollout"
KINDS = (WRITER, ORCHESTRATOR_STUB, SERVER, COMPACTION, ROLLOUT)
COPIES = 60
FIRST_COPY = 1 << 41
PATIENCE = 10.0  # seconds until a search must show what the log says
KEPT = 3  # versions of the repository that are kept on the disk


@dataclass
class Outcome:
    """Of the kills of one kind."""

    kills: int = 0
    lost: int = 0
    not_served: int = 0
    seconds: list[float] = field(default_factory=list)
    details: list[str] = field(default_factory=list)


class Writing:
    """A client that upserts and deletes copies until it is closed, and remembers what was acknowledged."""

    def __init__(self, url: Callable[[], str], copy: Mapping[str, Any], seed: int) -> None:
        self._url, self._copy = url, copy
        self._rng = np.random.default_rng(seed)
        self._lock = Lock()
        self._acknowledged: dict[int, int] = {}  # item -> sequence
        self._sequence = 0
        self._closing = Event()
        self._pause = Event()
        self._thread = Thread(target=self._work, name="hsnn-writing", daemon=True)
        self.updates = 0

    def __enter__(self) -> Writing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._pause.set()
        self._thread.join()

    def pause(self) -> dict[int, int]:
        """Stop sending, and return what was acknowledged so far: item -> sequence."""
        self._pause.set()
        with self._lock:  # a call that is under way has ended
            return dict(self._acknowledged)

    def resume(self) -> None:
        """Go on."""
        self._pause.clear()

    def _work(self) -> None:
        while not self._closing.is_set():
            if self._pause.is_set():
                self._closing.wait(0.01)
                continue
            with self._lock:
                self._send()

    def _send(self) -> None:
        rows: list[dict[str, Any]] = []
        for item in self._rng.choice(COPIES, size=5, replace=False):
            self._sequence += 1
            row: dict[str, Any] = {"id": FIRST_COPY + int(item), "sequence": self._sequence}
            rows.append(row | {"deleted": True} if self._rng.random() < 0.3 else dict(self._copy) | row)
        try:
            with ItemClient(self._url(), timeout=1.0, retries=0) as client:
                status = client.upsert(rows).status
        except (HsnnError, OSError):
            self._closing.wait(0.05)  # it was killed: nothing was acknowledged
            return
        for row, applied in zip(rows, status):
            if applied == APPLIED:
                self._acknowledged[row["id"]] = row["sequence"]
                self.updates += 1


class Crashes:
    """A server with a repository and a log under ``work``, whatever is killed."""

    def __init__(self, run_dir: Path, work: Path, seed: int) -> None:
        self._run_dir, self._work = run_dir, work
        self._rng = np.random.default_rng(seed)
        self._run = load_run(run_dir)
        self._repository = work / "repository"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        self._k = self._run.recipe.search.max_k
        if self._k < COPIES:
            raise DataError(
                f"search.max_k is {self._k}, expected at least {COPIES}: one answer must hold all copies"
            )
        publish(run_dir, self._repository, options=ServingOptions(mode="in_process", workers=2, k=self._k))
        self._server = self._started()
        dataset = load_data(self._run.recipe)
        one = real_requests(dataset, 1)
        self._user = WireUsers({name: values[:1] for name, values in one.items()})
        self._copy = self._copy_of_the_first()

    def close(self) -> None:
        """Stop the server."""
        self._server.stop()

    def run(self, kills: int, progress: bool = True) -> tuple[dict[str, Outcome], int]:
        """Kill ``kills`` times, the kinds in turn; returns the outcomes by kind, and how many updates were
        acknowledged."""
        outcomes = {kind: Outcome() for kind in KINDS}
        with Writing(lambda: self._server.urls.grpc, self._copy, seed=7) as writing:
            for number in tqdm(range(kills), desc="kills", disable=not progress):
                kind = KINDS[number % len(KINDS)]
                writing.resume()
                time.sleep(float(self._rng.uniform(0.2, 0.8)))
                began = time.monotonic()
                self._kill(kind)
                self._bring_back(kind)
                acknowledged = writing.pause()
                outcome = outcomes[kind]
                outcome.kills += 1
                outcome.lost += self._lost(acknowledged)
                different = self._not_served()
                outcome.not_served += len(different)
                if different:
                    outcome.details.append(f"kill {number}: {different}")
                outcome.seconds.append(time.monotonic() - began)
            return outcomes, writing.updates

    def _kill(self, kind: str) -> None:
        if kind in (WRITER, ORCHESTRATOR_STUB):
            os.kill(self._stub(INDEX if kind == WRITER else ORCHESTRATOR), signal.SIGKILL)
        elif kind == SERVER:
            for pid in self._server.pids:
                os.kill(pid, signal.SIGKILL)
        else:
            program = _COMPACTION if kind == COMPACTION else _ROLLOUT
            arguments = [str(self._run_dir), str(self._repository), str(self._work / "compacted"),
                         self._server.urls.grpc, str(self._server.key_file)]  # fmt: skip
            running = subprocess.Popen(
                [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            assert running.stdout is not None
            running.stdout.readline()  # its imports are done
            time.sleep(float(self._rng.uniform(0.0, 1.5)))
            running.kill()
            running.wait()

    def _bring_back(self, kind: str) -> None:
        if kind in (WRITER, ORCHESTRATOR_STUB, SERVER):
            # Without the supervisor of `hsnn serve` a model whose stub is dead never ends unloading (Triton 2.51).
            for pid in self._server.pids:
                os.kill(pid, signal.SIGKILL)
            self._server.stop()
            self._server = self._started()
        elif kind == COMPACTION:
            shutil.rmtree(self._work / "compacted", ignore_errors=True)
        else:
            publish(self._run_dir, self._repository)  # which clears away what the killed one left
            promote(self._repository, self._server.admin)
            self._forget_old_versions()

    def _lost(self, acknowledged: Mapping[int, int]) -> int:
        with LogReader(self._repository / ".items" / "log.db", self._run.schema.hash) as reader:
            known = {entry.item: entry.sequence for entry in reader.since(0, 10 * COPIES)}
        return sum(known.get(item, -1) < sequence for item, sequence in acknowledged.items())

    def _not_served(self) -> list[tuple[int, str]]:
        """The copies that a search shows otherwise than the log says, when it has had time to follow."""
        until = time.monotonic() + PATIENCE
        with LogReader(self._repository / ".items" / "log.db", self._run.schema.hash) as reader:
            while True:
                # Anew each time: a call that its client has given up may still be written.
                live = {entry.item for entry in reader.since(0, 10 * COPIES) if not entry.deleted}
                answer = self._found()
                different = live ^ {item for item in answer if item >= FIRST_COPY}
                if not different or time.monotonic() > until:
                    return [(item, "not found" if item in live else "found") for item in sorted(different)]
                time.sleep(0.05)

    def _found(self) -> list[int]:
        try:
            with RetrievalClient(self._server.urls.grpc, timeout=5.0) as client:
                return [hit.item_id for hit in client.retrieve(self._user, k=self._k)[0]]
        except HsnnError:
            return []

    def _copy_of_the_first(self) -> dict[str, Any]:
        key = self._run.schema.item_key
        ads = simulate(world_config(self._run.recipe.data)).ads
        rows = dict(zip(ads.column(key).to_pylist(), ads.to_pylist()))
        update = ItemRows(self._run.schema).update(rows[self._found()[0]])
        return {name: value for name, value in update.items() if name not in ("id", "eligibility")}

    def _stub(self, model: str) -> int:
        for pid in self._server.pids:
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(f"/{model}/".encode() in word for word in words):
                return pid
        raise ServerError(f"no process of {model} among {self._server.pids}, expected its Python stub")

    def _started(self) -> TritonServer:
        server = TritonServer(self._repository).start()
        promote(self._repository, server.admin)
        return server

    def _forget_old_versions(self) -> None:
        """The bench's own housekeeping: a hundred versions would fill the disk."""
        for version in versions(self._repository)[:-KEPT]:
            for model in self._repository.iterdir():
                shutil.rmtree(model / str(version), ignore_errors=True)


_COMPACTION = """
import sys
from export.compaction import compact
run, repository, target = sys.argv[1:4]
print("begins", flush=True)
compact(run, repository + "/.items/log.db", target, progress=False)
"""
_ROLLOUT = """
import sys
from pathlib import Path
from clients.admin import RepositoryAdmin
from export.publish import publish
from export.rollout import promote
run, repository, _, url, key = sys.argv[1:6]
print("begins", flush=True)
publish(run, repository)
promote(repository, RepositoryAdmin(url, Path(key).read_text().strip()))
"""


def report(outcomes: Mapping[str, Outcome], updates: int, command: str, name: str, results: Path) -> Path:
    """Write crashes-NAME.json and .md under ``results``; returns the .md."""
    results.mkdir(parents=True, exist_ok=True)
    stem = results / f"crashes-{name}"
    kills = sum(outcome.kills for outcome in outcomes.values())
    found = {
        "command": command, "commit": commit(), "machine": machine(), "date": date.today().isoformat(),
        "kills": kills, "acknowledged": updates, "by_kind": {kind: asdict(o) for kind, o in outcomes.items()},
    }  # fmt: skip
    write_json(stem.with_suffix(".json"), found)
    rows: Sequence[Sequence[Any]] = [
        [kind, o.kills, o.lost, o.not_served, f"{np.median(o.seconds):.1f} ({max(o.seconds):.1f})"]
        for kind, o in outcomes.items() if o.kills
    ]  # fmt: skip
    columns = [
        "killed",
        "times",
        "updates lost",
        "items served otherwise",
        "seconds until checked, median (most)",
    ]
    text = "\n".join([
        f"# Acknowledged updates and kill -9: {name}",
        "",
        f"`{command}` at commit {found['commit']}, {found['machine']}, {found['date']}: {kills} kills with SIGKILL "
        f"while a client changed {COPIES} items; {updates:,} updates were acknowledged.",
        "",
        "```",
        table(columns, rows),
        "```",
        "",
        "Lost: an acknowledged update that the log has neither itself nor a later one of. Served otherwise: items that "
        f"a search shows, or does not, against the log, {PATIENCE:g} seconds after all runs again. Seconds hold what "
        "the bench does to bring things back: starting a server, after a killed stub too, a whole rollout "
        "after a killed one.",
    ])  # fmt: skip
    write_bytes(stem.with_suffix(".md"), (text + "\n").encode())
    return stem.with_suffix(".md")
