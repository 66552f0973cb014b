"""The page and the plot of `hsnn bench cascade`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from .figures import TIE_RULE
from .plots import EBR, FLAT, PRUNED, save
from .report import change, markdown, mean_std


def page(report: dict[str, Any]) -> str:
    """Markdown of a report."""
    ten = "HR@10" if report["leave_one_out"] else "Recall@10"
    quality = [
        [
            row["label"],
            *(mean_std(row["figures"], name) for name in ("recall@10", "ndcg@10", "recall@50", "recall@100")),
            *(change(row["hsnn_over"].get(name)) for name in ("recall@10", "recall@100")),
            f"{row['cost']['median_ms']:.1f} ({row['cost']['p10_ms']:.1f}–{row['cost']['p90_ms']:.1f})",
            " + ".join(f"{count:,.0f}" for count in row["cost"]["candidates"]),
        ]
        for row in report["rows"]
    ]
    header = ["model", ten, "NDCG@10", "Recall@50", "Recall@100", f"HSNN over it, {ten}",
              "HSNN over it, Recall@100", "ms per request (10–90%)", "scored per layer"]  # fmt: skip
    notes = [
        TIE_RULE,
        "The rows are Table 1's models. A cascade retrieves by the two towers' index and orders what came back by the "
        "flat MoNN, which reads the crossings that HSNN reads; both were trained apart. HSNN and EBR search at the "
        "recipe's widths; the flat MoNN scores every item.",
        "Milliseconds: measured in one process with one thread, one request at a time, every request through all rows "
        "before the next, models of the first seed.",
        *report["data_notes"],
    ]
    parts = [
        f"# Two towers with a ranker behind them, beside HSNN, on {report['data']}",
        f"`{report['command']}`",
        f"Seeds {', '.join(map(str, report['seeds']))}; {report['requests']:,} test requests per seed over "
        f"{report['items']:,} items; commit {report['commit']}; {report['machine']}, one thread; {report['date']}.",
        "**The data are simulated, and so are the figures.**" if report["simulated"] else "",
        f"![Recall@100 of the cascade](cascade-{report['data']}.png)",
        markdown(header, quality),
        "## Notes",
        "\n".join(f"- {note}" for note in notes),
    ]
    return "\n\n".join(part for part in parts if part)


def draw(report: dict[str, Any], path: Path) -> Path:
    """Recall@100 of the cascade over its depth, and what the others have."""
    rows = {row["id"]: row for row in report["rows"]}
    deep = [row for row in report["rows"] if row["depth"]]
    figure, axis = plt.subplots(figsize=(7, 4.2))
    found = [row["figures"]["recall@100"] for row in deep]
    axis.errorbar([row["depth"] for row in deep], [one["mean"] for one in found],
                  yerr=[one["std"] or 0.0 for one in found], marker="o", capsize=3, color=EBR,
                  label=f"{rows['ebr']['label']}, ordered by {rows['small']['label']}")  # fmt: skip
    for name, colour, style in (("recipe", PRUNED, "-"), ("small", FLAT, "--"), ("ebr", EBR, ":")):
        mean = rows[name]["figures"]["recall@100"]["mean"]
        axis.axhline(mean, color=colour, linestyle=style, label=f"{rows[name]['label']}: {mean:.4f}")
    axis.set(xscale="log", xlabel="items retrieved and ordered", ylabel="Recall@100",
             title=f"{report['data']}{', simulated' if report['simulated'] else ''}")  # fmt: skip
    axis.set_xticks([row["depth"] for row in deep], [f"{row['depth']:,}" for row in deep])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return save(figure, path)
