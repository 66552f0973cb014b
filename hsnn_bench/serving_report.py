"""The report of `hsnn bench serving`: JSON, a page with the table, a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hsnn_core.files import write_bytes
from hsnn_train.checkpoint import write_json

from .plots import EBR, FLAT, PRUNED, plt, save

COLOURS = {"hsnn": PRUNED, "ebr": EBR, "echo": "#888888"}


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write serving-<recipe>-<items>.json, .md and .png into ``folder`` (made when missing); returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = _stem(report)
    paths = [folder / f"{stem}.{ending}" for ending in ("json", "md", "png")]
    write_json(paths[0], dict(report))
    write_bytes(paths[1], render(report).encode())
    plot(report, paths[2])
    return paths


def _stem(report: Mapping[str, Any]) -> str:
    return f"serving-{report['recipe']}-{report['items']}"


def render(report: Mapping[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        f"# What a request costs in Triton: {report['recipe']}, V = {report['items']:,}, K = {report['k']:,}",
        "",
        f"`{report['command']}`",
        "",
        f"One Triton, one client, one request at a time; {report['rounds']} rounds of {report['block']} requests per "
        f"model, models in turns, in an order drawn for each round; {report['requests']:,} distinct test requests. "
        f"Commit {report['commit']}; {report['machine']}; {report['date']}. Idle, the server uses "
        f"{100 * report['idle_cpu_share']:.1f}% of a core.",
        "",
    ]
    if report["simulated"]:
        lines += ["**The data are simulated.** Costs depend on shapes and sizes, not on what was learnt.", ""]
    lines += [
        "| model | CPU ms per request | p50 ms | p99 ms | CPU / EBR-IVF | p50 / EBR-IVF | recall of own top K | "
        "settings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cpu, waited, ratio = row["cpu_ms"], row["latency_ms"], row["against_ebr_ivf"]
        recall = "–" if row["recall"] is None else f"{row['recall']:.4f}"
        if row["recall_error"] is not None:
            recall += f" ± {row['recall_error']:.4f}"
        p99 = "–" if waited["p99"] is None else f"{waited['p99']:.2f}"
        settings = ", ".join(f"{name} {value}" for name, value in row["settings"].items())
        lines.append(
            f"| {row['label']} | {cpu['median']:.2f} ({cpu['low']:.2f}–{cpu['high']:.2f}) | {waited['p50']:.2f} "
            f"({waited['low']:.2f}–{waited['high']:.2f}) | {p99} | {ratio['cpu']:.2f} | "
            f"{ratio['p50']:.2f} | {recall} | {settings} |"
        )
    lines += [
        "",
        "CPU is that of all processes of the server, kernel time included, less what they use idle: medians over "
        "rounds, in brackets their 10th and 90th percentiles (for p50 those of the rounds' medians). Latency is "
        "the client's, without parsing the answer; p99 is left out of fewer than 1,000 requests. Recall is over "
        f"{report['recall_requests']} requests, ± the standard error, against scoring every item with the same model; "
        "Faiss ranks by the one task of the highest rank. The echo reads the request and answers with zeros of the "
        "same shapes: what any Python model in Triton costs.",
        "",
        f"![CPU time and latency]({_stem(report)}.png)",
    ]
    return "\n".join(lines) + "\n"


def plot(report: Mapping[str, Any], path: Path) -> Path:
    """Bars of CPU time and p50 per model with their spread over rounds, recall written beside them."""
    rows = report["rows"]
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.2 + 0.42 * len(rows)), sharey=True)
    for axis, key, middle, label in (
        (axes[0], "cpu_ms", "median", "CPU milliseconds per request"),
        (axes[1], "latency_ms", "p50", "p50 milliseconds at the client"),
    ):
        for place, row in enumerate(rows):
            value, found = row[key][middle], row["recall"]
            error = [[max(0.0, value - row[key]["low"])], [max(0.0, row[key]["high"] - value)]]
            colour = COLOURS.get(row["model"].partition("_")[0], FLAT)
            axis.barh(place, value, xerr=error, color=colour, capsize=3)
            text = f" {value:.2f}" + ("" if found is None else f", recall {found:.3f}")
            axis.text(row[key]["high"], place, text, va="center", fontsize=8)
        axis.set(xlabel=f"{label} (log scale)", xscale="log")
        axis.margins(x=0.3)
        axis.grid(alpha=0.3, axis="x")
    axes[0].set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
    axes[0].invert_yaxis()
    simulated = ", simulated" if report["simulated"] else ""
    figure.suptitle(
        f"{report['recipe']}{simulated}, V = {report['items']:,}, K = {report['k']:,}", fontsize=10
    )
    return save(figure, path)
