"""Does it last? Hours of load with items that change, rollouts, and processes that are killed.

All that is measured is appended to CSV files as it happens, so that a run that was cut off has its results, too; the
report is made of these files alone (`endurance_report`).
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass, fields
from datetime import date
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

import numpy as np

from export.candidate import publish_and_promote, withdraw
from export.pbtxt import INDEX, ORCHESTRATOR
from export.repository import candidate, snapshot_models, versions
from export.retire import retire
from hsnn_cli.provenance import commit, machine
from hsnn_core.errors import HsnnError
from hsnn_server.usage import resident_bytes, shared_bytes
from hsnn_train.checkpoint import write_json

from .client_load import OK, Calls, client_load, closed_loop
from .rig import WORKERS, ItemChanges, Mode, Rig, rig

SAMPLES = 720  # at most, and none shorter than a second
MIB = 1 << 20
LATE = 0.25  # seconds beyond its timeout, after which a call has outlived it
_CLOSED_SECONDS = 5.0
_CLOSED_TURNS = 5  # of which the median counts: one can fall into a fast or a slow moment of the machine
_ERRORS_KEPT = 1000  # events of failed calls
_TICK = 0.1


@dataclass(frozen=True)
class Sample:
    """Of one interval, at its end: calls that ended by what they came to, their latencies in milliseconds (nan: there
    were none), memory of all processes of the server, regions in /dev/shm of its living stubs and those
    ``left`` by dead ones, updates of items."""

    minutes: float
    answered: int
    refused: int
    failed: int
    outlived: int
    p50_ms: float
    p99_ms: float
    most_ms: float
    resident_mib: float
    shared_mib: float
    left_mib: float
    processes: int
    updates: int
    updates_failed: int


@dataclass(frozen=True)
class Incident:
    """Something that was done or seen: ``kind`` "killed", "rollout", "supervisor" or "failed call"."""

    minutes: float
    kind: str
    what: str


@dataclass(frozen=True)
class Plan:
    """``load``: share of ``capacity``, requests a second (None: the closed-loop throughput, measured beside updates);
    ``updates``: of items a second; ``rollout_every``, ``kill_every``: minutes; ``timeout``: seconds of a request."""

    minutes: float
    load: float
    capacity: float | None
    updates: float
    rollout_every: float
    kill_every: float
    mode: Mode
    k: int
    timeout: float
    requests: int


class Journal:
    """The two CSV files of one run, appended to and flushed line by line."""

    def __init__(self, stem: Path) -> None:
        self._samples, self._incidents = paths(stem)[:2]
        for path, kind in ((self._samples, Sample), (self._incidents, Incident)):
            _append(path, [[f.name for f in fields(kind)]], "w")

    def sample(self, row: Sample) -> None:
        values = [round(value, 4) if isinstance(value, float) else value for value in astuple(row)]
        _append(self._samples, [values])

    def incidents(self, rows: Iterable[Incident]) -> None:
        _append(self._incidents, [[f"{row.minutes:.4f}", row.kind, row.what] for row in rows])


def paths(stem: Path) -> list[Path]:
    """Samples, incidents and facts of a run, then its report and plot."""
    return [
        stem.with_name(stem.name + ending) for ending in (".csv", "-incidents.csv", ".json", ".md", ".png")
    ]


def run_endurance(
    run_dir: Path, plan: Plan, work: Path, stem: Path, command: str, say: Callable[[str], None] = print
) -> None:
    """Serve the run for ``plan.minutes`` and write ``stem``.csv, -incidents.csv and .json as it goes."""
    made_at = commit()  # not what the checkout has become when all is measured
    stem.parent.mkdir(parents=True, exist_ok=True)
    with rig(run_dir, work, mode=plan.mode, k=plan.k, requests=plan.requests, say=say) as served:
        url = served.server.urls.grpc
        capacity = plan.capacity or _capacity(served, plan)
        rate = plan.load * capacity
        say(
            f"{rate:.1f} requests a second, {plan.load:g} of a closed-loop throughput of {capacity:.1f}, for "
            f"{plan.minutes:g} minutes"
        )
        facts = {
            "recipe": served.run.recipe.name, "simulated": served.simulated, "command": command, "commit": made_at,
            "machine": machine(), "date": date.today().isoformat(), "items": len(served.run.item_ids),
            **asdict(plan), "k": served.k, "capacity": capacity, "rate": rate, "workers": WORKERS,
        }  # fmt: skip
        write_json(paths(stem)[2], facts)
        journal = Journal(stem)
        with (
            client_load(work, url, served.users, served.k, rate, plan.timeout) as calls,
            ItemChanges(url, plan.updates) as changes,
            _Sampler(served, calls, changes, journal, plan) as sampler,
        ):
            _incidents(served, plan, sampler, say)


def _capacity(served: Rig, plan: Plan) -> float:
    """Answers a second of closed loops while items change as they will."""
    url = served.server.urls.grpc
    with ItemChanges(url, plan.updates):
        return median(
            closed_loop(url, served.users, served.k, WORKERS, _CLOSED_SECONDS, plan.timeout)
            for _ in range(_CLOSED_TURNS)
        )


def _incidents(served: Rig, plan: Plan, sampler: _Sampler, say: Callable[[str], None]) -> None:
    """Rollouts and kills at their times, until the plan is over."""
    rollouts = kills = 0
    targets = [ORCHESTRATOR, *_called(served), INDEX]
    while (minutes := sampler.minutes()) < plan.minutes:
        sampler.check()
        if minutes >= (rollouts + 1) * plan.rollout_every:
            rollouts += 1
            sampler.note("rollout", _rollout(served))
        elif minutes >= (kills + 0.75) * plan.kill_every:
            target = targets[kills % len(targets)]
            kills += 1
            try:
                served.kill_stub(target)
                sampler.note("killed", f"the stub of {target}")
            except HsnnError as error:
                sampler.note("killed", f"nothing: {error}")
        else:
            time.sleep(_TICK)


def _called(served: Rig) -> list[str]:
    """A network that the orchestrator calls, where it calls any."""
    if served.mode != "bls":
        return []
    models = snapshot_models(served.repository, versions(served.repository)[-1])
    return [next(model for model in models if "scorer" in model)]


def _rollout(served: Rig) -> str:
    """Publish, promote, clear away; what came of it. What an earlier one left, because the server was away, is
    withdrawn first."""
    began = time.monotonic()
    try:
        if candidate(served.repository) is not None:
            withdraw(served.repository, served.server.admin)
        version = publish_and_promote(served.run_dir, served.repository, served.server.admin)
        retire(served.repository, served.server.admin)
    except HsnnError as error:
        return f"failed after {time.monotonic() - began:.1f} s: {str(error).partition(chr(10))[0]}"
    return f"version {version} after {time.monotonic() - began:.1f} s"


class _Sampler:
    """Takes samples in a thread while it is entered."""

    def __init__(self, served: Rig, calls: Calls, changes: ItemChanges, journal: Journal, plan: Plan) -> None:
        self._served, self._calls, self._changes = served, calls, changes
        self._journal, self._timeout = journal, plan.timeout
        self._interval = max(1.0, 60 * plan.minutes / SAMPLES)
        self._began = time.monotonic()
        self._closing = Event()
        self._thread = Thread(target=self._work, name="hsnn-endurance", daemon=True)
        self._failure: BaseException | None = None
        self._lines = self._kept = 0
        self._updates = (0, 0)

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def minutes(self) -> float:
        return (time.monotonic() - self._began) / 60

    def note(self, kind: str, what: str) -> None:
        self._journal.incidents([Incident(self.minutes(), kind, what)])

    def check(self) -> None:
        """Raise what ended the thread."""
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            while not self._closing.wait(self._interval):
                self._sample()
            self._sample()
        except BaseException as error:
            self._failure = error

    def _sample(self) -> None:
        calls = self._calls.new()
        latency = 1000 * np.array([call.seconds for call in calls if call.status == OK])
        refused = sum(call.kind == "Overloaded" for call in calls)
        failed = [call for call in calls if call.status != OK and call.kind != "Overloaded"]
        p50, p99, most = np.percentile(latency, (50, 99, 100)) if len(latency) else (float("nan"),) * 3
        pids, prefix = self._served.server.pids, self._served.server.region_prefix
        all_regions, shared = shared_bytes(prefix), shared_bytes(prefix, pids)
        updates = (self._changes.applied, self._changes.failed)
        self._journal.sample(
            Sample(
                self.minutes(),
                len(latency),
                refused,
                len(failed),
                sum(call.seconds > self._timeout + LATE for call in calls),
                float(p50),
                float(p99),
                float(most),
                resident_bytes(pids) / MIB,
                shared / MIB,
                (all_regions - shared) / MIB,
                len(pids),
                updates[0] - self._updates[0],
                updates[1] - self._updates[1],
            )
        )
        self._updates = updates
        lines = self._served.lines[self._lines :]
        self._lines += len(lines)
        seen = [
            Incident((at - self._began) / 60, "supervisor", text.removeprefix("supervisor: "))
            for at, text in lines
        ]
        kept = failed[: max(0, _ERRORS_KEPT - self._kept)]
        self._kept += len(kept)
        seen += [
            Incident(
                (call.sent + call.seconds - self._began) / 60,
                "failed call",
                f"{call.status} {call.kind} after {call.seconds:.2f} s: {call.message}",
            )
            for call in kept
        ]
        self._journal.incidents(sorted(seen, key=lambda row: row.minutes))


def _append(path: Path, rows: Iterable[Iterable[Any]], how: str = "a") -> None:
    with path.open(how, newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
