"""Does a server grow? Load at a share of its capacity for a long time, with memory and shared memory over time."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np

from clients.load import each_user, poisson_load, serialise
from export.rollout import promote
from hsnn_cli.commands_training import load_data
from hsnn_cli.provenance import commit, machine
from hsnn_core.files import write_bytes
from hsnn_server.triton import TritonServer
from hsnn_server.usage import cpu_seconds, resident_bytes, shared_bytes
from hsnn_train.checkpoint import load_run, write_json

from .capacity import connect, real_requests, summary, warm_up
from .plots import FLAT, PRUNED, plt, save

SAMPLES = 360  # of a soak, at most one a second
SETTLED = 0.1  # of the time, which does not count for growth: caches and pools fill
MIB = 1 << 20


class Sampler:
    """Samples what a server uses until it is closed: ``rows`` of (minutes, MiB resident, MiB in /dev/shm, CPU
    seconds)."""

    def __init__(self, server: TritonServer, interval: float) -> None:
        self._server, self._interval = server, interval
        self.rows: list[tuple[float, float, float, float]] = []
        self._closing = Event()
        self._thread = Thread(target=self._sample, name="hsnn-soak", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def _sample(self) -> None:
        pids, prefix, began = self._server.pids, self._server.region_prefix, time.monotonic()
        while not self._closing.is_set():
            minutes = (time.monotonic() - began) / 60
            memory, shared = resident_bytes(pids) / MIB, shared_bytes(prefix) / MIB
            self.rows.append((minutes, memory, shared, cpu_seconds(pids)))
            self._closing.wait(self._interval)


def growth(minutes: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """How a value moved after the first `SETTLED` of the time: its mean in the first and the last tenth of what is
    left, the difference of the two, the slope of a straight line per hour, and the most it was."""
    settled = minutes >= SETTLED * minutes[-1]
    at, of = minutes[settled], values[settled]
    tenth = max(1, len(of) // 10)
    first, last = float(of[:tenth].mean()), float(of[-tenth:].mean())
    slope = float(np.polyfit(at, of, 1)[0]) * 60 if len(of) > 1 else 0.0
    return {
        "first": first,
        "last": last,
        "growth": last - first,
        "per_hour": slope,
        "most": float(values.max()),
    }


def run_soak(
    run_dir: Path,
    repository: Path,
    *,
    capacity: float,
    load: float,
    minutes: float,
    k: int,
    latency_ms: float,
    requests: int,
    command: str,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Serve the newest snapshot of ``repository`` and send Poisson arrivals at ``load`` times ``capacity`` (requests a
    second) for so many minutes, each allowed ``latency_ms``; returns the report (see `write_report`)."""
    made_at = commit()  # not what the checkout has become when all is measured
    run = load_run(run_dir)
    dataset = load_data(run.recipe)
    wire = real_requests(dataset, requests)
    k = min(k, run.recipe.search.max_k, len(run.item_ids))
    deadline = latency_ms / 1000
    with TritonServer(repository) as server:
        promote(repository, server.admin)
        served = connect(run, server.urls.grpc, server.urls.metrics)
        warm_up(served, wire, k)
        messages = serialise(served.model, each_user(wire), k=k, deadline=deadline)
        say(f"{load * capacity:.1f} requests a second for {minutes:g} minutes")
        with Sampler(server, max(1.0, 60 * minutes / SAMPLES)) as sampler:
            fates = poisson_load(server.urls.grpc, messages, load * capacity, 60 * minutes, deadline)
    table = np.array(sampler.rows)
    return {
        "recipe": run.recipe.name, "simulated": dataset.simulated, "command": command, "commit": made_at,
        "machine": machine(), "date": date.today().isoformat(), "items": len(run.item_ids), "k": k,
        "mode": served.model.mode, "capacity": capacity, "load": load, "minutes": minutes,
        "requests": summary(fates, capacity) | {f"p{q}_ms": fates.milliseconds(q) for q in (50, 99)},
        "resident_mib": growth(table[:, 0], table[:, 1]), "shared_mib": growth(table[:, 0], table[:, 2]),
        "cpu_cores": float((table[-1, 3] - table[0, 3]) / max(1e-9, 60 * (table[-1, 0] - table[0, 0]))),
        "samples": [[round(float(value), 4) for value in row] for row in table],
    }  # fmt: skip


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write soak-<recipe>-<items>-<mode>.json, .csv, .md and .png into ``folder`` (made when missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"soak-{report['recipe']}-{report['items']}-{report['mode']}"
    paths = [folder / f"{stem}.{ending}" for ending in ("json", "csv", "md", "png")]
    write_json(paths[0], {name: value for name, value in report.items() if name != "samples"})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["minutes", "resident_mib", "shared_mib", "cpu_seconds"])
    table.writerows(report["samples"])
    write_bytes(paths[1], text.getvalue().encode())
    write_bytes(paths[2], (render(report) + f"\n![memory over time]({stem}.png)\n").encode())
    _plot(report, paths[3])
    return paths


def render(report: Mapping[str, Any]) -> str:
    """The Markdown page, without its plot."""
    asked = report["requests"]
    lines = [
        f"# Soak: {report['recipe']}, V = {report['items']:,}, K = {report['k']:,}, {report['mode']}",
        "",
        f"`{report['command']}`",
        "",
        f"{report['minutes']:g} minutes of Poisson arrivals at {report['load']:g} of {report['capacity']:.1f} "
        f"requests/s. Commit {report['commit']}; {report['machine']}; {report['date']}."
        f"{' **The data are simulated.**' if report['simulated'] else ''}",
        "",
        "| all processes of the server | first | last | growth | per hour, fitted | most |",
        "|---|---|---|---|---|---|",
    ]
    for name, label in (
        ("resident_mib", "resident memory (PSS), MiB"),
        ("shared_mib", "/dev/shm in use, MiB"),
    ):
        row = report[name]
        values = (row[key] for key in ("first", "last", "growth", "per_hour", "most"))
        lines.append(f"| {label} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    lines += [
        "",
        f"First and last are means over a tenth of the time each, after the first {SETTLED:.0%} of it. Sent "
        f"{asked['sent']:,}; answered {asked['answered']:,}, refused {asked['refused']:,}, expired "
        f"{asked['expired']:,}, failed {asked['failed']:,}; p50 / p99 of the answers, from their sending, "
        f"{asked['p50_ms']:.2f} / {asked['p99_ms']:.2f} ms (sent {asked['slip_ms']['p99']:.2f} ms late at the 99th "
        f"percentile); the server used {report['cpu_cores']:.2f} cores.",
    ]
    return "\n".join(lines) + "\n"


def _plot(report: Mapping[str, Any], path: Path) -> None:
    table = np.array(report["samples"])
    figure, axes = plt.subplots(2, 1, figsize=(8, 6), sharex=True)
    for axis, column, colour, label in (
        (axes[0], 1, FLAT, "resident memory (PSS), MiB"),
        (axes[1], 2, PRUNED, "/dev/shm in use, MiB"),
    ):
        axis.plot(table[:, 0], table[:, column], color=colour)
        axis.set(ylabel=label, ylim=(0, 1.2 * max(float(table[:, column].max()), 1e-3)))
        axis.grid(alpha=0.3)
    axes[1].set(xlabel="minutes")
    axes[0].set_title(
        f"{report['recipe']}, {report['mode']}, {report['load']:g} of {report['capacity']:.1f} requests/s"
    )
    save(figure, path)
