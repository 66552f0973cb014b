"""External baselines beside ours on one data set: the same requests, candidates, features and tuning budget.

Every (method, seed) is kept under runs/bench/<data>/ as soon as it is done, under a digest of all that it depends
on; a call that was interrupted goes on there, and one whose parameters changed runs those anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hsnn_cli.commands_training import load_data
from hsnn_cli.provenance import commit, machine
from hsnn_core.errors import DataError, HsnnError
from hsnn_core.features import Encoded
from hsnn_train.checkpoint import Run, write_json
from hsnn_train.data.dataset import Dataset
from hsnn_train.data.requests import evaluation_requests
from hsnn_train.recipe import Recipe, load_recipe
from hsnn_train.runner import TorchRunner
from hsnn_train.trainer import Interrupted

from . import ours
from .faiss_twin import Queries, approximate, exhaustive
from .figures import by_figure, relative_change
from .implicit_models import MODELS
from .published import PUBLISHED
from .requests import Requests, load_requests, measure
from .spaces import METHODS, method, methods_for
from .tuning import RESULTS, tuned

DEPTHS = (10, 20, 50, 100, 500)
MEASURED = (*(f"recall@{k}" for k in DEPTHS), "ndcg@10", "ndcg@20")
TWIN_K = 100  # what the Faiss twin returns
TWINS = ("ivf", "hnsw")
KEPT_AS = 2  # what a file that is kept means: since 2 every seed has requests of its own
ITEM_CHUNK = 4096
LABELS = {
    "popularity": "popularity", "recent": "recent popularity", "item_knn": "item-KNN (implicit)",
    "lists": "neighbour lists alone",
    "als": "ALS (implicit)", "bpr": "BPR (implicit)",
    "two_tower": "two-tower, exhaustive", "two_tower_ivf": "two-tower, Faiss IVF",
    "two_tower_hnsw": "two-tower, Faiss HNSW", "mol": "mixture of logits, exhaustive", "flat": "MoNN flat S",
    "hsnn": "HSNN",
}  # fmt: skip


def run_baselines(
    data: str,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (1, 2, 3),
    requests: int | None = 5000,
    candidates: str | None = None,
    work: Path = Path("runs/bench"),
    results: Path = RESULTS,
    command: str = "",
) -> dict[str, Any]:
    """Train and evaluate methods on the test split; returns the report, and writes it as baselines-<data>.json, .md
    and .png into ``results``.

    Args:
        data: a shipped recipe's name or a YAML file.
        methods: names of `spaces.METHODS`, None for those that the requests allow; parameters are those of
            tuned-<data>.json, else the space's start, for ours the recipe's own.
        seeds: of training, and of the choice of requests, which a table's rows of a seed answer as well; a method
            without randomness runs on each choice.
        requests: test requests at most, the same for all methods of a seed; None: all.
        candidates: as `search.candidates` of a recipe; None: the recipe's.
        work: folder of what is kept between calls. command: what the report says made it.

    A method that fails (a preset that is not there, a training that diverged) is reported as missing. Raises
    DataError for an unknown method and for a test split without positives, SchemaError for the recipe.
    """
    from .baselines_report import write_report  # draws with matplotlib, which takes a while to load

    recipe = load_recipe(data)
    candidates = candidates or recipe.search.candidates
    methods = methods_for(candidates) if methods is None else methods
    for name in methods:
        method(name)
    dataset = load_data(recipe)
    best = tuned(recipe.name, results)
    bench = _Bench(recipe, dataset, candidates, requests, work / recipe.name / "baselines")
    done: dict[str, dict[int, dict[str, Any]]] = {}
    missing: list[dict[str, Any]] = []
    jobs = [(name, seed) for name in methods for seed in seeds]
    with tqdm(jobs, desc=f"baselines {recipe.name}", unit="run") as bar:
        for name, seed in bar:
            bar.set_postfix_str(f"{name}, seed {seed}")
            # Ours have no start of their own: they begin as their recipe, which may be tuned already.
            params = best[name]["params"] if name in best else dict(METHODS[name].start)
            try:
                for row, entry in bench.results(name, params, seed).items():
                    done.setdefault(row, {})[seed] = entry
            except Interrupted:
                raise
            except HsnnError as error:
                missing.append({"id": name, "seed": seed, "reason": str(error)})
    first = bench.requests(seeds[0])
    report = {
        "data": recipe.name, "command": command or f"hsnn bench baselines --data {data}", "seeds": list(seeds),
        "requests": len(first), "candidates": candidates, "items": len(dataset.item_keys),
        "single": all(len(rows) == 1 for rows in first.wanted),
        "simulated": dataset.simulated, "data_notes": list(dataset.notes), "commit": commit(),
        "machine": machine(), "date": date.today().isoformat(), "rows": _rows(done, best),
        "published": [asdict(figures) for figures in PUBLISHED.get(recipe.name, ())], "missing": missing,
    }  # fmt: skip
    write_report(report, results)
    return report


def _rows(
    done: Mapping[str, Mapping[int, Mapping[str, Any]]], best: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The report's rows: mean ± deviation over seeds, and Recall@100 against the exhaustive two-tower."""
    summaries = {
        row: by_figure({seed: entry["figures"] for seed, entry in by_seed.items()})
        for row, by_seed in done.items()
    }
    reference = summaries.get("two_tower", {}).get("recall@100")
    rows = []
    for row in (row for row in LABELS if row in done):
        figures, first = summaries[row], next(iter(done[row].values()))
        against = None if row == "two_tower" else relative_change(figures.get("recall@100"), reference)
        rows.append(
            {
                "id": row, "label": LABELS[row], "seeds": sorted(done[row]),
                "figures": {name: asdict(summary) for name, summary in figures.items()},
                "params": first["params"], "tuned": first["method"] in best,
                "settings": {seed: entry["settings"] for seed, entry in done[row].items()},
                "against_two_tower": None if against is None else asdict(against),
            }
        )  # fmt: skip
    return rows


class _Bench:
    """The methods of one data set, with what is kept between calls in ``folder``."""

    def __init__(
        self, recipe: Recipe, dataset: Dataset, candidates: str, limit: int | None, folder: Path
    ) -> None:
        self.dataset, self.candidates, self.folder, self.most = dataset, candidates, folder, limit
        self._requests: dict[int, Requests] = {}
        self.limit = limit if limit is not None else len(self.requests(dataset.seed))
        self.recipe = ours.changed(
            recipe,
            {"search.requests": self.limit, "search.candidates": candidates,
             "search.max_k": min(max(DEPTHS), len(dataset.item_keys))},
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)

    def of_seed(self, seed: int) -> Dataset:
        """The data set with the seed's choice of requests, as a table's rows of that seed have it."""
        return replace(self.dataset, seed=seed)

    def requests(self, seed: int) -> Requests:
        """The test requests of a seed."""
        if seed not in self._requests:
            self._requests[seed] = load_requests(self.of_seed(seed), "test", self.candidates, self.most)
        return self._requests[seed]

    def results(self, name: str, params: Mapping[str, Any], seed: int) -> dict[str, dict[str, Any]]:
        """Rows of a method with one seed (a two-tower has three), by id; from the file when it is there."""
        changes = {**METHODS[name].recipe, **params, "train.seed": seed} if METHODS[name].ours else {}
        recipe = ours.variant(self.recipe, changes)
        if METHODS[name].ours:
            params = {**self.recipe.changes_for(recipe.model.layers), **params}
        whole = recipe.to_dict()
        used = (
            whole if METHODS[name].ours else {key: whole[key] for key in ("schema", "data", "split", "base")}
        )
        said = [KEPT_AS, name, dict(params), seed, used, self.candidates, self.limit]
        digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:10]
        path = self.folder / f"{name}-seed{seed}-{digest}.json"
        if path.is_file():
            kept: dict[str, dict[str, Any]] = json.loads(path.read_text())
            return kept
        if not METHODS[name].ours:
            rows = {name: self._implicit(name, params, seed)}
        else:
            rows = self._ours(name, recipe, path.with_suffix(""), seed)
        for entry in rows.values():
            entry |= {"method": name, "params": dict(params), "commit": commit(), "machine": machine()}
        write_json(path, rows)
        return rows

    def _implicit(self, name: str, params: Mapping[str, Any], seed: int) -> dict[str, Any]:
        model = MODELS[name]().fit(self.dataset, params, seed)
        requests = self.requests(seed)
        found, valid = model.recommend(requests, max(DEPTHS))
        names = tuple(figure for figure in MEASURED if int(figure.split("@")[1]) <= found.shape[1])
        return {"figures": measure(found, valid, requests.wanted, names), "settings": {}}

    def _ours(self, name: str, recipe: Recipe, folder: Path, seed: int) -> dict[str, dict[str, Any]]:
        run = ours.trained(recipe, self.dataset, folder)
        report = ours.retrieved(run, recipe, self.of_seed(seed), "test", progress=True)
        figures = {key: report["search"][key] for key in MEASURED if key in report["search"]}
        own = {
            "search_recall@100": report["search_recall"].get("@100"), "scored_share": report["scored_share"],
            "microseconds": 1e6 * report["seconds_per_request"],
        }  # fmt: skip
        figures |= {key: value for key, value in own.items() if value is not None}
        rows = {name: {"figures": figures, "settings": {"widths": report["widths"]}}}
        if name == "two_tower" and np.count_nonzero(self.dataset.schema.rank) == 1:
            rows |= self._twins(run, figures, seed)
        return rows

    def _twins(self, run: Run, searched: Mapping[str, float], seed: int) -> dict[str, dict[str, Any]]:
        """The Faiss rows of a trained two-tower. Raises HsnnError when the inner products of its vectors do not rank
        as its search does."""
        requests, dataset = self.requests(seed), self.of_seed(seed)
        k = min(TWIN_K, requests.items)
        items = _item_vectors(run, dataset)
        queries = self._queries(run, dataset, "test")
        exact = exhaustive(items, queries, k)
        names = tuple(figure for figure in MEASURED if int(figure.split("@")[1]) <= k)
        figures = measure(exact.found, exact.valid, requests.wanted, names)
        apart = max(abs(figures[key] - searched[key]) for key in names)
        if apart > 1e-3:
            raise HsnnError(
                f"two-tower: inner products of its vectors and its search differ by {apart:.4f} in a figure; is its "
                "OverArch a dot product?"
            )
        tuning = self._queries(run, dataset, "valid")
        rows = {}
        for kind in TWINS:
            twin = approximate(kind, items, tuning, queries, k)
            rows[f"two_tower_{kind}"] = {
                "figures": measure(twin.found, twin.valid, requests.wanted, names)
                | {"search_recall@100": twin.recall, "scored_share": twin.scored_share,
                   "microseconds": twin.microseconds, "exhaustive_microseconds": exact.microseconds},
                "settings": twin.settings,
            }  # fmt: skip
        return rows

    def _queries(self, run: Run, dataset: Dataset, split: str) -> Queries:
        found = evaluation_requests(dataset, split, self.candidates, self.limit)
        if not len(found):
            raise DataError(f"no request in {split} to tune Faiss on; change the recipe's split:")
        runner = TorchRunner(run.model)
        vectors = [
            runner.user_tower(Encoded(found.users.dense[part], found.users.ids[part]).tensors("user"))[
                "user_l1"
            ]
            for part in (slice(s, s + ITEM_CHUNK) for s in range(0, len(found), ITEM_CHUNK))
        ]
        by_task = np.concatenate(vectors).reshape(len(found), len(dataset.schema.tasks), -1)  # (R, T, d)
        return Queries(np.ascontiguousarray(by_task[:, int(np.argmax(dataset.schema.rank))]), found.eligible)


def _item_vectors(run: Run, dataset: Dataset) -> np.ndarray:
    """(V, d) float32, the item tower's output of a model of one layer."""
    runner = TorchRunner(run.model)
    parts = (slice(start, start + ITEM_CHUNK) for start in range(0, len(dataset.items), ITEM_CHUNK))
    return np.concatenate(
        [
            runner.item_tower(Encoded(dataset.items.dense[p], dataset.items.ids[p]).tensors("item"))[
                "item_l1"
            ]
            for p in parts
        ]
    )
