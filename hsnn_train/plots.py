"""PNG plots of a run: training curves, node occupancy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .batches import IndexState


def training_curves(history: Sequence[dict[str, Any]], path: Path) -> Path:
    """Loss parts over steps, smoothed over the logged points, one line each."""
    rows = [row for row in history if "loss" in row]
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for name in sorted({k for row in rows for k in row} - {"step"}):
        points = [(row["step"], row[name]) for row in rows if name in row]
        steps, values = np.array(points).T
        axis.plot(steps, values, label=name, linewidth=1.2)
    axis.set(xlabel="step", ylabel="loss (log scale)", yscale="log", title="Training: loss parts")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return _save(figure, path)


def index_over_training(history: Sequence[dict[str, Any]], path: Path) -> Path:
    """Per index layer, at every refresh: the share of codewords in effective use (perplexity over their number), and
    the share of items whose soft chain, which trains the codebooks, ends at another codeword than the hard one."""
    rows = [row for row in history if "l1_codewords" in row]
    figure, axis = plt.subplots(figsize=(8, 4.5))
    steps = [row["step"] for row in rows]
    layer = 1
    while rows and f"l{layer}_codewords" in rows[0]:
        used = [row[f"l{layer}_perplexity"] / row[f"l{layer}_codewords"] for row in rows]
        apart = [row[f"l{layer}_disagreement"] for row in rows]
        color = f"C{layer - 1}"
        axis.plot(steps, used, color=color, marker="o", label=f"layer {layer}: effective codewords")
        axis.plot(
            steps, apart, color=color, marker="x", ls="--", label=f"layer {layer}: soft and hard differ"
        )
        layer += 1
    axis.set(xlabel="step", ylabel="share", ylim=(-0.02, 1.02), title="The index over training")
    axis.grid(alpha=0.3)
    if rows:
        axis.legend(fontsize=8)
    return _save(figure, path)


def node_occupancy(state: IndexState, path: Path) -> Path:
    """Items per node, sorted, one curve per index layer; a flat curve is a balanced index."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for layer in range(1, state.paths.shape[1] + 1):
        counts = np.sort(np.unique(state.paths[:, :layer], axis=0, return_counts=True)[1])[::-1]
        axis.plot(
            np.linspace(0, 100, len(counts)),
            counts,
            label=f"layer {layer}: {len(counts)} nodes",
            linewidth=1.5,
        )
    axis.set(
        xlabel="nodes, fullest first (%)", ylabel="items in the node", title="Node occupancy", yscale="log"
    )
    axis.grid(alpha=0.3)
    if state.paths.shape[1]:
        axis.legend(fontsize=8)
    return _save(figure, path)


def latency_per_layer(stages: Sequence[str], microseconds: np.ndarray, path: Path) -> Path:
    """Served requests: median time of each stage. microseconds (requests, stages)."""
    figure, axis = plt.subplots(figsize=(8, 3.5))
    middle = np.median(microseconds, axis=0) / 1000
    spread = np.percentile(microseconds, [10, 90], axis=0) / 1000
    errors = np.abs(spread - middle)
    axis.barh(list(stages), middle, xerr=errors, color="#4472a8", capsize=3)
    axis.invert_yaxis()
    axis.set(
        xlabel="milliseconds per request (median; 10th to 90th percentile)",
        title="Where a request's time goes",
    )
    axis.grid(alpha=0.3, axis="x")
    return _save(figure, path)


def progressive_validation(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Of the files of a stream, NE of the item layer before it learnt from them, a point per file and task, over the
    impressions seen until then. ``rows``: those of follow.jsonl."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    tasks = [row["task"] for row in rows[0]["pointwise"] if row["layer"] == 1] if rows else []
    for task in tasks:
        last = [[own for own in row["pointwise"] if own["task"] == task][-1]["ne"] for row in rows]
        axis.plot([row["seen"] for row in rows], [np.nan if ne is None else ne for ne in last], marker="o",
                  markersize=3, linewidth=1.2, label=task)  # fmt: skip
    title = "Following a stream: NE of each file before learning from it"
    simulated = " (simulated)" if any(row["simulated"] for row in rows) else ""
    axis.set(xlabel="impressions seen", ylabel="NE", title=title + simulated)
    axis.grid(alpha=0.3)
    if tasks:
        axis.legend(fontsize=8)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
