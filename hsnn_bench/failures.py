"""What clients see when something breaks, and how long: one failure after another, under load."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from clients.items import ItemClient
from clients.retrieval import RetrievalClient, WireUsers
from export.pbtxt import INDEX, ORCHESTRATOR
from export.repository import snapshot_models, versions
from hsnn_cli.provenance import commit, machine
from hsnn_core.errors import HsnnError, RequestError
from hsnn_server.processes import SHARED_MEMORY
from hsnn_server.supervisor import PATIENCE, Patience

from .client_load import OK, Call, Calls, by_status, client_load, closed_loop
from .endurance import LATE
from .rig import WORKERS, ItemChanges, Mode, Rig, from_here, rig
from .small_disks import full, mount_small, own_mounts

QUIET = 3.0  # seconds in which every call must be answered, then it has recovered
GIVEN_UP = 90.0
SHARED_MIB, LOG_MIB = 96, 192  # an item log keeps up to 64 MiB beside itself
_CLOSED_SECONDS = 3.0
_UPDATES = 20.0  # a second
_TICK = 0.1
_EXCLUDED = 1_200_000  # items: 9 MiB in one request, where a region begins with 4 and grows by 4
_UNKNOWN, _DELETES = 1 << 42, 50_000


@dataclass(frozen=True)
class Failure:
    """``strike``: breaks it; what it gives is left after ``hold`` seconds, which undoes it. ``no_room``: it fills a
    small disk, and this is in what whoever needs room there is told; "" for one that fills none."""

    name: str
    hold: float
    strike: Callable[[Rig], AbstractContextManager[object]]
    no_room: str = ""


@dataclass(frozen=True)
class Outcome:
    """Of one failure. ``recovered``: seconds from the strike to the first answer after which all was answered, 0 when
    no call failed, None when that did not come in `GIVEN_UP` seconds; ``held``: how long it lasted by itself;
    ``undone``: whether something ended it then. ``exercised``: False for a full disk where nobody was told of it.
    ``answered``, ``refused`` and ``failed`` (by gRPC status and class of error): calls sent from the strike on;
    ``messages``: one text of each; ``longest``: seconds; ``outlived``: calls that took longer than their timeout.
    ``updates_failed``: item updates by what the client was told. ``supervisor``: what it did."""

    failure: str
    recovered: float | None
    held: float
    undone: bool
    exercised: bool
    answered: int
    refused: int
    failed: dict[str, int]
    messages: dict[str, str]
    longest: float
    outlived: int
    updates_failed: dict[str, int]
    supervisor: list[str]


def failures(mode: Mode) -> list[Failure]:
    """All of them, in the order in which they are tried."""
    found = [
        Failure("orchestrator's stub killed", 0.0, _killed(lambda rig: ORCHESTRATOR)),
        Failure("tower's stub killed", 0.0, _killed(_user_tower)),
        Failure("item writer's stub killed", 0.0, _killed(lambda rig: INDEX)),
        Failure("server killed (SIGKILL)", 0.0, _server_killed),
        Failure("orchestrator's stub stopped (SIGSTOP)", 15.0, _stopped(lambda rig: rig.stub(ORCHESTRATOR))),
        Failure("server stopped for 2 s (SIGSTOP, SIGCONT)", 2.0, _stopped(lambda rig: rig.server.pid)),
        Failure("server stopped for 15 s", 15.0, _stopped(lambda rig: rig.server.pid)),
        Failure("/dev/shm full for 5 s", 5.0, _full_shared_memory, "No space left"),
        Failure(
            "orchestrator's stub dies while /dev/shm is full (5 s)",
            5.0,
            _killed_without_room,
            "No space left",
        ),
        Failure("item log's disk full for 5 s", 5.0, _full_log, "no room on the disk"),
    ]
    return found if mode == "bls" else [failure for failure in found if "tower" not in failure.name]


def run_failures(
    run_dir: Path,
    *,
    rounds: int,
    load: float,
    capacity: float | None,
    mode: Mode,
    k: int,
    timeout: float,
    requests: int,
    work: Path,
    command: str,
    only: str | None = None,
    patience: Patience = PATIENCE,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Serve the run under supervision and try every failure ``rounds`` times (``only``: those whose name has this
    text); returns the report (see `failures_report`). Full disks are left out, and the report says so, where this
    process may not mount any."""
    made_at = commit()
    todo = [failure for failure in failures(mode) if only is None or only in failure.name]
    if not todo:
        raise RequestError(
            f"--only {only!r}: no failure has this in its name; there are {[f.name for f in failures(mode)]}"
        )
    mounted = any(failure.no_room for failure in todo) and own_mounts()
    if mounted:
        mount_small(SHARED_MEMORY, SHARED_MIB)
    left_out = [failure.name for failure in todo if failure.no_room and not mounted]
    todo = [failure for failure in todo if failure.name not in left_out]
    found: list[Outcome] = []
    with rig(
        run_dir, work, mode=mode, k=k, requests=requests, patience=patience, say=say,
        prepare=(lambda repository: _small_log(repository)) if mounted else None,
    ) as served:  # fmt: skip
        url = served.server.urls.grpc
        capacity = capacity or closed_loop(url, served.users, served.k, WORKERS, _CLOSED_SECONDS, 60.0)
        say(
            f"{load * capacity:.1f} requests a second, {load:g} of a closed-loop throughput of {capacity:.1f}"
        )
        with (
            client_load(work, url, served.users, served.k, load * capacity, timeout) as calls,
            ItemChanges(url, _UPDATES) as changes,
        ):
            for number in range(rounds):
                for failure in todo:
                    _settle(patience.settled + 2 * patience.probe, calls)
                    say(f"round {number + 1} of {rounds}: {failure.name}")
                    found.append(_one(failure, served, calls, changes, timeout))
                    recovered = found[-1].recovered
                    say(f"  recovered after {'too long' if recovered is None else f'{recovered:.2f} s'}; "
                        f"failed: {found[-1].failed or 'none'}")  # fmt: skip
    return {
        "recipe": served.run.recipe.name, "simulated": served.simulated, "command": command, "commit": made_at,
        "machine": machine(), "date": date.today().isoformat(), "items": len(served.run.item_ids), "k": served.k,
        "mode": mode, "capacity": capacity, "load": load, "timeout": timeout, "rounds": rounds, "left_out": left_out,
        "outcomes": [asdict(outcome) for outcome in found],
    }  # fmt: skip


def _one(failure: Failure, served: Rig, calls: Calls, changes: ItemChanges, timeout: float) -> Outcome:
    lines, before = len(served.lines), dict(changes.failures)
    struck = time.monotonic()
    seen: list[Call] = []
    with ExitStack() as held:
        held.enter_context(failure.strike(served))
        while time.monotonic() - struck < failure.hold:
            time.sleep(_TICK)
            seen += [call for call in calls.new() if call.sent >= struck]
    ended = time.monotonic()
    while time.monotonic() - ended < GIVEN_UP:
        time.sleep(_TICK)
        seen += [call for call in calls.new() if call.sent >= struck]
        if _good_since(seen, ended) <= time.monotonic() - QUIET - timeout:
            break
    else:
        return _outcome(failure, None, ended - struck, seen, timeout, served, lines, before, changes)
    bad = [call.sent for call in seen if not _good(call)]
    after = [
        call.sent + call.seconds for call in seen if call.status == OK and call.sent > max(bad, default=0.0)
    ]
    recovered = min(after) - struck if bad else 0.0
    return _outcome(failure, recovered, ended - struck, seen, timeout, served, lines, before, changes)


def _outcome(
    failure: Failure,
    recovered: float | None,
    held: float,
    seen: list[Call],
    timeout: float,
    served: Rig,
    lines: int,
    before: dict[str, int],
    changes: ItemChanges,
) -> Outcome:
    failed = [call for call in seen if not _good(call)]
    messages = {f"{call.status} {call.kind}": call.message for call in failed}
    updates = {
        what: count - before.get(what, 0)
        for what, count in dict(changes.failures).items()
        if count != before.get(what, 0)
    }
    supervisor = [line.removeprefix("supervisor: ") for _, line in served.lines[lines:]]
    return Outcome(
        failure=failure.name,
        recovered=recovered,
        held=held,
        undone=failure.hold > 0,
        exercised=any(failure.no_room in text for text in (*supervisor, *messages.values(), *updates))
        or not failure.no_room,
        answered=sum(call.status == OK for call in seen),
        refused=sum(call.kind == "Overloaded" for call in seen),
        failed=by_status(failed),
        messages=messages,
        longest=max((call.seconds for call in seen), default=0.0),
        outlived=sum(call.seconds > timeout + LATE for call in seen),
        updates_failed=updates,
        supervisor=supervisor,
    )


def _good(call: Call) -> bool:
    """Answered, or refused in time by a server that is at work."""
    return call.status == OK or call.kind == "Overloaded"


def _good_since(seen: list[Call], ended: float) -> float:
    """When the last call that failed was sent, or the failure ended; a call must have been answered since."""
    last = max((call.sent for call in seen if not _good(call)), default=ended)
    answered = any(call.status == OK and call.sent > last for call in seen)
    return max(last, ended) if answered else float("inf")


def _settle(seconds: float, calls: Calls) -> None:
    """Let the supervisor take the last attempt for one that has held; what came meanwhile is no failure's."""
    time.sleep(seconds)
    calls.new()


@contextmanager
def _nothing_to_undo() -> Iterator[None]:
    yield


def _killed(model: Callable[[Rig], str]) -> Callable[[Rig], AbstractContextManager[object]]:
    def strike(served: Rig) -> AbstractContextManager[object]:
        served.kill_stub(model(served))
        return _nothing_to_undo()

    return strike


def _user_tower(served: Rig) -> str:
    return snapshot_models(served.repository, versions(served.repository)[-1])[0]


def _server_killed(served: Rig) -> AbstractContextManager[object]:
    os.kill(served.server.pid, signal.SIGKILL)
    return _nothing_to_undo()


def _stopped(process: Callable[[Rig], int]) -> Callable[[Rig], AbstractContextManager[object]]:
    @contextmanager
    def strike(served: Rig) -> Iterator[None]:
        pid = process(served)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):  # the supervisor has ended it
                os.kill(pid, signal.SIGCONT)

    return strike


@contextmanager
def _full_shared_memory(served: Rig) -> Iterator[None]:
    """And a request for which the orchestrator's region must grow: what has its region needs no other room."""
    with full(SHARED_MEMORY):
        user = WireUsers({name: values[:1] for name, values in served.users.items()})
        try:
            with RetrievalClient(served.server.urls.grpc, timeout=20.0, retries=0) as client:
                client.retrieve(user, k=served.k, exclude_items=range(_UNKNOWN, _UNKNOWN + _EXCLUDED))
            told = "answered"
        except HsnnError as error:
            told = f"{error.status} {type(error).__name__}: {error}"
        served.lines.append((time.monotonic(), f"a request that excludes {_EXCLUDED:,} items: {told}"))
        yield


@contextmanager
def _killed_without_room(served: Rig) -> Iterator[None]:
    """Its new stub needs a region, and finds no room."""
    with full(SHARED_MEMORY):
        served.kill_stub(ORCHESTRATOR)
        yield


@contextmanager
def _full_log(served: Rig) -> Iterator[None]:
    """And as many updates as need room: a log reuses what it has beside it, and would not notice for a while. They are
    deletes of items that are not there, so that nothing else changes."""
    with full(served.repository / ".items"):
        with ItemClient(served.server.urls.grpc, timeout=10.0, retries=0) as client:
            results = client.delete(range(_UNKNOWN, _UNKNOWN + _DELETES))
        told = {from_here(message) for _, message in results.reasons("failed")}
        served.lines.append((
            time.monotonic(),
            f"{_DELETES:,} more updates: {results.count('applied'):,} applied, {results.count('failed'):,} failed: "
            f"{'; '.join(sorted(told)) or 'none'}",
        ))  # fmt: skip
        yield


def _small_log(repository: Path) -> None:
    folder = repository / ".items"
    folder.mkdir(exist_ok=True)
    mount_small(folder, LOG_MIB)
