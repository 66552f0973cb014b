"""The report of `hsnn bench capacity`: JSON, CSV of all levels, a page, a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hsnn_core.files import write_bytes
from hsnn_train.checkpoint import write_json

from .plots import FLAT, PRUNED, plt, save

COLUMNS = ("kind", "load", "requests", "throughput", "p50", "p90", "p95", "p99", "delayed", "failure")


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write capacity-<recipe>-<items>-<mode>.json, .csv, .md and .png into ``folder`` (made when missing); returns
    their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = _stem(report)
    paths = [folder / f"{stem}.{ending}" for ending in ("json", "csv", "md", "png")]
    write_json(paths[0], dict(report))
    write_bytes(paths[1], levels_csv(report).encode())
    write_bytes(paths[2], render(report).encode())
    plot(report, paths[3])
    return paths


def _stem(report: Mapping[str, Any]) -> str:
    return f"capacity-{report['recipe']}-{report['items']}-{report['mode']}"


def levels_csv(report: Mapping[str, Any]) -> str:
    """One line per level in the order of measuring; milliseconds, shares, answers a second."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    for level in report["levels"]:
        table.writerow(level | level["latency_ms"])
    return text.getvalue()


def render(report: Mapping[str, Any]) -> str:
    """The Markdown page."""
    limit = f"p{report['percentile']} ≤ {report['latency_ms']:g} ms"
    within, saturation = report["closed"]["within"], report["closed"]["saturation"]
    lines = [
        f"# Capacity: {report['recipe']}, V = {report['items']:,}, K = {report['k']:,}, {report['mode']}",
        "",
        f"`{report['command']}`",
        "",
        f"Highest load with {limit}, widths {report['widths']}; {report['requests']:,} distinct real requests. Commit "
        f"{report['commit']}; {report['machine']} (client and server share it when the server is this command's own); "
        f"{report['date']}.{' **The data are simulated.**' if report['simulated'] else ''}",
        "",
        "| figure | value |",
        "|---|---|",
        f"| closed loop, {limit} | "
        + (
            "no level"
            if within is None
            else f"{within['throughput']:.1f} requests/s with {within['load']:g} under way"
        )
        + " |",
        f"| closed loop, saturation | {saturation:.1f} requests/s |",
        f"| open loop (Poisson), {limit} | "
        + ("no rate" if report["capacity"] is None else f"{report['capacity']:.1f} requests/s")
        + " |",
    ]
    if (steady := report["steady"]) is not None:
        lines += [
            f"| p99 / p50 at 70% of that | {steady['p99_over_p50']:.2f} ({steady['p99_ms']:.2f} / "
            f"{steady['p50_ms']:.2f} ms; {', '.join(f'{ratio:.2f}' for ratio in steady['ratios'])}) |",
        ]
    if (over := report["overload"]) is not None:
        lines += [
            f"| at three times that, deadline {over['deadline_ms']:g} ms: answered in time / capacity | "
            f"{over['answered_in_time_over_capacity']:.3f} |",
            f"| others refused within their deadline | {100 * over['others_refused_in_time']:.2f}% |",
            f"| sent; answered, refused, expired, failed | {over['sent']:,}; {over['answered']:,}, "
            f"{over['refused']:,}, {over['expired']:,}, {over['failed']:,} |",
            f"| by the server's own count | {', '.join(f'{k} {v:,}' for k, v in over['outcomes'].items()) or '–'} |",
            f"| schedule slip of the generator, p50 / p99 | {over['slip_ms']['p50']:.2f} / "
            f"{over['slip_ms']['p99']:.2f} ms |",
        ]
    lines += [
        "",
        "Levels by perf_analyzer (every one in the CSV); the overload by `clients.load`, since perf_analyzer ends at "
        "the first refusal. Slip is how much later than due a request was sent; perf_analyzer reports it as the share "
        "of requests sent late. [How to read this](../serving.md).",
        "",
        f"![latency against load]({_stem(report)}.png)",
    ]
    return "\n".join(lines) + "\n"


def plot(report: Mapping[str, Any], path: Path) -> Path:
    """p50 and the percentile against requests a second, closed and open loop; the limit as a line."""
    figure, axis = plt.subplots(figsize=(8, 5))
    name = f"p{report['percentile']}"
    for kind, colour, mark in (("closed", FLAT, "o"), ("open", PRUNED, "s")):
        levels = [level for level in report["levels"] if level["kind"] == kind and level["failure"] is None]
        levels.sort(key=lambda level: level["load"])
        x = [level["throughput"] if kind == "closed" else level["load"] for level in levels]
        for percentile, line in ((name, "-"), ("p50", ":")):
            y = [level["latency_ms"][percentile] for level in levels]
            loop = "closed loop" if kind == "closed" else "Poisson arrivals"
            axis.plot(x, y, line, color=colour, marker=mark, markersize=4, label=f"{loop}, {percentile}")
    axis.axhline(report["latency_ms"], color="black", linewidth=0.8)
    if report["capacity"] is not None:
        axis.axvline(report["capacity"], color=PRUNED, linewidth=0.8, linestyle="--")
    axis.set(xlabel="requests per second", ylabel="milliseconds at the client (log scale)", yscale="log",
             title=f"{report['recipe']}, V = {report['items']:,}, K = {report['k']:,}, {report['mode']}")  # fmt: skip
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    return save(figure, path)
