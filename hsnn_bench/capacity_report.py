"""The report of `hsnn bench capacity`: JSON, CSV of all levels, a page, a plot."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hsnn_core.files import write_bytes
from hsnn_train.checkpoint import write_json

from .plots import FLAT, PRUNED, plt, save

COLUMNS = (
    "kind", "load", "seconds", "requests", "throughput", "p50", "p90", "p95", "p99", "delayed", "disturbed", "failure",
)  # fmt: skip


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
    closed, capacity, steady = report["closed"], report["capacity"], report["steady"]
    again = sum(level["disturbed"] for level in report["levels"])
    lines = [
        f"# Capacity: {report['recipe']}, V = {report['items']:,}, K = {report['k']:,}, {report['mode']}",
        "",
        f"`{report['command']}`",
        "",
        f"Highest load with {limit}, widths {report['widths']}; {report['requests']:,} distinct real requests. Commit "
        f"{report['commit']}; {report['machine']} (client and server share it when the server is this command's own); "
        f"{report['date']}.{' **The data are simulated.**' if report['simulated'] else ''}",
        "",
        "| figure | value | requests |",
        "|---|---|---|",
        f"| closed loop, {limit} | "
        + (
            f"{closed['throughput']:.1f} requests/s with {closed['load']:g} under way"
            if closed["load"]
            else "no number under way"
        )
        + f" | {closed['requests']:,} |",
        f"| closed loop, saturation | {closed['saturation']:.1f} requests/s | |",
        *_beside_bare(report),
        f"| open loop (Poisson), {limit}: the capacity | "
        + ("no rate" if capacity is None else f"{capacity:.1f} requests/s")
        + f" | {report['capacity_requests']:,} |",
    ]
    if steady is not None:
        ratios = ", ".join(map(_ratio, steady["ratios"]))
        lines.append(
            f"| p99 / p50 at 70% of the capacity | {_ratio(steady['p99_over_p50'])} ({steady['p99_ms']:.2f} / "
            f"{steady['p50_ms']:.2f} ms; {ratios}) | {steady['requests']:,} |"
        )
    if report["overload"]:
        lines += _overload(report)
    lines += [
        "",
        "Levels by perf_analyzer (every one in the CSV), each "
        f"{report['seconds']:g} s or longer, for about {report['arrivals']:,} requests; one holds when two of three "
        f"measurements do. {again} of {len(report['levels'])} were measured again, since the machine was busy. The "
        "overload by `clients.load`, since perf_analyzer ends at the first refusal. Slip is how much later than due a "
        "request was sent; perf_analyzer reports the share of requests sent late, and a level with more than 1% does "
        "not hold. [How to read this](../serving.md).",
        "",
        f"![latency against load]({_stem(report)}.png)",
    ]
    return "\n".join(lines) + "\n"


def _beside_bare(report: Mapping[str, Any]) -> list[str]:
    """The saturation against loops without a server, where they were measured."""
    bare = report["bare"]
    if bare is None:
        return []
    alone, at_once, saturation = bare["alone"], bare["at_once"], report["closed"]["saturation"]
    loops = bare["loops"]
    return [
        f"| one bare loop without a server | {alone['requests_per_second']:.1f} requests/s, "
        f"{alone['cpu_ms']:.2f} ms of CPU each | |",
        f"| {loops} bare loops at once | {at_once['requests_per_second']:.1f} requests/s, "
        f"{at_once['cpu_ms']:.2f} ms of CPU each | |",
        "| saturation × the one loop's CPU per request / cores (target ≥ 0.8) | "
        f"{saturation * alone['cpu_ms'] / 1000 / loops:.2f}; of the loops at once themselves "
        f"{at_once['requests_per_second'] * alone['cpu_ms'] / 1000 / loops:.2f} | |",
        f"| saturation / {loops} bare loops at once | {saturation / at_once['requests_per_second']:.2f} | |",
    ]


def _ratio(value: float) -> str:
    return "refused" if math.isinf(value) else f"{value:.2f}"


def _overload(report: Mapping[str, Any]) -> list[str]:
    """Three times the capacity, and three times the closed loop's saturation where that is more, side by side."""
    capacity, overloads = report["capacity"], report["overload"]
    names = ["capacity" if over["base"] == capacity else "saturation" for over in overloads]
    middle = [over["median"] for over in overloads]
    rows: list[tuple[str, str, list[str]]] = [
        ("arrivals/s; requests of a run", "", [f"{m['rate']:.1f}; {m['sent']:,.0f}" for m in middle]),
        (
            "answered in time / capacity",
            "≥ 0.9",
            [f"{m['answered_in_time_over_capacity']:.3f}" for m in middle],
        ),
        (
            "answered in time / what it is three times of",
            "",
            [
                f"{m['answered_in_time_over_capacity'] * capacity / o['base']:.3f}"
                for m, o in zip(middle, overloads)
            ],
        ),
        ("answered in time / sent", "", [f"{m['answered_in_time_over_sent']:.3f}" for m in middle]),
        (
            "every other request refused within its deadline",
            "100%",
            [f"{100 * m['others_refused_in_time']:.2f}%" for m in middle],
        ),
        (
            "– refused in time / refused",
            "",
            [f"{100 * m['refused_in_time_over_refused']:.2f}% of {m['refused']:,.0f}" for m in middle],
        ),
        (
            "– answered late; expired; failed",
            "",
            [f"{m['answered_late']:,.0f}; {m['expired']:,.0f}; {m['failed']:,.0f}" for m in middle],
        ),
        (
            "by the server's own count, all runs",
            "",
            [", ".join(f"{k} {v:,}" for k, v in over["outcomes"].items()) or "–" for over in overloads],
        ),
        (
            "slip of the generator, p50 / p99",
            "",
            [f"{m['slip_ms']['p50']:.2f} / {m['slip_ms']['p99']:.2f} ms" for m in middle],
        ),
    ]
    return [
        "",
        f"Overload, each request told its deadline of {middle[0]['deadline_ms']:g} ms; medians of "
        f"{len(overloads[0]['runs'])} runs:",
        "",
        f"| figure | target | {' | '.join(f'3 × {name}' for name in names)} |",
        "|---|---|" + "---|" * len(names),
        *(f"| {figure} | {target} | {' | '.join(values)} |" for figure, target, values in rows),
    ]


def plot(report: Mapping[str, Any], path: Path) -> Path:
    """p50 and the percentile against requests a second, closed and open loop; the limit as a line."""
    figure, axis = plt.subplots(figsize=(8, 5))
    name = f"p{report['percentile']}"
    for kind, colour, mark in (("closed", FLAT, "o"), ("open", PRUNED, "s")):
        levels = [
            level
            for level in report["levels"]
            if level["kind"] == kind and level["failure"] is None and not level["disturbed"]
        ]
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
