"""`hsnn bench cascade`: two towers + ANN, with a rich ranker behind them, beside HSNN.

HSNN reads crossings of user and item, EBR cannot, so a gain of one over the other may be the crossings' alone. What a
team without HSNN would do is a cascade: EBR retrieves n items, and a MoNN that reads the crossings puts them in order.
The stages are Table 1's own rows (EBR, MoNN Small flat), trained apart as such stages are, and share its work folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hsnn_cli.commands_training import load_data
from hsnn_core.errors import HsnnError, SchemaError
from hsnn_core.features import Encoded
from hsnn_core.index import HierarchicalIndex
from hsnn_core.item_filter import ItemFilter
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import LayerTrace, SearchResult, falling, rank_scores, search, sigmoid
from hsnn_train.checkpoint import load_run, without_nan
from hsnn_train.data.dataset import Dataset
from hsnn_train.data.requests import Requests, evaluation_requests
from hsnn_train.metrics import ndcg_at, recall_at
from hsnn_train.retrieval import corpus_of
from hsnn_train.runner import TorchRunner

from .cost import Ask, interleave
from .figures import Summary, by_figure, relative_change
from .report_files import write_report
from .tables import COST_REQUESTS, TableOptions, table_jobs
from .workers import run_jobs

RETRIEVER, RANKER, OURS = "ebr", "small", "recipe"
ROWS = f"{RETRIEVER},{RANKER},{OURS}"
DEPTHS = (100, 200, 500, 1000)
KS = (10, 20, 50, 100)
USERS_PER_CALL = 16


class Stage:
    """A trained run that searches, and scores items that another one found."""

    def __init__(self, run_dir: Path, dataset: Dataset) -> None:
        run = load_run(run_dir)
        corpus = corpus_of(run.model, dataset, run.index)
        self.index: HierarchicalIndex = corpus.index
        self.scorer = LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, TorchRunner(run.model))
        self.rank = run.recipe.schema.rank
        self.widths = list(run.recipe.search.widths[: run.model.layers - 1])
        self._order = np.argsort(self.index.item_ids)

    def find(self, users: Encoded, allowed: ItemFilter | None, k: int) -> SearchResult:
        """The search at the recipe's widths, exhaustive for a flat model."""
        return search(self.index, self.scorer, users, self.widths, k, self.rank, allowed, adapt=False)

    def positions(self, item_ids: np.ndarray) -> np.ndarray:
        """Positions of item ids of any shape, all of which this run's corpus has."""
        place = np.searchsorted(self.index.item_ids, item_ids, sorter=self._order)
        found: np.ndarray = self._order[np.minimum(place, self.index.items - 1)]
        return found


def rerank(found: SearchResult, depth: int, ranker: Stage, users: Encoded) -> SearchResult:
    """The first ``depth`` items that were ``found`` for each of B users, ordered by a flat ``ranker``.

    Equal scores stay in the order of the retrieval. The trace has a layer more, of the items that were scored. Raises
    SchemaError for a ranker with an index: its items' scores need those of their nodes.
    """
    if ranker.index.layers != 1:
        raise SchemaError(f"a ranker of {ranker.index.layers} layers, expected one: a flat model")
    ids, valid = found.item_ids[:, :depth], np.minimum(found.valid, depth)
    there = np.arange(ids.shape[1]) < valid[:, None]
    nodes = np.where(there, ranker.positions(ids), 0)
    state = ranker.scorer.open(users)
    _, logits = ranker.scorer.score(state, 1, nodes, np.zeros((*nodes.shape, 0), np.float32))
    keys = np.where(there, rank_scores(logits, ranker.rank), -np.inf).astype(np.float32)
    order = np.stack([falling(row) for row in keys])
    probabilities = np.take_along_axis(sigmoid(logits), order[:, :, None], axis=1)
    probabilities[~there] = 0  # what is not there came last
    trace = LayerTrace(valid.astype(np.int64), valid.astype(np.int64), nodes, 0)
    return replace(
        found,
        item_ids=np.take_along_axis(ids, order, axis=1),
        probabilities=probabilities,
        rank_score=np.take_along_axis(keys, order, axis=1),
        valid=valid.astype(np.int32),
        positions=np.where(there, np.take_along_axis(nodes, order, axis=1), 0),
        layers=(*found.layers, trace),
    )


@dataclass(frozen=True)
class Stages:
    """The three runs of one seed."""

    retriever: Stage
    ranker: Stage
    ours: Stage

    def answers(self, requests: Requests, part: slice, depths: Sequence[int]) -> dict[str, SearchResult]:
        """Row id -> what it finds for the requests ``part``."""
        users, _, allowed = requests.asked_of(part, self.retriever.index)
        found = self.retriever.find(users, allowed, max(depths))
        answers = {RETRIEVER: found}
        answers |= {cascade_id(depth): rerank(found, depth, self.ranker, users) for depth in depths}
        for name, stage in ((RANKER, self.ranker), (OURS, self.ours)):
            users, _, allowed = requests.asked_of(part, stage.index)
            answers[name] = stage.find(users, allowed, max(KS))
        return answers

    def askers(self, requests: Requests, depths: Sequence[int]) -> dict[str, Ask]:
        """Row id -> request number -> its answer, each by itself, as it is timed."""

        def alone(stage: Stage, k: int) -> Ask:
            def ask(number: int) -> SearchResult:
                users, _, allowed = requests.asked_of(slice(number, number + 1), stage.index)
                return stage.find(users, allowed, k)

            return ask

        def behind(depth: int) -> Ask:
            retrieve = alone(self.retriever, depth)

            def ask(number: int) -> SearchResult:
                users = Encoded(
                    requests.users.dense[number : number + 1], requests.users.ids[number : number + 1]
                )
                return rerank(retrieve(number), depth, self.ranker, users)

            return ask

        rows = {RETRIEVER: alone(self.retriever, max(KS))}
        rows |= {cascade_id(depth): behind(depth) for depth in depths}
        return rows | {RANKER: alone(self.ranker, max(KS)), OURS: alone(self.ours, max(KS))}


def cascade_id(depth: int) -> str:
    """The row of a cascade."""
    return f"{RETRIEVER}+{RANKER}@{depth}"


def quality(
    stages: Stages, dataset: Dataset, requests: Requests, depths: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Row id -> Recall@K and NDCG@10 of all requests."""
    wanted = [dataset.item_keys[rows] for rows in requests.wanted]
    found: dict[str, list[SearchResult]] = {}
    starts = range(0, len(requests), USERS_PER_CALL)
    for start in tqdm(starts, desc=f"cascade, seed {dataset.seed}", leave=False):
        part = slice(start, start + USERS_PER_CALL)
        for name, answer in stages.answers(requests, part, depths).items():
            found.setdefault(name, []).append(replace(answer, layers=()))
    figures = {}
    for name, answers in found.items():
        ids, valid = np.concatenate([a.item_ids for a in answers]), np.concatenate([a.valid for a in answers])
        figures[name] = {f"recall@{k}": recall_at(ids, valid, wanted, k) for k in KS}
        figures[name]["ndcg@10"] = ndcg_at(ids, valid, wanted, 10)
    return figures


def run_cascade(options: TableOptions, depths: Sequence[int] = DEPTHS) -> Path:
    """Train what Table 1 has not trained yet, measure, write <results>/cascade-<data>.{json,md,png}; returns the page.

    Raises SchemaError for options that name nothing known and for depths below 100, HsnnError when a worker failed.
    """
    from .cascade_report import draw, page

    if not depths or min(depths) < max(KS):
        raise SchemaError(f"--depth: got {list(depths)}, expected numbers of items, each at least {max(KS)}")
    depths = sorted(set(depths))
    base, rows, seeds, jobs = table_jobs(replace(options, rows=ROWS))
    jobs = {(name, seed): job for (name, seed), job in jobs.items() if name in (RETRIEVER, RANKER, OURS)}
    failures = run_jobs(list(jobs.values()), options.parallel)
    if failures:
        failed = ", ".join(failure.job.label for failure in failures)
        raise HsnnError(
            f"bench: {len(failures)} workers failed ({failed}); the same command tries them again"
        )
    torch.set_num_threads(1)
    dataset = load_data(base)
    by_seed: dict[str, dict[int, dict[str, float]]] = {}
    cost: dict[str, Any] = {}
    asked = 0
    for seed in seeds:
        of_seed = replace(dataset, seed=seed)
        requests = evaluation_requests(of_seed, "test", base.search.candidates, base.search.requests)
        stages = Stages(*(Stage(jobs[name, seed].folder, of_seed) for name in (RETRIEVER, RANKER, OURS)))
        for name, figures in quality(stages, of_seed, requests, depths).items():
            by_seed.setdefault(name, {})[seed] = figures
        if not cost:
            asked = len(requests)
            cost = interleave(stages.askers(requests, depths), min(COST_REQUESTS, asked), progress=True)
    summaries = {name: by_figure(runs) for name, runs in by_seed.items()}
    labels = {row.id: row.label for row in rows}
    report = {
        "data": base.name, "data_notes": list(dataset.notes), "seeds": list(seeds), "requests": asked,
        "items": len(dataset.item_keys), "leave_one_out": base.data.get("adapter") == "s3rec",
        "rows": [_row(name, summaries, labels, cost) for name in summaries],
    }  # fmt: skip
    command = options.command_of("cascade") + _depths(depths)
    stem = options.results / f"cascade-{base.name}"
    return write_report(without_nan(report), stem, command, dataset.simulated, page, draw)


def _depths(depths: Sequence[int]) -> str:
    return "" if tuple(depths) == DEPTHS else "".join(f" --depth {depth}" for depth in depths)


def _row(
    name: str,
    summaries: Mapping[str, Mapping[str, Summary]],
    labels: Mapping[str, str],
    cost: Mapping[str, Any],
) -> dict[str, Any]:
    depth = int(name.partition("@")[2] or 0)
    label = f"{labels[RETRIEVER]}, first {depth:,} ordered by {labels[RANKER]}" if depth else labels[name]
    over = {
        figure: relative_change(summaries[OURS].get(figure), summary)
        for figure, summary in summaries[name].items()
        if name != OURS
    }
    return {
        "id": name, "label": label, "depth": depth or None,
        "figures": {figure: asdict(summary) for figure, summary in summaries[name].items()},
        "hsnn_over": {figure: asdict(change) for figure, change in over.items() if change is not None},
        "cost": asdict(cost[name]),
    }  # fmt: skip
