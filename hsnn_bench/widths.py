"""Recall against the share of items scored: a trained run searched at beams from narrow to wide."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hsnn_train.checkpoint import load_run, write_json
from hsnn_train.data.dataset import Dataset
from hsnn_train.retrieval import retrieval

SWEEP = "widths.json"
FACTORS = (0.125, 0.25, 0.5, 1.0, 1.5, 2.5)
RECALL_AT = 100


def beams(widths: Sequence[int], factors: Sequence[float] = FACTORS) -> list[list[int]]:
    """The recipe's widths times each factor, at least 1, without repetitions."""
    scaled = [tuple(max(1, round(width * factor)) for width in widths) for factor in factors]
    return [list(beam) for beam in dict.fromkeys(scaled)]


def sweep(
    run_dir: Path, dataset: Dataset, requests: int, device: torch.device, progress: bool = True
) -> list[dict[str, Any]]:
    """Points {"widths", "scored_share", "search_recall", "recall", "at"} of a run's first ``requests`` evaluation
    requests on ``device``, kept in the run; shares and recalls in 0..1, at the first K of 100 results or all there
    are."""
    run = load_run(run_dir)
    tried = beams(run.recipe.search.widths[: run.model.layers - 1])
    kept = run_dir / SWEEP
    wanted = {"requests": requests, "beams": tried}
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        if {name: found.get(name) for name in wanted} == wanted:
            points: list[dict[str, Any]] = found["points"]
            return points
    model = run.model.to(device)
    points = []
    for widths in tqdm(tried, desc=f"widths of {'+'.join(run.recipe.model.layers)}", disable=not progress):
        search = replace(run.recipe.search, widths=tuple(widths), requests=requests)
        report = retrieval(model, dataset, replace(run.recipe, search=search), run.index)
        if not report["requests"]:
            return []
        at = min(RECALL_AT, max(int(name.removeprefix("@")) for name in report["search_recall"]))
        points.append(
            {
                "widths": widths,
                "scored_share": report["scored_share"],
                "search_recall": report["search_recall"][f"@{at}"],
                "recall": report["search"][f"recall@{at}"],
                "at": at,
            }
        )
    write_json(kept, {**wanted, "points": points})
    return points
