"""How soon a changed item is found, and what changing items costs the searches: over a large corpus, through Triton.

Freshness: an item that a user's search returns is copied under a new id, and the copy must come back beside it. The
clock runs from the acknowledgement of the upsert to the arrival of the first answer that has the copy, so it holds the
search's own time. Every second time the search is asked to know the update (`after`), else it is repeated until it
does. Other updates go on meanwhile.

Updates are of new ads, of known ones that change, and deletes, in the shares of `MIX`.

Sustained: one client searches in a closed loop, for a time without updates, then with them, and so on in turns.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
from tqdm import tqdm

from clients.encode import WireUsers
from clients.item_rows import ItemRows
from clients.items import ItemClient
from clients.retrieval import RetrievalClient
from export.exported import open_export
from export.pbtxt import ServingOptions
from export.publish import publish
from export.rollout import promote
from hsnn_cli.commands_training import load_data
from hsnn_cli.provenance import commit, machine
from hsnn_cli.tables import table
from hsnn_core.errors import ServerError
from hsnn_core.files import write_bytes
from hsnn_core.item_updates import APPLIED
from hsnn_core.schema import Schema
from hsnn_server.triton import TritonServer
from hsnn_server.usage import resident_bytes
from hsnn_train.checkpoint import load_run, write_json
from hsnn_train.data.synthetic import WorldConfig, grown_ads, world_of

from .capacity import real_requests
from .corpora import PART, world_config
from .orchestrator import Spread
from .plots import freshness_and_latency
from .scale import build, export_over

FIRST_NEW = 1 << 40  # ids of added items begin here: no ad of the world has them
WORKERS = 2
MIX = (0.6, 0.3, 0.1)
GIVEN_UP = 5.0  # seconds after which a copy counts as not found
MIB = 1 << 20


class Updates:
    """An endless stream of updates of ads of a simulated world, and copies of ads that are there."""

    def __init__(self, schema: Schema, config: WorldConfig) -> None:
        self._rows = ItemRows(schema)
        self._key = schema.item_key
        self._config, self._world = config, world_of(config)
        self._ids = itertools.count(FIRST_NEW)
        first = grown_ads(self._world, config, 0, PART)
        self._known = {row[self._key]: row for row in first.slice(0, PART).to_pylist()}
        self._stream = self._mixed()

    def take(self, count: int) -> list[dict[str, Any]]:
        """The next ``count`` updates."""
        return list(itertools.islice(self._stream, count))

    def knows(self, item: int) -> bool:
        """Whether `copy_of` can copy it."""
        return item in self._known

    def copy_of(self, item: int) -> dict[str, Any]:
        """An upsert of a new item with the features of one that is there, open to all."""
        update = self._rows.update(self._known[item] | {self._key: next(self._ids)})
        return {name: value for name, value in update.items() if name != "eligibility"}

    def _mixed(self) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(1)
        known = list(self._known)
        rng.shuffle(known)
        added: list[int] = []
        for part in itertools.count(1000):
            for row in grown_ads(self._world, self._config, part, 1 << 14).to_pylist():
                kind = rng.choice(len(MIX), p=MIX)
                if kind == 0 or len(added) < 10 or len(known) < PART // 2:
                    added.append(next(self._ids))
                    yield self._rows.update(row | {self._key: added[-1]})
                elif kind == 1:
                    item = known.pop()
                    del self._known[item]  # what is copied must be what it was
                    yield self._rows.update(row | {self._key: item})
                else:
                    yield {"id": added.pop(int(rng.integers(len(added)))), "deleted": True}


class UpdateLoad:
    """Sends ``rate`` upserts a second in calls of ``batch``, in a thread of its own, while it is entered."""

    def __init__(self, url: str, updates: Updates, rate: float, batch: int, seconds: float) -> None:
        self._client = ItemClient(url, timeout=30.0, batch=batch)
        self._batch, self._period = batch, batch / rate
        # Made before: making ads is no part of what is measured.
        calls = int(seconds / self._period) + 1
        self._calls = [updates.take(batch) for _ in range(calls)]
        self._closing = Event()
        self._thread = Thread(target=self._send, name="hsnn-updates", daemon=True)
        self.applied = 0
        self.failed = 0
        self.late = 0  # calls that began after their time
        self.seconds = 0.0

    def __enter__(self) -> UpdateLoad:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        self._client.close()

    def _send(self) -> None:
        began = time.perf_counter()
        for number, call in enumerate(self._calls):
            wait = began + number * self._period - time.perf_counter()
            self.late += wait < -self._period
            if self._closing.wait(max(0.0, wait)):
                break
            status = self._client.upsert(call).status
            self.applied += status.count(APPLIED)
            self.failed += len(status) - status.count(APPLIED)
        self.seconds = time.perf_counter() - began


def run_live(
    run_dir: Path,
    items: int,
    widths: Sequence[int],
    work: Path,
    *,
    k: int,
    probes: int,
    rate: float,
    turns: int,
    turn_seconds: float,
    requests: int,
    command: str,
    say: Any = print,
) -> dict[str, Any]:
    """Serve the corpus of ``items`` ads, measure freshness with ``probes`` copies under 100 updates a second, then
    ``turns`` times a turn without and one with ``rate`` updates a second. Returns plain JSON values."""
    made_at = commit()
    run, exported = load_run(run_dir), open_export(run_dir)
    dataset = load_data(run.recipe)
    build(run, exported, items, work)
    repository = work / f"live-repository-{items}"
    if not repository.exists():
        options = ServingOptions(mode="in_process", workers=WORKERS, widths=tuple(widths), k=k)
        publish(export_over(exported, items, work), repository, options=options)
    updates = Updates(run.schema, world_config(run.recipe.data))
    users = real_requests(dataset, requests)
    with TritonServer(repository) as server:
        say("loading the snapshot")
        promote(repository, server.admin)
        with RetrievalClient(server.urls.grpc, timeout=30.0) as client:
            asked = _Asked(client, users, k)
            for number in range(10):
                asked(number)
            freshness = _freshness(server.urls.grpc, asked, updates, probes)
            sustained = _sustained(server, asked, updates, rate, turns, turn_seconds)
    return {
        "recipe": run.recipe.name, "simulated": dataset.simulated, "command": command, "commit": made_at,
        "machine": machine(), "date": date.today().isoformat(), "items": items, "k": k, "widths": list(widths),
        "workers": WORKERS, "freshness": freshness, "sustained": sustained,
    }  # fmt: skip


class _Asked:
    """Searches of real users by their number; they repeat."""

    def __init__(self, client: RetrievalClient, users: Mapping[str, np.ndarray], k: int) -> None:
        self._client, self._users, self._k = client, users, k
        self._count = len(next(iter(users.values())))

    def __call__(self, number: int, after: int | None = None) -> list[int]:
        row = number % self._count
        user = WireUsers({name: values[row : row + 1] for name, values in self._users.items()})
        return [hit.item_id for hit in self._client.retrieve(user, k=self._k, after=after)[0]]


def _freshness(url: str, asked: _Asked, updates: Updates, probes: int) -> dict[str, Any]:
    """Milliseconds from the acknowledgement to the first answer with the item; and of the upsert itself."""
    found: dict[str, list[float]] = {"asked for": [], "repeated": []}
    upserts, searches = [], []
    lost = skipped = 0
    with (
        ItemClient(url, timeout=30.0) as client,
        UpdateLoad(url, updates, rate=100.0, batch=1, seconds=probes * 0.5 + 60) as load,
    ):
        for number in tqdm(range(probes), desc="freshness", unit="item"):
            began = time.perf_counter()
            answer = asked(number)
            searches.append(1000 * (time.perf_counter() - began))
            # One in the first half of the answer: its copy has the same score and must come back beside it.
            original = next((item for item in answer[: len(answer) // 2] if updates.knows(item)), None)
            if original is None:
                skipped += 1
                continue
            copy = updates.copy_of(original)
            began = time.perf_counter()
            results = client.upsert([copy])
            if results.status != [APPLIED]:
                raise ServerError(f"the upsert of the copy of item {original} was not applied")
            acknowledged = time.perf_counter()
            upserts.append(1000 * (acknowledged - began))
            way, after = ("asked for", results.position) if number % 2 else ("repeated", None)
            while copy["id"] not in asked(number, after):
                if time.perf_counter() - acknowledged > GIVEN_UP:
                    lost += 1
                    break
            found[way].append(1000 * (time.perf_counter() - acknowledged))
            client.delete([copy["id"]])  # many copies of one item would fill the answers of its users
    return {
        "probes": sum(map(len, found.values())), "lost": lost, "skipped": skipped,
        "updates_per_second": load.applied / load.seconds, "updates_refused": load.failed,
        "ways": {way: {
            "ms": [round(value, 2) for value in ms], "p50_ms": float(np.median(ms)),
            "p99_ms": float(np.percentile(ms, 99)), "most_ms": max(ms),
        } for way, ms in found.items()},
        "upsert_p50_ms": float(np.median(upserts)), "upsert_p99_ms": float(np.percentile(upserts, 99)),
        "search_p50_ms": float(np.median(searches)),
    }  # fmt: skip


def _sustained(
    server: TritonServer, asked: _Asked, updates: Updates, rate: float, turns: int, seconds: float
) -> dict[str, Any]:
    """Latencies in turns without and with updates, milliseconds."""
    idle: list[list[float]] = []
    loaded: list[list[float]] = []
    rates, refused, late = [], 0, 0
    before = resident_bytes(server.pids) / MIB
    for turn in tqdm(range(turns), desc="sustained", unit="turn"):
        idle.append(_closed_loop(asked, seconds, turn))
        load = UpdateLoad(server.urls.grpc, updates, rate, batch=max(1, int(rate / 20)), seconds=seconds + 5)
        with load:
            loaded.append(_closed_loop(asked, seconds, turn))
        rates.append(load.applied / load.seconds)
        refused += load.failed
        late += load.late
    return {
        "wanted_per_second": rate, "per_second": float(np.mean(rates)), "refused": refused, "late_calls": late,
        "updates": float(np.sum(rates) * seconds),
        "without": asdict(Spread.of(list(itertools.chain(*idle)))),
        "with": asdict(Spread.of(list(itertools.chain(*loaded)))),
        "ratio": float(np.median([np.median(b) / np.median(a) for a, b in zip(idle, loaded)])),
        "turn_medians": [[float(np.median(a)), float(np.median(b))] for a, b in zip(idle, loaded)],
        "resident_mib": [before, resident_bytes(server.pids) / MIB],
    }  # fmt: skip


def _closed_loop(asked: _Asked, seconds: float, turn: int) -> list[float]:
    taken, number, until = [], 1000 * turn, time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        asked(number)
        taken.append(1000 * (time.perf_counter() - began))
        number += 1
    return taken


def report(found: dict[str, Any], name: str, results: Path) -> Path:
    """Write live-NAME.json, .md and .png under ``results``; returns the .md."""
    results.mkdir(parents=True, exist_ok=True)
    stem = results / f"live-{name}"
    write_json(stem.with_suffix(".json"), found)
    write_bytes(stem.with_suffix(".md"), (page(found, name) + "\n").encode())
    freshness_and_latency(found, stem.with_suffix(".png"))
    return stem.with_suffix(".md")


def page(found: dict[str, Any], name: str) -> str:
    """The report as Markdown."""
    fresh, steady = found["freshness"], found["sustained"]
    spreads = {which: Spread(**steady[which]) for which in ("without", "with")}
    return "\n".join([
        f"# Items that change under load: {name}, {found['items']:,} items",
        "",
        "Simulated data." if found["simulated"] else "",
        "",
        f"`{found['command']}` at commit {found['commit']}, {found['machine']}, {found['date']}. In process through "
        f"Triton, {found['workers']} workers, K = {found['k']}, widths {', '.join(map(str, found['widths']))}.",
        "",
        "```",
        table(["ms", "median", "99th percentile", "most"], [
            *([f"from the acknowledgement to an answer with the item, {way}", f"{of['p50_ms']:.1f}",
               f"{of['p99_ms']:.1f}", f"{of['most_ms']:.1f}"] for way, of in fresh["ways"].items()),
            ["the upsert until acknowledged", f"{fresh['upsert_p50_ms']:.1f}", f"{fresh['upsert_p99_ms']:.1f}", "–"],
            ["a search alone", f"{fresh['search_p50_ms']:.1f}", "–", "–"],
        ]),
        "```",
        "",
        "Asked for: the search names the log's position that the upsert was acknowledged with (`after`). Repeated: "
        "searches without it, one after the other.",
        "",
        f"{fresh['probes']} copies of items that the user's search returns ({fresh['lost']} not found within "
        f"{GIVEN_UP:g} s, {fresh['skipped']} requests without an item that could be copied), beside "
        f"{fresh['updates_per_second']:.0f} other updates a second.",
        "",
        "```",
        table(["searches, one client", "ms, median (p10 to p90)"], [
            ["without updates", _ms(spreads["without"])],
            [f"with {steady['per_second']:,.0f} updates a second", _ms(spreads["with"])],
            ["ratio of the medians", f"{steady['ratio']:.2f}"],
        ]),
        "```",
        "",
        f"{steady['updates']:,.0f} updates in {len(steady['turn_medians'])} turns, {steady['refused']} refused, "
        f"{steady['late_calls']} calls sent late; the server's memory went from {steady['resident_mib'][0]:,.0f} to "
        f"{steady['resident_mib'][1]:,.0f} MiB.",
        "",
        f"![freshness and latency](live-{name}.png)",
    ])  # fmt: skip


def _ms(spread: Spread) -> str:
    return f"{spread.median:.1f} ({spread.p10:.1f} to {spread.p90:.1f})"
