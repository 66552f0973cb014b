"""PNG plots of the benches: recall against cost, recall against the share scored, NE of ablations and streams."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from hsnn_core.files import write_bytes

from .width_search import Point

FLAT, PRUNED, EBR = "#4472a8", "#b5523b", "#5a8f5a"
MARKER = 10  # pixels to keep free around a point
#: Where a point's label may stand, the best first: the side of the text that is at the point; points (x, y) from it.
LABEL_SPOTS = tuple(
    (side, (6 if side == "left" else -6, up)) for up in (6, -7, -17, 16) for side in ("left", "right")
)


def recall_against_cost(report: dict[str, Any], path: Path) -> Path:
    """Left: Recall@100 against measured milliseconds; right: the paper's gain against its relative cost."""
    figure, (ours, paper) = plt.subplots(1, 2, figsize=(12, 4.8))
    points = [
        (
            row,
            row["cost"]["median_ms"],
            row["figures"]["recall@100"]["mean"],
            row["figures"]["recall@100"]["std"],
        )
        for row in report["rows"]
        if row["cost"] is not None and "recall@100" in row["figures"]
    ]
    _scatter(ours, points)
    ours.set(xlabel="milliseconds per request, measured (log scale)", ylabel="Recall@100",
             title=f"{report['data']}{', simulated' if report['simulated'] else ''}")  # fmt: skip
    printed = [(row, row["paper"]["cost"], row["paper"]["recall"], None) for row in report["rows"]]
    _scatter(paper, [point for point in printed if point[1] is not None])
    paper.set(xlabel="infra cost relative to Two Tower XS (log scale)", ylabel="recall gain over XS (%)",
              title="as the paper prints it")  # fmt: skip
    return save(figure, path)


def _scatter(axis: Any, points: Sequence[tuple[dict[str, Any], float, float, float | None]]) -> None:
    """Points (row, x, y, error) with the rows' ids; flat rows are joined by a line."""
    for row, x, y, error in points:
        flat = len(row["layers"]) == 1
        colour = EBR if row["id"] == "ebr" else FLAT if flat else PRUNED
        axis.errorbar(x, y, yerr=error, fmt="o" if flat else "s", color=colour, capsize=3, markersize=6)
    flat_line = sorted((x, y) for row, x, y, _ in points if len(row["layers"]) == 1)
    if flat_line:
        axis.plot(*zip(*flat_line), color=FLAT, linewidth=0.8, alpha=0.5)
    log_axis(axis)
    axis.margins(x=0.15, y=0.12)
    axis.grid(alpha=0.3)
    _label(axis, [(row["id"], x, y, error or 0.0) for row, x, y, error in points])


def _label(axis: Any, points: Sequence[tuple[str, float, float, float]]) -> None:
    """Write the text of every point (text, x, y, error) beside it, where it covers no marker, no error bar and no text
    before it, else where it covers the fewest. The axis has its scale and limits already."""
    axis.figure.canvas.draw()
    ends = [axis.transData.transform([(x, y - error), (x, y + error)]) for _, x, y, error in points]
    taken = [Bbox(bar).padded(MARKER / 2) for bar in ends]
    for text, x, y, _ in points:
        tried = []
        for side, offset in LABEL_SPOTS:
            label = axis.annotate(
                text, (x, y), xytext=offset, textcoords="offset points", fontsize=8, ha=side, va="center"
            )
            box = label.get_window_extent()
            tried.append((box.count_overlaps(taken), label, box))
            if not tried[-1][0]:
                break
        _, kept, box = min(tried, key=lambda spot: spot[0])
        for _, label, _ in tried:
            if label is not kept:
                label.remove()
        taken.append(box)


def log_axis(axis: Any) -> None:
    """A logarithmic x axis with plain numbers at 1, 2 and 5 of every decade."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def recall_by_data(found: dict[str, dict[str, tuple[float, float | None]]], path: Path) -> Path:
    """Bars per data set: Recall@100 and its standard deviation. found: data set -> model -> (mean, deviation)."""
    names = list(dict.fromkeys(name for models in found.values() for name in models))
    colours = dict(zip(names, plt.get_cmap("tab10").colors))  # type: ignore[attr-defined]
    figure, axis = plt.subplots(figsize=(11, 4.4))
    width = 0.85 / len(names)
    for place, models in enumerate(found.values()):
        for number, name in enumerate(name for name in names if name in models):
            mean, std = models[name]
            at = place + (number - (len(models) - 1) / 2) * width
            bars = axis.bar(at, mean, width, yerr=std, color=colours[name], error_kw={"linewidth": 0.8})
            axis.bar_label(bars, labels=[f"{mean:.3f}".lstrip("0")], fontsize=7, padding=1)
    axis.legend([Patch(color=colours[name]) for name in names], names, fontsize=8)
    axis.set_xticks(range(len(found)), list(found))
    axis.set(ylabel="Recall@100, test", title="whole corpus ranked; HSNN and EBR through their pruned search")
    axis.margins(y=0.1)
    axis.grid(alpha=0.3, axis="y")
    return save(figure, path)


def recall_against_share(sweeps: dict[str, list[dict[str, Any]]], title: str, path: Path) -> Path:
    """Search recall (left) and recall (right) against the share of items scored, one line per row."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    at = max((point["at"] for points in sweeps.values() for point in points), default=100)
    for axis, name, label in zip(
        axes, ("search_recall", "recall"), (f"search recall@{at}, against exhaustive scoring", f"Recall@{at}")
    ):
        for row, points in sweeps.items():
            ordered = sorted(points, key=lambda point: point["scored_share"])
            shares = [100 * point["scored_share"] for point in ordered]
            axis.plot(shares, [point[name] for point in ordered], marker=".", linewidth=1.2, label=row)
        axis.set(xlabel="items scored per request (%)", ylabel=label, xlim=(0, None), title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return save(figure, path)


def ne_bars(report: dict[str, Any], path: Path) -> Path:
    """NE of the first task, mean ± standard deviation over seeds, a panel per block."""
    name = f"ne.{report['tasks'][0]}"
    blocks = list(dict.fromkeys(row["block"] for row in report["rows"]))
    figure, axes = plt.subplots(1, len(blocks), figsize=(5.5 * len(blocks), 4.2), squeeze=False)
    for axis, block in zip(axes[0], blocks):
        rows = [row for row in report["rows"] if row["block"] == block and name in row["figures"]]
        values = np.array([row["figures"][name]["mean"] for row in rows])
        errors = np.array([row["figures"][name]["std"] or 0.0 for row in rows])
        axis.bar([row["id"] for row in rows], values, yerr=errors, color=FLAT, capsize=4, width=0.6)
        if len(rows):
            low, high = float((values - errors).min()), float((values + errors).max())
            room = max(high - low, 1e-3)
            axis.set_ylim(low - room, high + 0.3 * room)
        axis.set(ylabel=f"NE, {report['tasks'][0]} (axis is cut)", title=f"{report['data']}, {block}")
        axis.tick_params(axis="x", labelrotation=20, labelsize=8)
        axis.grid(alpha=0.3, axis="y")
    return save(figure, path)


def stages_of_ways(report: dict[str, Any], path: Path) -> Path:
    """A bar per way: the medians of the search's stages, and what lies outside of the search."""
    names = ["user tower", *(f"layer {n}" for n in range(1, len(report["index"]) + 1))]
    ways = {}
    for way, given in report["ways"].items():
        *stages, search = given["stages"]
        outside = max(0.0, given["microseconds"]["median"] - search)
        ways[way] = dict(zip(names, stages)) | {"outside the search": outside}
    return parts_of_request(ways, report["simulated"], path)


def parts_of_request(ways: dict[str, dict[str, float]], simulated: bool, path: Path) -> Path:
    """A bar per way: its parts, in microseconds, one after the other."""
    figure, axis = plt.subplots(figsize=(8, 3.2))
    for place, parts in enumerate(ways.values()):
        left = 0.0
        for number, (name, part) in enumerate(parts.items()):
            axis.barh(
                place, part / 1000, left=left / 1000, color=f"C{number}", label=name if place == 0 else None
            )
            left += part
    axis.set_yticks(range(len(ways)), list(ways))
    axis.invert_yaxis()
    axis.set(xlabel=f"milliseconds per request, medians{' (simulated data)' if simulated else ''}")
    axis.legend(fontsize=8, ncol=2)
    return save(figure, path)


def cost_over_size(report: dict[str, Any], path: Path) -> Path:
    """Left: milliseconds over the number of items, at the tuned widths; right: recall against milliseconds of all
    widths that were measured, a line per corpus along its Pareto front."""
    figure, (size, front) = plt.subplots(1, 2, figsize=(12, 4.4))
    rows = report["sizes"]
    items = [row["items"] for row in rows]
    low, middle, high = (
        [row["microseconds"][name] / 1000 for row in rows] for name in ("p10", "median", "p90")
    )
    size.plot(items, middle, "o-", color=PRUNED)
    size.fill_between(items, low, high, color=PRUNED, alpha=0.2)
    for row, ms in zip(rows, middle):
        size.annotate(f"recall {row['search_recall']:.3f}", (row["items"], ms), xytext=(4, 6),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    size.set_xscale("log")
    size.set_ylim(bottom=0)
    size.set(
        xlabel="items (log scale)", ylabel="milliseconds per request", title="simulated data, one thread"
    )
    for number, row in enumerate(rows):
        best = sorted((p["ms"], p["recall"]) for p in row["points"] if p["best"])
        others = [(p["ms"], p["recall"]) for p in row["points"] if not p["best"]]
        if others:
            front.plot(*zip(*others), ".", color=f"C{number}", alpha=0.35)
        front.plot(*zip(*best), "o-", color=f"C{number}", label=f"{row['items']:,} items")
    front.axhline(report["target_recall"], color="grey", linewidth=0.8)
    front.set_xscale("log")
    front.set(xlabel="milliseconds per request (log scale)", ylabel=f"search recall@{report['k']}")
    front.legend(fontsize=8)
    for axis in (size, front):
        axis.grid(alpha=0.3)
    return save(figure, path)


def recall_of_widths(points: Sequence[Point], chosen: Point, title: str, path: Path) -> Path:
    """Recall against milliseconds of the widths that were measured, with the front and the choice."""
    figure, axis = plt.subplots(figsize=(7, 4.4))
    axis.plot([p.ms for p in points], [p.recall for p in points], ".", color=FLAT, alpha=0.5)
    front = sorted((p.ms, p.recall) for p in points if p.best)
    axis.plot(*zip(*front), "-", color=FLAT, label="Pareto front")
    axis.plot(
        chosen.ms, chosen.recall, "o", color=PRUNED, label=f"chosen: {', '.join(map(str, chosen.widths))}"
    )
    axis.set_xscale("log")
    axis.set(xlabel="milliseconds per request (log scale)", ylabel="search recall", title=title)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return save(figure, path)


def following(report: dict[str, Any], path: Path) -> Path:
    """NE of every file of a stream, by the model that stands still and by the one that follows, a panel per task."""
    tasks = report["tasks"]
    figure, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4), squeeze=False)
    for axis, task in zip(axes[0], tasks):
        for kind, color, label in (("still", PRUNED, "stands still"), ("follows", FLAT, "follows")):
            values = [np.nan if (ne := row[kind][task]["ne"]) is None else ne for row in report["files"]]
            axis.plot(range(1, len(values) + 1), values, color=color, marker="o", label=label)
        axis.set(xlabel="file of the stream", ylabel="NE before learning from the file",
                 title=f"{report['data']}{', simulated' if report['simulated'] else ''}: {task}")  # fmt: skip
        axis.grid(alpha=0.3)
        axis.legend()
    return save(figure, path)


def targeting_of_selectivities(report: dict[str, Any], path: Path) -> Path:
    """Recall and cost, relative to no filter, over the share of the items that a drawn filter lets through."""
    rows = [row for row in report["filters"] if row["filter"].startswith("drawn")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    shares = [row["passed"] for row in rows]
    left.semilogx(shares, [row["recall"] for row in rows], marker="o")
    left.set_ylabel(f"recall of the exhaustive top {report['k']}")
    left.set_ylim(min(0.9, *(row["recall"] for row in rows)) - 0.01, 1.005)
    right.semilogx(shares, [row["ratio"] for row in rows], marker="o")
    right.axhline(1.0, color="grey", linewidth=0.8)
    right.set_ylabel("time relative to no filter")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.set_xlabel("share of the items that pass")
        axis.grid(alpha=0.3)
    return save(figure, path)


def freshness_and_latency(report: dict[str, Any], path: Path) -> Path:
    """How many updates were found within how many milliseconds; and each turn's median latency with and without."""
    fresh, steady = report["freshness"], report["sustained"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for (way, of), colour in zip(fresh["ways"].items(), (PRUNED, FLAT)):
        found = np.sort(of["ms"])
        left.plot(found, np.arange(1, len(found) + 1) / len(found), color=colour, label=way)
    left.axvline(
        fresh["search_p50_ms"], color="grey", linewidth=0.8, linestyle=":", label="a search alone, median"
    )
    left.set_xlabel("ms from the acknowledgement to an answer with the item")
    left.set_ylabel("share of the updates")
    left.set_xlim(left=0)
    left.legend()
    turns = np.arange(1, len(steady["turn_medians"]) + 1)
    for place, (label, colour) in enumerate(
        (("without updates", FLAT), (f"{steady['per_second']:,.0f} updates a second", PRUNED))
    ):
        right.plot(
            turns, [turn[place] for turn in steady["turn_medians"]], marker="o", color=colour, label=label
        )
    right.set_xlabel("turn")
    right.set_ylabel("median latency, ms")
    right.set_ylim(bottom=0)
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return save(figure, path)


def save(figure: Any, path: Path) -> Path:
    """Write the figure as a PNG and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    plt.close(figure)
    write_bytes(path, drawn.getvalue())
    return path
