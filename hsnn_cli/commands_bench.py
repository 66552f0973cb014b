"""hsnn bench: the paper's tables on a data set, external baselines, tuning; what serving costs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import (
    commands_bench_cost,
    commands_bench_failures,
    commands_bench_fuzz,
    commands_bench_live,
    commands_bench_operations,
    commands_bench_rollouts,
    commands_bench_serving,
)

FORMAT = argparse.RawDescriptionHelpFormatter

TABLES = {
    "table1": "architectures: two towers and MoNNs flat, EBR, HSNNs of two and three layers",
    "table2": "index learning: k-means (SIL), EM, LTI",
    "table3": "what LTI consists of: without temperature schedule, warm-up, balance",
}
TABLE_EPILOG = """examples:
  hsnn bench {table} --data beauty
  hsnn bench {table} --data beauty --seeds 1 --rows {rows}       a first look: some rows, one seed
  hsnn bench {table} --data globo --requests 300 --jobs 1
  hsnn bench {table} --data synthetic --set train.max_steps=200  every row with a change of the recipe

Ctrl-C stops the workers with their checkpoints, and the same command goes on. Models that are trained are kept
in --work and shared by the tables; those of a recipe that changed are trained anew, unless only
widths, k or requests changed, which are evaluated anew. A worker that fails leaves the others alone, and the
report says what is missing.
"""
SOME_ROWS = {"table1": "xs,ebr,recipe", "table2": "ladder", "table3": "no-balance"}


def add_commands(commands: Any) -> None:
    """Register bench."""
    bench = commands.add_parser(
        "bench", help="the paper's tables on a data set, baselines, tuning; cost of serving", formatter_class=FORMAT,
        description="The paper's Tables 1 to 3 on a data set, the comparison with external baselines, and the tuning "
        "that all methods share; what a request costs in Triton. Writes docs/results; needs the extra `bench`.",
        epilog="examples:\n  hsnn bench table1 --data beauty\n  hsnn bench baselines --data beauty\n"
        "  hsnn bench tune --data beauty --method two_tower --method als\n  hsnn bench serving runs/ads",
    )  # fmt: skip
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="WHAT")
    commands_bench_cost.add_kinds(kinds)
    for name, text in TABLES.items():
        table = kinds.add_parser(
            name, help=text, formatter_class=FORMAT,
            description=f"The paper's {name.replace('table', 'Table ')}, {text}: mean and standard deviation "
            "over seeds beside what the paper prints.",
            epilog=TABLE_EPILOG.format(table=name, rows=SOME_ROWS[name]),
        )  # fmt: skip
        _data(table)
        _seeds_and_requests(table)
        table.add_argument("--rows", metavar="A,B", help="only these rows, or blocks of rows (ladder, recipe); an "
                           "unknown name lists the known ones")  # fmt: skip
        table.add_argument("--device", default="cpu", metavar="D", help="where workers train: cpu, cuda or cuda:N; "
                           "cost is always measured on the CPU (default: %(default)s)")  # fmt: skip
        table.add_argument("--report-only", action="store_true",
                           help="train nothing: a report of the models that --work has")  # fmt: skip
        _models_and_folders(table)
        table.set_defaults(run_command=run_table)

    overview = kinds.add_parser(
        "overview", help="the tables of all data sets on one page, beside the targets", formatter_class=FORMAT,
        description="Reads what the tables and baselines left in docs/results and writes overview.{md,png} there; "
        "trains and measures nothing.",
        epilog="example:\n  hsnn bench overview",
    )  # fmt: skip
    overview.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR",
                          help="where the reports are (default: %(default)s)")  # fmt: skip
    overview.set_defaults(run_command=run_overview)

    cascade = kinds.add_parser(
        "cascade", help="HSNN beside two towers + ANN with a ranker behind them", formatter_class=FORMAT,
        description="HSNN beside the usual cascade: two towers under an index retrieve N items, a MoNN Small that also "
        "reads the crossings of user and item orders them. Recall, and milliseconds per request. Trains Table 1's rows "
        "ebr, small and recipe where --work lacks them; writes docs/results/cascade-<data>.{json,md,png}.",
        epilog="examples:\n  hsnn bench cascade --data beauty\n"
        "  hsnn bench cascade --data ml-100k --seeds 1 --depth 100 --depth 400",
    )  # fmt: skip
    _data(cascade)
    _seeds_and_requests(cascade)
    cascade.add_argument("--depth", type=int, action="append", default=[], metavar="N", dest="depths",
                         help="items that are retrieved and ordered, at least 100; may be repeated (default: 100, 200, "
                         "500, 1000, 2000, 4000, those that the corpus has)")  # fmt: skip
    _models_and_folders(cascade)
    cascade.set_defaults(run_command=run_cascade)

    baselines = kinds.add_parser(
        "baselines", help="ours beside item-KNN, item lists, ALS, BPR, two towers with Faiss and published figures",
        formatter_class=FORMAT,
        description="External baselines and our own models on the same test requests, with the parameters that "
        "`hsnn bench tune` found; writes docs/results/baselines-<data>.{json,md,png}.",
        epilog="examples:\n  hsnn bench baselines --data beauty\n"
        "  hsnn bench baselines --data beauty --method als --method two_tower --seeds 1",
    )  # fmt: skip
    _data(baselines)
    _methods(baselines)
    baselines.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="seeds 1 to N (default: %(default)s)"
    )
    baselines.add_argument("--requests", type=int, default=5000, metavar="N",
                           help="test requests at most; 0 for all (default: %(default)s)")  # fmt: skip
    baselines.set_defaults(run_command=run_baselines)

    tune = kinds.add_parser(
        "tune", help="tune methods on validation requests, the same budget for each", formatter_class=FORMAT,
        description="Search the parameters of methods with Optuna, on the validation split alone; goes on with a study "
        "that is there, and keeps the best in docs/results/tuned-<data>.json.",
        epilog="examples:\n  hsnn bench tune --data beauty                       all methods\n"
        "  hsnn bench tune --data beauty --method als --trials 30 --minutes 60",
    )  # fmt: skip
    _data(tune)
    _methods(tune)
    tune.add_argument("--trials", type=int, default=12, metavar="N", help="per method (default: %(default)s)")
    tune.add_argument(
        "--minutes", type=float, default=30.0, metavar="N", help="per method (default: %(default)s)"
    )
    tune.add_argument("--figure", default="recall@100", help="what is maximised (default: %(default)s)")
    tune.set_defaults(run_command=run_tune)
    commands_bench_serving.add_kinds(kinds)
    commands_bench_live.add_kinds(kinds)
    commands_bench_fuzz.add_kinds(kinds)
    commands_bench_rollouts.add_kinds(kinds)
    commands_bench_failures.add_kinds(kinds)
    commands_bench_operations.add_kinds(kinds)

    throughput = kinds.add_parser(
        "throughput", help="what learning the index jointly costs training", formatter_class=FORMAT,
        description="Trains the recipe's model with the index learnt jointly and with a k-means index, turn by turn; "
        "writes docs/results/throughput-<data>.{json,md}.",
        epilog="examples:\n  hsnn bench throughput --data beauty\n"
        "  hsnn bench throughput --data ml-100k --steps 200 --rounds 3",
    )  # fmt: skip
    _data(throughput)
    throughput.add_argument("--steps", type=int, default=60, metavar="N",
                            help="of one training (default: %(default)s)")  # fmt: skip
    throughput.add_argument("--rounds", type=int, default=5, metavar="N",
                            help="pairs of trainings (default: %(default)s)")  # fmt: skip
    throughput.set_defaults(run_command=run_throughput)

    follow = kinds.add_parser(
        "follow", help="what following a stream gives over a model that stands still", formatter_class=FORMAT,
        description="Trains on the first part of the recipe's log, then follows the rest, cut into files by time: "
        "NE of every file before it is learnt from, beside that of the model as it was. Writes "
        "docs/results/follow-<data>.{json,md,png}.",
        epilog="examples:\n  hsnn bench follow --data synthetic\n"
        "  hsnn bench follow --data synthetic --files 4 --share 0.8",
    )  # fmt: skip
    _data(follow)
    follow.add_argument("--files", type=int, default=12, metavar="N",
                        help="that the rest is cut into (default: %(default)s)")  # fmt: skip
    follow.add_argument("--share", type=float, default=0.5, metavar="S",
                        help="of the log that is trained on first (default: %(default)s)")  # fmt: skip
    follow.set_defaults(run_command=run_bench_follow)


def _data(command: Any) -> None:
    command.add_argument(
        "--data", required=True, metavar="NAME", help="a shipped recipe's name or a YAML file"
    )


def _seeds_and_requests(command: Any) -> None:
    command.add_argument("--seeds", type=int, default=3, metavar="N",
                         help="seeds per row, from the recipe's own on (default: %(default)s)")  # fmt: skip
    command.add_argument(
        "--requests", type=int, metavar="N", help="evaluation requests (default: the recipe's)"
    )


def _models_and_folders(command: Any) -> None:
    command.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
                         help="change the recipe that all rows start from; may be repeated")  # fmt: skip
    command.add_argument("--jobs", type=int, metavar="N",
                         help="workers at a time, one thread each (default: one per usable core)")  # fmt: skip
    command.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR",
                         help="where the report goes (default: %(default)s)")  # fmt: skip
    command.add_argument("--work", type=Path, default=Path("runs/bench"), metavar="DIR",
                         help="where trained models are kept (default: %(default)s)")  # fmt: skip


def _methods(command: Any) -> None:
    command.add_argument("--method", action="append", default=[], metavar="M", dest="methods",
                         help="may be repeated (default: all); an unknown name lists the known ones")  # fmt: skip


def run_table(options: argparse.Namespace) -> None:
    """hsnn bench table1, table2, table3."""
    from hsnn_bench import tables

    tables.run_table(
        tables.TableOptions(
            table=options.kind,
            data=options.data,
            seeds=options.seeds,
            requests=options.requests,
            rows=options.rows,
            jobs=options.jobs,
            overrides=tuple(options.overrides),
            device=options.device,
            train=not options.report_only,
            results=options.results,
            work=options.work,
        )
    )


def run_overview(options: argparse.Namespace) -> None:
    """hsnn bench overview."""
    from hsnn_bench import overview

    page = overview.write_overview(options.results)
    print(f"{page.read_text()}\npage: {page}")


def run_cascade(options: argparse.Namespace) -> None:
    """hsnn bench cascade."""
    from hsnn_bench import cascade, tables

    page = cascade.run_cascade(
        tables.TableOptions(
            table="table1",
            data=options.data,
            seeds=options.seeds,
            requests=options.requests,
            jobs=options.jobs,
            overrides=tuple(options.overrides),
            results=options.results,
            work=options.work,
        ),
        options.depths or cascade.DEPTHS,
    )
    print(f"{page.read_text()}\nreport: {page}")


def run_baselines(options: argparse.Namespace) -> None:
    """hsnn bench baselines."""
    from hsnn_bench import baselines
    from hsnn_core.errors import SchemaError

    if options.seeds < 1:
        raise SchemaError(f"--seeds: got {options.seeds}, expected at least 1")
    if options.requests < 0:
        raise SchemaError(f"--requests: got {options.requests}, expected at least 0 (all)")
    command = f"hsnn bench baselines --data {options.data}"
    command += "".join(f" --method {name}" for name in options.methods)
    command += "" if options.seeds == 3 else f" --seeds {options.seeds}"
    command += "" if options.requests == 5000 else f" --requests {options.requests}"
    baselines.run_baselines(
        options.data,
        options.methods or None,
        seeds=tuple(range(1, options.seeds + 1)),
        requests=options.requests or None,
        command=command,
    )
    print(f"report: {baselines.RESULTS / f'baselines-{Path(options.data).stem}.md'}")


def run_throughput(options: argparse.Namespace) -> None:
    """hsnn bench throughput."""
    from hsnn_bench import throughput

    report = throughput.run_throughput(options.data, options.steps, options.rounds)
    path = throughput.RESULTS / f"throughput-{report['data']}.md"
    print(f"{path.read_text()}\nreport: {path}")


def run_bench_follow(options: argparse.Namespace) -> None:
    """hsnn bench follow."""
    from hsnn_bench import follow

    report = follow.run_follow(options.data, options.files, options.share)
    path = follow.RESULTS / f"follow-{report['data']}.md"
    print(f"{path.read_text()}\nreport: {path}")


def run_tune(options: argparse.Namespace) -> None:
    """hsnn bench tune."""
    from hsnn_bench import tuning

    from .tables import table

    found = tuning.run_tuning(
        options.data,
        options.methods or None,
        trials=options.trials,
        minutes=options.minutes,
        figure=options.figure,
    )
    print(
        table(
            ["method", "value", "trials", "minutes", "parameters"],
            [
                [name, entry["value"], entry["trials"], entry["minutes"], str(entry["params"])]
                for name, entry in found.items()
            ],
            f"{options.figure} on validation requests of {options.data}",
        )
    )
