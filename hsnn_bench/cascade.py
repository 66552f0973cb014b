"""`hsnn bench cascade`: two towers + ANN, with a rich ranker behind them, beside HSNN.

HSNN reads crossings of user and item, EBR cannot, so a gain of one over the other may be the crossings' alone. The
plain alternative is a cascade: EBR retrieves n items, and a MoNN that reads the crossings puts them in order. Its
stages are Table 1's own rows (EBR, MoNN Small flat), trained apart as such stages are, and share its work folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hsnn_cli.commands_training import load_data
from hsnn_core.errors import DataError, HsnnError, SchemaError
from hsnn_core.features import Encoded
from hsnn_core.search import LayerTrace, SearchResult, checked_scores, falling, rank_scores, sigmoid
from hsnn_train.checkpoint import without_nan, write_json
from hsnn_train.data.dataset import Dataset
from hsnn_train.data.requests import Requests, evaluation_requests
from hsnn_train.metrics import ndcg_at, recall_at
from hsnn_train.retrieval import USERS_PER_CALL

from .cost import Ask, interleave
from .figures import Summary, by_figure, relative_change
from .jobs import Job, evaluation_key
from .report_files import write_report
from .searcher import Searcher
from .tables import COST_REQUESTS, TableOptions, collect, table_jobs
from .workers import run_jobs

RETRIEVER, RANKER, OURS = STAGES = "ebr", "small", "recipe"
DEPTHS = (100, 200, 500, 1000, 2000, 4000)
KS = (10, 20, 50, 100)
FIGURES = (*(f"recall@{k}" for k in KS), "ndcg@10")
KEPT_AS = 1  # what a file of figures that is kept means


@dataclass(frozen=True)
class Line:
    """A row of the report; ``depth`` of a cascade alone."""

    id: str
    label: str
    depth: int | None = None


def lines(depths: Sequence[int], labels: Mapping[str, str]) -> list[Line]:
    """The rows of the report. ``labels``: of Table 1's rows."""
    behind = [
        Line(f"{RETRIEVER}+{RANKER}@{depth}", f"{labels[RETRIEVER]} → {labels[RANKER]}, {depth:,}", depth)
        for depth in depths
    ]
    return [
        Line(RETRIEVER, labels[RETRIEVER]),
        *behind,
        Line(RANKER, labels[RANKER]),
        Line(OURS, labels[OURS]),
    ]


def rerank(found: SearchResult, depth: int, ranker: Searcher, users: Encoded) -> SearchResult:
    """The first ``depth`` items that were ``found`` for each of B users, ordered by a flat ``ranker``.

    Equal scores stay in the order of the retrieval. The trace has a layer more, of the items that were scored. Raises
    SchemaError for a ranker with an index (its items' scores need those of their nodes), DataError for items that it
    does not have, SearchError for scores that are not finite.
    """
    began = perf_counter_ns()
    if ranker.index.layers != 1:
        raise SchemaError(f"a ranker of {ranker.index.layers} layers, expected one: a flat model")
    ids, valid = found.item_ids[:, :depth], np.minimum(found.valid, depth)
    there = np.arange(ids.shape[1]) < valid[:, None]
    nodes = np.zeros(ids.shape, np.int64)
    nodes[there] = ranker.positions(ids[there])
    state = ranker.scorer.open(users)
    monn, logits = ranker.scorer.score(state, 1, nodes, np.zeros((*nodes.shape, 0), np.float32))
    checked_scores(1, monn, logits, there, len(ranker.rank))
    keys = np.where(there, rank_scores(logits, ranker.rank), -np.inf).astype(np.float32)
    order = np.stack([falling(row) for row in keys])  # what is not there comes last
    probabilities = np.take_along_axis(sigmoid(logits), order[:, :, None], axis=1)
    probabilities[~there] = 0
    took = (perf_counter_ns() - began) // 1000
    counts = valid.astype(np.int64)
    return replace(
        found,
        item_ids=np.take_along_axis(ids, order, axis=1),
        probabilities=probabilities,
        rank_score=np.take_along_axis(keys, order, axis=1),
        valid=valid.astype(np.int32),
        positions=np.where(there, np.take_along_axis(nodes, order, axis=1), 0),
        layers=(*found.layers, LayerTrace(counts, counts, np.where(there, nodes, -1), took)),
        total_microseconds=found.total_microseconds + took,
    )


@dataclass(frozen=True)
class Stages:
    """The three models of one seed."""

    retriever: Searcher
    ranker: Searcher
    ours: Searcher

    def answer(self, line: Line, requests: Requests, part: slice) -> SearchResult:
        """What a row finds for the requests ``part``. A cascade's beam widens until it holds what is asked of it; all
        else is searched as in Table 1."""
        if line.depth is None:
            stage = {RETRIEVER: self.retriever, RANKER: self.ranker, OURS: self.ours}[line.id]
            return stage.find(requests, part, min(max(KS), requests.items))
        found = self.retriever.find(requests, part, line.depth, adapt=True)
        users = Encoded(requests.users.dense[part], requests.users.ids[part])
        return rerank(found, line.depth, self.ranker, users)

    def asker(self, line: Line, requests: Requests) -> Ask:
        """Request number -> the row's answer to it alone, as it is timed."""
        return lambda number: self.answer(line, requests, slice(number, number + 1))


def quality(
    stages: Stages, rows: Sequence[Line], dataset: Dataset, requests: Requests
) -> dict[str, dict[str, float]]:
    """Row id -> `FIGURES` of all requests."""
    wanted = [dataset.item_keys[items] for items in requests.wanted]
    starts = range(0, len(requests), USERS_PER_CALL)
    figures = {}
    for line in rows:
        ids, valid = [], []
        for start in tqdm(starts, desc=f"{line.id}, seed {dataset.seed}", leave=False):
            answer = stages.answer(line, requests, slice(start, start + USERS_PER_CALL))
            ids.append(answer.item_ids[:, : max(KS)])
            valid.append(np.minimum(answer.valid, max(KS)))
        found, count = np.concatenate(ids), np.concatenate(valid)
        measured = [recall_at(found, count, wanted, k) for k in KS] + [ndcg_at(found, count, wanted, 10)]
        figures[line.id] = dict(zip(FIGURES, measured))
    return figures


def run_cascade(options: TableOptions, depths: Sequence[int] = DEPTHS) -> Path:
    """Train what Table 1 has not trained yet, measure, write <results>/cascade-<data>.{json,md,png}; returns the page.

    Depths above the number of items are left out. What was found is kept in the work folder: a second call only
    measures the time anew. Raises SchemaError for options that name nothing known and for depths below 100, DataError
    for a test split without requests, HsnnError when a worker failed.
    """
    from .cascade_report import draw, page

    if not depths or min(depths) < max(KS):
        raise SchemaError(f"--depth: got {list(depths)}, expected numbers of items, each at least {max(KS)}")
    base, table_rows, seeds, jobs = table_jobs(replace(options, rows=",".join(STAGES)))
    failures = run_jobs([jobs[name, seed] for seed in seeds for name in STAGES], options.parallel)
    if failures:
        failed = ", ".join(failure.job.label for failure in failures)
        raise HsnnError(
            f"bench: {len(failures)} workers failed ({failed}); the same command tries them again"
        )
    torch.set_num_threads(1)
    dataset = load_data(base)
    depths = [depth for depth in sorted(set(depths)) if depth <= len(dataset.item_keys)]
    rows = lines(depths, {row.id: row.label for row in table_rows})
    runs: dict[str, dict[int, dict[str, float]]] = {line.id: {} for line in rows}
    asked = []
    for seed in seeds:
        found = _kept(options.work, base.name, [jobs[name, seed] for name in STAGES], rows, dataset)
        asked.append(found["requests"])
        for name, figures in found["figures"].items():
            runs[name][seed] = figures
    first = _stages([jobs[name, seeds[0]] for name in STAGES], dataset)
    timed = evaluation_requests(
        dataset, "test", base.search.candidates, min(COST_REQUESTS, base.search.requests)
    )
    cost = interleave({line.id: first.asker(line, timed) for line in rows}, len(timed), progress=True)
    summaries = {name: by_figure(of_seeds) for name, of_seeds in runs.items()}
    _, _, trained_at, _ = collect([row for row in table_rows if row.id in STAGES], seeds, jobs)
    report = {
        "data": base.name, "data_notes": list(dataset.notes), "seeds": list(seeds), "requests": asked[0],
        "items": len(dataset.item_keys), "leave_one_out": base.data.get("adapter") == "s3rec",
        "trained_at": trained_at, "rows": [_row(line, summaries, cost) for line in rows],
    }  # fmt: skip
    command = options.command_of("cascade")
    command += (
        "" if tuple(depths) == DEPTHS[: len(depths)] else "".join(f" --depth {depth}" for depth in depths)
    )
    stem = options.results / f"cascade-{base.name}"
    return write_report(without_nan(report), stem, command, dataset.simulated, page, draw)


def _stages(jobs: Sequence[Job], dataset: Dataset) -> Stages:
    return Stages(*(Searcher(job.folder, dataset) for job in jobs))


def _kept(
    work: Path, data: str, jobs: Sequence[Job], rows: Sequence[Line], dataset: Dataset
) -> dict[str, Any]:
    """The number of requests and the `quality` of a seed's models, from the work folder where they are known there.
    Raises DataError without requests."""
    recipe = jobs[-1].recipe
    said = [
        KEPT_AS,
        [line.id for line in rows],
        *([job.folder.name, evaluation_key(job.recipe, work)] for job in jobs),
    ]
    digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]
    path = work / data / f"cascade-s{recipe.train.seed}-{digest}.json"
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    of_seed = replace(dataset, seed=recipe.train.seed)
    requests = evaluation_requests(of_seed, "test", recipe.search.candidates, recipe.search.requests)
    if not len(requests):
        raise DataError(
            f"{data}: no request in test, so there is nothing to retrieve; change the recipe's split"
        )
    found = {"requests": len(requests), "figures": quality(_stages(jobs, of_seed), rows, of_seed, requests)}
    write_json(path, found)
    return found


def _row(
    line: Line, summaries: Mapping[str, Mapping[str, Summary]], cost: Mapping[str, Any]
) -> dict[str, Any]:
    over = {
        figure: relative_change(summaries[OURS].get(figure), summary)
        for figure, summary in summaries[line.id].items()
        if line.id != OURS
    }
    return {
        **asdict(line),
        "figures": {figure: asdict(summary) for figure, summary in summaries[line.id].items()},
        "hsnn_over": {figure: asdict(change) for figure, change in over.items() if change is not None},
        "cost": {**asdict(cost[line.id]), "of_hsnn": cost[line.id].median_ms / cost[OURS].median_ms},
    }
