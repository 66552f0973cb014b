"""`hsnn bench table1|table2|table3`: train a table's rows over seeds, measure, and write the report.

    rows -> jobs (row x seed) -> workers -> figures -> cost and widths (Table 1) -> docs/results/<table>-<data>.*

What is trained stays in the work folder, so the same command goes on where it was stopped, and tables share rows.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hsnn_cli.commands_training import load_data, with_overrides
from hsnn_cli.provenance import commit, cores, machine
from hsnn_core.errors import HsnnError, SchemaError
from hsnn_core.files import write_bytes
from hsnn_train.checkpoint import without_nan, write_json
from hsnn_train.data.dataset import Dataset
from hsnn_train.device import find_device
from hsnn_train.recipe import Recipe, load_recipe

from . import plots
from .cost import Cost, measure
from .figures import Summary, by_figure, gap_closure, read_metrics, relative_change
from .jobs import CHECKPOINT, Job
from .model_flops import model_flops, small_flops
from .ours import changed, variant
from .report import render
from .rows import Row, select, table_rows
from .widths import sweep
from .workers import Failure, run_jobs

COST_REQUESTS = 200
SWEEP_REQUESTS = 200
RECALL = "recall@100"
COLUMNS = [("recall@10", "Recall@10"), ("recall@50", "Recall@50"), ("recall@100", "Recall@100")]
#: What tells an index that is learnt well from another.
INDEX_COLUMNS = [
    ("search_recall@100", "search recall@100"), ("scored_share", "items scored"),
    ("occupancy", "codewords used"), ("largest_node", "largest node × I"),
]  # fmt: skip
#: What is customarily reported on a data set, by its adapter; on leave-one-out Recall@10 is the hit rate HR@10.
CUSTOMARY = {
    "s3rec": [("recall@10", "HR@10"), ("ndcg@10", "NDCG@10"), *COLUMNS[1:]],
    "gowalla": [("recall@10", "Recall@10"), ("recall@20", "Recall@20"), ("ndcg@20", "NDCG@20"), *COLUMNS[1:]],
    "globo": [*COLUMNS, ("recall@500", "Recall@500")],
}


@dataclass(frozen=True)
class TableOptions:
    """What `hsnn bench table…` was asked for.

    Attributes:
        table: "table1", "table2" or "table3".
        data: a shipped recipe's name or a YAML file.
        seeds: how many, from the recipe's own on.
        requests: evaluation requests; None for the recipe's.
        rows: comma-separated rows or blocks; None for all.
        jobs: workers at a time; None for one per usable core.
        overrides: SECTION.KEY=VALUE, on the recipe that all rows start from.
        device: where workers train and evaluate: "cpu", "cuda", "cuda:N". Cost is always measured on the CPU.
        train: whether to train what is missing; without it the report is of what is there.
        results, work: folders of the report and of the runs.
    """

    table: str
    data: str
    seeds: int = 3
    requests: int | None = None
    rows: str | None = None
    jobs: int | None = None
    overrides: Sequence[str] = ()
    device: str = "cpu"
    train: bool = True
    results: Path = Path("docs/results")
    work: Path = Path("runs/bench")

    @property
    def command(self) -> str:
        """The command line that makes this report, without its folders."""
        return self.command_of(self.table)

    def command_of(self, kind: str) -> str:
        """The command line of `hsnn bench KIND` with these options, without its folders."""
        text = f"hsnn bench {kind} --data {self.data}"
        text += "" if self.seeds == 3 else f" --seeds {self.seeds}"
        text += "" if self.requests is None else f" --requests {self.requests}"
        text += "" if self.rows is None else f" --rows {self.rows}"
        return text + "".join(f" --set {shlex.quote(override)}" for override in self.overrides)

    @property
    def parallel(self) -> int:
        """Workers at a time. Raises SchemaError for more than there are cores."""
        usable = cores()
        if self.jobs is None:
            return usable
        if not 1 <= self.jobs <= usable:
            raise SchemaError(
                f"--jobs: got {self.jobs}, expected 1 to {usable}: a worker needs a core, and {usable} are usable"
            )
        return self.jobs


@dataclass
class Result:
    """A row with what was found: the figures of its finished seeds, and the first run of them whose model is there."""

    row: Row
    recipe: Recipe
    runs: dict[int, dict[str, float]] = field(default_factory=dict)
    folder: Path | None = None
    figures: dict[str, Summary] = field(default_factory=dict)


def run_table(options: TableOptions) -> dict[str, Any]:
    """Train, measure and write <results>/<table>-<data>.{json,md,png}; returns the report.

    Raises SchemaError for options that name nothing known, and HsnnError at the end when rows are missing because
    their workers failed; the report of the others is written before.
    """
    find_device(options.device)
    base, rows, seeds, jobs = table_jobs(options)
    parallel = options.parallel
    ready = len({job.folder for job in jobs.values() if job.record() is not None})
    print(
        f"{options.table} on {base.name}: {len(rows)} rows, seeds {seeds}; "
        f"{len({job.folder for job in jobs.values()})} models, {ready} of them are done"
    )
    try:
        failures = run_jobs(list(jobs.values()), parallel, device=options.device) if options.train else []
    except KeyboardInterrupt:
        print(f"\nthe workers have left their checkpoints in {options.work}; the same command goes on")
        raise
    report = _report(options, base, rows, seeds, jobs, failures)
    path = write_report(report, options.results)
    print(f"\n{path.with_suffix('.md').read_text()}\nreport: {path.with_suffix('.md')}")
    if failures:
        labels = ", ".join(failure.job.label for failure in failures)
        raise HsnnError(
            f"bench: {len(failures)} workers failed ({labels}); the report says what is missing; the same command "
            "tries them again"
        )
    return report


def table_jobs(
    options: TableOptions,
) -> tuple[Recipe, list[Row], list[int], dict[tuple[str, int], Job]]:
    """The recipe that all rows start from, the rows, the seeds, and the job of every (row id, seed). Raises SchemaError
    for options that name nothing known."""
    base = _base(options)
    rows = select(table_rows(options.table, base), options.rows)
    seeds = [base.train.seed + i for i in range(options.seeds)]
    return (
        base,
        rows,
        seeds,
        {(row.id, seed): _job(row, base, seed, options.work) for seed in seeds for row in rows},
    )


def _base(options: TableOptions) -> Recipe:
    """The data set's recipe with what the command line changes. Raises SchemaError."""
    if options.seeds < 1:
        raise SchemaError(f"--seeds: got {options.seeds}, expected at least 1")
    recipe = with_overrides(load_recipe(options.data), list(options.overrides))
    return recipe if options.requests is None else changed(recipe, {"search.requests": options.requests})


def _job(row: Row, base: Recipe, seed: int, work: Path) -> Job:
    recipe = variant(base, {**row.overrides, "train.seed": seed})
    widths = list(
        recipe.search.widths[: len(recipe.model.layers) - 1]
    )  # widths that no layer reads change nothing
    return Job(changed(recipe, {"search.widths": widths}), work, f"{row.id} s{seed}")


def _report(
    options: TableOptions,
    base: Recipe,
    rows: Sequence[Row],
    seeds: Sequence[int],
    jobs: dict[tuple[str, int], Job],
    failures: Sequence[Failure],
) -> dict[str, Any]:
    """Everything that the page says, as plain JSON values."""
    results, missing, trained_at, trained_on = collect(rows, seeds, jobs, failures)
    dataset, device = load_data(base), find_device(options.device)
    table1 = options.table == "table1"
    runs = {name: result.folder for name, result in results.items() if result.folder is not None}
    cost = measure(runs, dataset, min(COST_REQUESTS, base.search.requests)) if table1 else {}
    sweeps: dict[str, Any] = {}
    for name, folder in runs.items() if table1 else ():
        if len(results[name].recipe.model.layers) > 1:
            sweeps[name] = sweep(folder, dataset, min(SWEEP_REQUESTS, base.search.requests), device)
    columns = CUSTOMARY.get(base.data.get("adapter", ""), COLUMNS)
    if not table1:
        columns = [*columns, *INDEX_COLUMNS]
    present = {name for result in results.values() for name in result.figures}
    report = {
        "table": options.table,
        "data": base.name,
        "command": options.command,
        "simulated": dataset.simulated,
        "data_notes": list(dataset.notes),
        "seeds": list(seeds),
        "requests": _asked(jobs, dataset, base),
        "tasks": [task.name for task in base.schema.tasks],
        "columns": [list(column) for column in columns if column[0] in present],
        "machine": machine(),
        "commit": commit(),
        "trained_at": trained_at,
        "trained_on": trained_on,
        "date": time.strftime("%Y-%m-%d"),
        "plots": {},
        "rows": [describe(result, results, cost) for result in results.values()],
        "missing": missing,
        "widths": {name: points for name, points in sweeps.items() if points},
    }
    plain: dict[str, Any] = json.loads(json.dumps(without_nan(report)))
    return plain


def collect(
    rows: Sequence[Row],
    seeds: Sequence[int],
    jobs: dict[tuple[str, int], Job],
    failures: Sequence[Failure] = (),
) -> tuple[dict[str, Result], list[dict[str, Any]], list[str], list[str]]:
    """Row id -> result, what is missing and why, and the commits and the devices that the models were trained at."""
    failed = {failure.job.folder: failure.tail.splitlines() for failure in failures}
    results, missing, commits, devices = {}, [], set(), set()
    for row in rows:
        result = Result(row, jobs[row.id, seeds[0]].recipe)
        for seed in seeds:
            job = jobs[row.id, seed]
            record, metrics = job.record(), job.metrics()
            if record is None or metrics is None:
                reason = (failed.get(job.folder) or ["not trained yet"])[-1]
                missing.append({"row": row.id, "label": row.label, "seed": seed, "reason": reason})
                continue
            result.runs[seed] = read_metrics(metrics)
            if result.folder is None and (job.folder / CHECKPOINT).exists():
                result.folder = job.folder
            commits.add(record["commit"])
            devices.add(record.get("device", "CPU"))
        result.figures = by_figure(result.runs)
        results[row.id] = result
    return results, missing, sorted(commits), sorted(devices)


def describe(result: Result, results: dict[str, Result], cost: dict[str, Cost]) -> dict[str, Any]:
    """A row of the report."""
    row, figures = result.row, result.figures
    reference = results[row.reference].figures if row.reference in results else {}
    ebr, xl = (results[name].figures.get(RECALL) if name in results else None for name in ("ebr", "xl"))
    flops, small, own = model_flops(result.recipe), small_flops(result.recipe), cost.get(row.id)
    tasks = [task.name for task in result.recipe.schema.tasks]
    return {
        "id": row.id,
        "label": row.label,
        "block": row.block,
        "reference": row.reference,
        "layers": list(result.recipe.model.layers),
        "overrides": dict(row.overrides),
        "paper": asdict(row.paper),
        "seeds": list(result.runs),
        "figures": {name: asdict(summary) for name, summary in figures.items()},
        "ne_change": {
            task: _plain(relative_change(figures.get(f"ne.{task}"), reference.get(f"ne.{task}")))
            for task in tasks
            if row.id != row.reference
        },
        "recall_vs_xs": _plain(
            relative_change(figures.get(RECALL), reference.get(RECALL)) if row.id != row.reference else None
        ),
        "recall_vs_ebr": _plain(relative_change(figures.get(RECALL), ebr) if row.id != "ebr" else None),
        "gap_closure": gap_closure(figures.get(RECALL), ebr, xl),
        "flops": {
            "single": flops.single,
            "single_ratio": flops.single / small.single,
            "pair": flops.pair,
            "pair_ratio": flops.pair / small.pair,
            "request": None if own is None else flops.request(own.candidates),
        },
        "cost": None
        if own is None
        else {**asdict(own), "of_xs": _ratio(own, cost.get("xs")), "of_xl": _ratio(own, cost.get("xl"))},
    }


def _ratio(cost: Cost, other: Cost | None) -> float | None:
    return None if other is None else cost.median_ms / other.median_ms


def _plain(value: Any) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def _asked(jobs: dict[tuple[str, int], Job], dataset: Dataset, base: Recipe) -> int:
    """Evaluation requests as the first finished run counted them; what was asked for when there is none."""
    for job in jobs.values():
        metrics = job.metrics()
        if metrics is not None:
            return int(metrics["retrieval"]["requests"])
    return base.search.requests


def write_report(report: dict[str, Any], results: Path) -> Path:
    """Write plots, Markdown and JSON; returns the JSON's path."""
    results.mkdir(parents=True, exist_ok=True)
    stem = f"{report['table']}-{report['data']}"
    report["plots"] = {}
    if report["table"] == "table1":
        if any(row["cost"] for row in report["rows"]):
            drawn = plots.recall_against_cost(report, results / f"{stem}.png")
            report["plots"][drawn.name] = "Recall@100 against cost"
        if report["widths"]:
            title = f"{report['data']}{', simulated' if report['simulated'] else ''}"
            drawn = plots.recall_against_share(report["widths"], title, results / f"{stem}-widths.png")
            report["plots"][drawn.name] = "recall against the share of items scored"
    elif any(row["seeds"] for row in report["rows"]):
        drawn = plots.ne_bars(report, results / f"{stem}.png")
        report["plots"][drawn.name] = "NE of the rows"
    path = results / f"{stem}.json"
    write_json(path, report)
    write_bytes(path.with_suffix(".md"), render(report).encode())
    return path
