"""The page and the plot of `hsnn bench cascade`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from .figures import TIE_RULE
from .plots import EBR, FLAT, PRUNED, log_axis, save
from .report import change, markdown, mean_std


def page(report: dict[str, Any]) -> str:
    """Markdown of a report."""
    ten = "HR@10" if report["leave_one_out"] else "Recall@10"
    found = [
        [
            row["label"],
            *(mean_std(row["figures"], name) for name in ("recall@10", "ndcg@10", "recall@50", "recall@100")),
            *(change(row["hsnn_over"].get(name)) for name in ("recall@10", "recall@100")),
        ]
        for row in report["rows"]
    ]
    cost = [
        [
            row["label"],
            " + ".join(f"{count:,.0f}" for count in row["cost"]["candidates"]),
            f"{row['cost']['median_ms']:.1f} ({row['cost']['p10_ms']:.1f}–{row['cost']['p90_ms']:.1f})",
            f"{row['cost']['of_hsnn']:.2f}×",
            str(row["cost"]["requests"]),
            mean_std(row["figures"], "recall@100"),
        ]
        for row in report["rows"]
    ]
    notes = [
        TIE_RULE,
        "The models are Table 1's. A cascade, “EBR → MoNN Small, n”, retrieves n items by two towers under a k-means "
        "index, whose beam widens until it holds them, and orders them by the flat MoNN Small, which reads the "
        "crossings of user and item that HSNN reads; the two were trained apart. EBR alone and HSNN search at the "
        "recipe's widths; MoNN Small alone scores every item.",
        "Nodes and items scored: of EBR nodes and items, of a cascade those that the ranker scored last; of HSNN its "
        "three layers.",
        "Milliseconds: measured in one process with one thread, one request at a time, every request through all rows "
        "before the next, models of the first seed; rows that take long answer fewer of them.",
        f"Models were trained, or calibrated and evaluated anew, at commit {', '.join(report['trained_at'])}.",
        *report["data_notes"],
    ]
    parts = [
        f"# Two towers with a ranker behind them, beside HSNN, on {report['data']}",
        f"`{report['command']}`",
        f"Seeds {', '.join(map(str, report['seeds']))}; {report['requests']:,} test requests per seed over "
        f"{report['items']:,} items; commit {report['commit']}; {report['machine']}, one thread; {report['date']}.",
        "**The data are simulated, and so are the figures.**" if report["simulated"] else "",
        f"![Recall@100 against cost](cascade-{report['data']}.png)",
        "## What is found",
        markdown(["model", ten, "NDCG@10", "Recall@50", "Recall@100", f"HSNN over it, {ten}",
                  "HSNN over it, Recall@100"], found),
        "## What it costs",
        markdown(["model", "nodes and items scored", "ms per request (10–90%)", "of HSNN's", "requests",
                  "Recall@100"], cost),
        "## Notes",
        "\n".join(f"- {note}" for note in notes),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def draw(report: dict[str, Any], path: Path) -> Path:
    """Recall@100 against milliseconds: the cascades as a line, the others as points."""
    figure, axis = plt.subplots(figsize=(7.4, 4.4))
    groups = (
        ("EBR → MoNN Small", [row for row in report["rows"] if row["depth"]], EBR, "o-"),
        ("EBR", [row for row in report["rows"] if row["id"] == "ebr"], EBR, "s"),
        ("MoNN Small, every item", [row for row in report["rows"] if row["id"] == "small"], FLAT, "o"),
        ("HSNN", [row for row in report["rows"] if row["id"] == "recipe"], PRUNED, "s"),
    )
    for label, rows, colour, style in groups:
        recalls = [row["figures"]["recall@100"] for row in rows]
        axis.errorbar([row["cost"]["median_ms"] for row in rows], [one["mean"] for one in recalls],
                      yerr=[one["std"] or 0.0 for one in recalls], fmt=style, color=colour, capsize=3,
                      label=label)  # fmt: skip
    for row in report["rows"]:
        if row["depth"]:
            at = row["cost"]["median_ms"], row["figures"]["recall@100"]["mean"]
            axis.annotate(f"{row['depth']:,}", at, xytext=(4, -11), textcoords="offset points", fontsize=8)
    log_axis(axis)
    axis.set(xlabel="milliseconds per request, measured (log scale)", ylabel="Recall@100",
             title=f"{report['data']}{', simulated' if report['simulated'] else ''}")  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return save(figure, path)
