"""The report of `hsnn bench endurance`, made of the files that the run appends to, whether it ended or was cut off."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from hsnn_core.errors import DataError
from hsnn_core.files import write_bytes

from .endurance import Incident, paths
from .plots import EBR, FLAT, PRUNED, plt, save

SETTLED = 1 / 6  # of the time, which does not count for growth: caches, pools and the items that change fill
BLOCKS = 10  # means of so many parts of the rest are compared: single samples depend on each other
BIG = 0.02  # of the mean, over the time that counts: a growth that is less is none to act on
AFTER = 0.25  # minutes after a kill that belong to it
_RESIDENT = ("resident_mib", "resident memory (PSS), MiB")
_SHARED = ("shared_mib", "/dev/shm of living stubs, MiB")
_WATCHED = (
    _RESIDENT,
    ("own_mib", "the same without what killed stubs left"),
    _SHARED,
    ("p99_ms", "p99, ms"),
)


@dataclass(frozen=True)
class Trend:
    """A straight line through the means of `BLOCKS`: ``slope`` per hour with the half-width of its 95% interval,
    ``mean``, the most; ``grows``: the interval is above 0 and the line rises by more than `BIG`."""

    slope: float
    uncertainty: float
    mean: float
    most: float
    grows: bool

    @classmethod
    def of(cls, minutes: np.ndarray, values: np.ndarray) -> Trend | None:
        """None for too little to say: `BLOCKS` need two samples each."""
        there = np.isfinite(values)
        at, of = minutes[there], values[there]
        keep = at >= SETTLED * minutes[-1]
        at, of = at[keep], of[keep]
        if len(at) < 2 * BLOCKS:
            return None
        parts = np.array_split(np.arange(len(at)), BLOCKS)
        x, y = (np.array([values[part].mean() for part in parts]) for values in (at / 60, of))
        line = stats.linregress(x, y)
        width = float(stats.t.ppf(0.975, BLOCKS - 2) * line.stderr)
        rise = line.slope * (x[-1] - x[0])
        grows = bool(line.slope - width > 0 and rise > BIG * y.mean())
        return cls(float(line.slope), width, float(y.mean()), float(of.max()), grows)


def write_report(stem: Path) -> Path:
    """Read the files of a run and write stem.md and stem.png; returns the page. DataError when there are none."""
    samples_path, incidents_path, facts_path, page, plot = paths(stem)
    if not facts_path.exists():
        raise DataError(f"{facts_path}: no such file, so no endurance run was begun there; run it first")
    facts = json.loads(facts_path.read_text())
    with samples_path.open(newline="") as file:
        columns, *rows = csv.reader(file)
    if len(rows) < 2:
        raise DataError(f"{samples_path}: {len(rows)} samples, expected at least 2; run it for longer")
    samples = dict(zip(columns, np.array(rows, np.float64).T))
    samples["own_mib"] = samples["resident_mib"] - samples["left_mib"]
    with incidents_path.open(newline="") as file:
        incidents = [
            Incident(float(row["minutes"]), row["kind"], row["what"]) for row in csv.DictReader(file)
        ]
    found = summary(samples, incidents)
    write_bytes(page, render(facts, samples, incidents, found, plot.name).encode())
    _plot(facts, samples, incidents, plot)
    return page


def summary(samples: Mapping[str, np.ndarray], incidents: Sequence[Incident]) -> dict[str, Any]:
    """Totals, trends, and what failed near a kill and otherwise."""
    kills = [incident.minutes for incident in incidents if incident.kind == "killed"]
    failed = [incident for incident in incidents if incident.kind == "failed call"]
    near = [any(0 <= call.minutes - kill <= AFTER for kill in kills) for call in failed]
    return {
        "totals": {
            name: int(samples[name].sum())
            for name in ("answered", "refused", "failed", "outlived", "updates", "updates_failed")
        },
        "kills": len(kills),
        "rollouts": sum(incident.kind == "rollout" for incident in incidents),
        "rollouts_failed": sum(i.kind == "rollout" and i.what.startswith("failed") for i in incidents),
        "failed_after_kills": sum(near),
        "failed_otherwise": len(near) - sum(near),
        "by_status": dict(Counter(call.what.partition(" after ")[0] for call in failed).most_common()),
        "trends": {name: Trend.of(samples["minutes"], samples[name]) for name, _ in _WATCHED},
    }


def render(
    facts: Mapping[str, Any],
    samples: Mapping[str, np.ndarray],
    incidents: Sequence[Incident],
    found: Mapping[str, Any],
    plot: str,
) -> str:
    """The Markdown page."""
    totals, ran = found["totals"], float(samples["minutes"][-1])
    sent = totals["answered"] + totals["refused"] + totals["failed"]
    cut = f" **It was cut off after {ran:.1f}.**" if ran < facts["minutes"] - 0.5 else ""
    lines = [
        f"# Endurance: {facts['recipe']}, V = {facts['items']:,}, K = {facts['k']:,}, {facts['mode']}",
        "",
        f"`{facts['command']}`",
        "",
        f"{facts['minutes']:g} minutes{cut} of Poisson arrivals at {facts['load']:g} of a closed-loop throughput of "
        f"{facts['capacity']:.1f} requests/s (real clients, each call allowed {1000 * facts['timeout']:.0f} ms), "
        f"{facts['updates']:g} item updates/s, a rollout every "
        f"{facts['rollout_every']:g} and a killed stub every {facts['kill_every']:g} minutes, under the supervisor of "
        f"`hsnn serve`. Load, rollouts and server share the machine. Commit {facts['commit']}; {facts['machine']}; "
        f"{facts['date']}.{' **The data are simulated.**' if facts['simulated'] else ''}",
        "",
        "| figure | value |",
        "|---|---|",
        f"| calls; answered, refused, failed | {sent:,}; {totals['answered']:,}, {totals['refused']:,}, "
        f"{totals['failed']:,} |",
        f"| failed within {60 * AFTER:.0f} s of a kill; otherwise | {found['failed_after_kills']:,}; "
        f"{found['failed_otherwise']:,} |",
        f"| calls that outlived their timeout by more than 250 ms | {totals['outlived']:,} |",
        f"| kills; rollouts (failed) | {found['kills']}; {found['rollouts']} ({found['rollouts_failed']}) |",
        f"| item updates applied (failed) | {totals['updates']:,} ({totals['updates_failed']:,}) |",
        "",
        "| over time | mean | most | slope per hour, 95% interval | grows |",
        "|---|---|---|---|---|",
    ]
    for name, label in _WATCHED:
        trend = found["trends"][name]
        if trend is None:
            lines.append(f"| {label} | | {np.nanmax(samples[name]):.1f} | too short to say | |")
            continue
        lines.append(
            f"| {label} | {trend.mean:.1f} | {trend.most:.1f} | {trend.slope:+.2f} ± {trend.uncertainty:.2f} | "
            f"{'**yes**' if trend.grows else 'no'} |"
        )
    lines += [
        "",
        f"The first {SETTLED:.0%} of the time does not count. The line goes through the means of {BLOCKS} equal parts "
        f"of the rest; something grows when the interval is above 0 and the line rises by more than {BIG:.0%} of it.",
        f"What killed stubs left: {samples['left_mib'][-1]:.0f} MiB in /dev/shm at the end (at most "
        f"{samples['left_mib'].max():.0f}), 4 of each that died at work. Triton 2.51 keeps them mapped, so they are "
        "part of its resident memory, and gives them back when it ends; the supervisor starts it again after eight.",
        "",
        "| failed calls, as the client raised them | calls |",
        "|---|---|",
        *(f"| {status} | {count:,} |" for status, count in found["by_status"].items()),
        "",
        "| minute | what happened |",
        "|---|---|",
        *(
            f"| {incident.minutes:.2f} | {incident.kind}: {incident.what} |"
            for incident in incidents
            if incident.kind != "failed call"
        ),
        "",
        f"![errors, latency and memory over time]({plot})",
    ]
    return "\n".join(lines) + "\n"


def _plot(
    facts: Mapping[str, Any],
    samples: Mapping[str, np.ndarray],
    incidents: Sequence[Incident],
    path: Path,
) -> None:
    minutes = samples["minutes"]
    figure, axes = plt.subplots(4, 1, figsize=(9, 9), sharex=True)
    axes[0].plot(minutes, samples["failed"], color=PRUNED, label="failed")
    axes[0].plot(minutes, samples["refused"], color=EBR, label="refused")
    axes[0].set(ylabel="calls in an interval")
    axes[1].plot(minutes, samples["p99_ms"], color=PRUNED, label="p99")
    axes[1].plot(minutes, samples["p50_ms"], color=FLAT, label="median")
    axes[1].set(ylabel="ms, answered calls", yscale="log")
    for axis, (name, label) in zip(axes[2:], (_RESIDENT, _SHARED)):
        axis.plot(minutes, samples[name], color=FLAT)
        if name == "shared_mib":
            axis.plot(minutes, samples["left_mib"], color=PRUNED, label="left by killed stubs")
            axis.legend(fontsize=8, loc="upper left")
        axis.set(ylabel=label, ylim=(0, 1.2 * max(float(samples[name].max()), 1e-3)))
    for kind, colour, style in (("killed", PRUNED, "-"), ("rollout", "grey", ":")):
        for number, at in enumerate(incident.minutes for incident in incidents if incident.kind == kind):
            for axis in axes:
                axis.axvline(at, color=colour, linestyle=style, linewidth=0.8, alpha=0.7,
                             label=kind if axis is axes[2] and number == 0 else None)  # fmt: skip
    for axis in axes:
        axis.grid(alpha=0.3)
    for axis in axes[:3]:
        axis.legend(fontsize=8, loc="upper left")
    axes[-1].set(xlabel="minutes")
    axes[0].set_title(f"{facts['recipe']}, {facts['mode']}, {facts['rate']:.1f} requests/s")
    save(figure, path)
