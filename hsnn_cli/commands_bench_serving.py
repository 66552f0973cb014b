"""hsnn bench serving: what a request costs in Triton."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

FORMAT = argparse.RawDescriptionHelpFormatter


def add_kinds(kinds: Any) -> None:
    """Register the kinds of hsnn bench that need a running Triton."""
    serving = kinds.add_parser(
        "serving", help="the HSNN beside EBR, flat models and an echo in one Triton", formatter_class=FORMAT,
        description="Serve an exported run and its peers over the same items in one Triton, ask them the same requests "
        "in turns, and report CPU time, latency and recall of each. The flat peers are trained once, under RUN/peers.",
        epilog="examples:\n  hsnn bench serving runs/ads\n  hsnn bench serving runs/ads --k 100 --rounds 60\n\n"
        "It takes as long as training two flat models of the recipe, and then some minutes.",
    )  # fmt: skip
    serving.add_argument("run", type=Path, help="run directory, exported")
    serving.add_argument("--k", type=int, default=1000,
                         help="items per request, at most the recipe's max_k (default: %(default)s)")  # fmt: skip
    serving.add_argument("--requests", type=int, default=1000, metavar="N",
                         help="distinct test requests at most (default: %(default)s)")  # fmt: skip
    serving.add_argument("--rounds", type=int, default=30, metavar="N",
                         help="rounds of 10 requests per model (default: %(default)s)")  # fmt: skip
    serving.add_argument("--recall-requests", type=int, default=100, metavar="N",
                         help="requests that recall is taken over (default: %(default)s)")  # fmt: skip
    serving.add_argument("--workers", type=int, default=2, metavar="N",
                         help="workers of the orchestrators (default: %(default)s)")  # fmt: skip
    _results(serving)
    serving.set_defaults(run_command=run_serving)


def _results(command: Any) -> None:
    command.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR",
                         help="where the report goes (default: %(default)s)")  # fmt: skip


def _at_least_one(options: argparse.Namespace, *names: str) -> None:
    from hsnn_core.errors import RequestError

    for name in names:
        value = getattr(options, name)
        if value < 1:
            raise RequestError(f"--{name.replace('_', '-')}: got {value}, expected at least 1")


def _typed(options: argparse.Namespace, start: str, **defaults: object) -> str:
    """The command as it was typed, as far as it is not the defaults."""
    parts = [start]
    for name, default in defaults.items():
        value = getattr(options, name)
        if value != default:
            parts.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(parts)


def run_serving(options: argparse.Namespace) -> None:
    """hsnn bench serving."""
    from hsnn_bench.serving import run_serving as run
    from hsnn_bench.serving_report import render, write_report

    _at_least_one(options, "k", "requests", "rounds", "recall_requests", "workers")
    command = _typed(
        options, f"hsnn bench serving {options.run}", k=1000, requests=1000, rounds=30, recall_requests=100,
        workers=2,
    )  # fmt: skip
    report = run(
        options.run, options.k, options.requests, options.rounds, options.recall_requests, options.workers, command
    )  # fmt: skip
    paths = write_report(report, options.results)
    print(render(report))
    print(f"report: {paths[1]}")
