"""From the metrics of single runs to a row's figures: the one reader of metrics.json, means over seeds, and what counts
as a difference.

A figure has a flat name: "ne.click", "calibration.click", "recall@100", "ndcg@10", "search_recall@100",
"scored_share", "occupancy", "largest_node", "lowest_calibration", "train_minutes".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from hsnn_core.errors import DataError

CONFIDENCE = 0.95
TIE_RULE = (
    "Differences are taken seed by seed, since rows of one seed share requests and sampled negatives; ± is the "
    f"standard deviation over seeds, behind a change the half width of its {CONFIDENCE:.0%} interval (Student's t over "
    "the seeds' differences). A change whose interval holds 0 is inside seed noise and called a tie."
)

Figures = Mapping[str, float]


def read_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one run, from what `hsnn_train.evaluate.evaluate` returned; undefined ones are left out.

    NE and calibration are those of the item layer, lowest and highest calibration those of all layers and tasks. Recall
    and NDCG are of the layer-wise search at the recipe's widths. Occupancy is the share of the codewords that have
    items, largest_node the share of the items in the fullest one times the number of codewords (1 is perfect balance),
    both of the index layer where they are worst.
    Raises DataError for metrics without their parts.
    """
    try:
        last = max(row["layer"] for row in metrics["pointwise"])
        found: dict[str, Any] = {}
        for row in metrics["pointwise"]:
            if row["layer"] == last:
                found[f"ne.{row['task']}"] = row["ne"]
                found[f"calibration.{row['task']}"] = row["calibration"]
        calibrations = [row["calibration"] for row in metrics["pointwise"] if row["calibration"] is not None]
        if calibrations:
            found |= {"lowest_calibration": min(calibrations), "highest_calibration": max(calibrations)}
        retrieval = metrics["retrieval"]
        found |= retrieval.get("search", {})
        found |= {f"exhaustive_{name}": value for name, value in retrieval.get("exhaustive", {}).items()}
        found |= {f"search_recall{at}": value for at, value in retrieval.get("search_recall", {}).items()}
        index = metrics["index"]
        if index:
            found["occupancy"] = min(row["occupancy"] for row in index)
            found["largest_node"] = max(row["largest_share"] * row["codewords"] for row in index)
        found["scored_share"] = retrieval.get("scored_share")
        found["train_minutes"] = metrics["seconds"]["train"] / 60
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"metrics without {error}: not those of a whole evaluation; remove the run and train it again"
        ) from error
    return {name: float(value) for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation (n - 1; None for one seed) of a figure over ``values``, seed -> value."""

    mean: float
    std: float | None
    values: dict[int, float]


def summarise(values: Mapping[int, float]) -> Summary | None:
    """Mean ± standard deviation; None without values."""
    if not values:
        return None
    numbers = list(values.values())
    return Summary(fmean(numbers), stdev(numbers) if len(numbers) > 1 else None, dict(values))


def by_figure(runs: Mapping[int, Figures]) -> dict[str, Summary]:
    """seed -> figures, as figure -> summary. A figure that a seed lacks is summarised over the others."""
    names = dict.fromkeys(name for figures in runs.values() for name in figures)
    summaries = {
        name: summarise({seed: figures[name] for seed, figures in runs.items() if name in figures})
        for name in names
    }
    return {name: summary for name, summary in summaries.items() if summary is not None}


@dataclass(frozen=True)
class Change:
    """Change against a reference, in percent of it: mean over the seeds that both have, half the width of its
    confidence interval (None for one seed) and whether it is inside seed noise (None: cannot be said)."""

    percent: float
    interval: float | None
    tie: bool | None


def relative_change(figure: Summary | None, reference: Summary | None) -> Change | None:
    """(figure - reference) / reference per seed, in percent; the tie rule of `TIE_RULE`. None when there is nothing to
    compare, or a reference of 0."""
    if figure is None or reference is None:
        return None
    seeds = [s for s in figure.values if s in reference.values]
    if not seeds or any(reference.values[s] == 0 for s in seeds):
        return None
    changes = [100 * (figure.values[s] - reference.values[s]) / reference.values[s] for s in seeds]
    mean = fmean(changes)
    if len(changes) < 2:
        return Change(mean, None, None)
    quantile = float(student.ppf(0.5 + CONFIDENCE / 2, len(changes) - 1))
    interval = quantile * stdev(changes) / math.sqrt(len(changes))
    return Change(mean, interval, abs(mean) <= interval)


def gap_closure(figure: Summary | None, low: Summary | None, high: Summary | None) -> float | None:
    """(row - EBR) / (XL flat - EBR), of the means over the seeds that all three have; None where XL flat is not above
    EBR, so that there is no gap."""
    if figure is None or low is None or high is None:
        return None
    seeds = [s for s in figure.values if s in low.values and s in high.values]
    if not seeds:
        return None
    row, bottom, top = (fmean(summary.values[s] for s in seeds) for summary in (figure, low, high))
    return (row - bottom) / (top - bottom) if top > bottom else None
