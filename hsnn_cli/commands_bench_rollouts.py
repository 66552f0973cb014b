"""hsnn bench rollouts: whether rollouts under load lose or mix requests, and how long they take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hsnn_core.errors import RequestError

from .commands_bench_serving import at_least_one, results, typed

FORMAT = argparse.RawDescriptionHelpFormatter


def add_kinds(kinds: Any) -> None:
    """Register the kind."""
    rollouts = kinds.add_parser(
        "rollouts", help="publish, promote and roll back under load: what is lost, and how long it takes",
        formatter_class=FORMAT,
        description="Export a run twice, serve it, send a share of what the server takes, and meanwhile publish and "
        "promote the two exports in turns and roll some back. Every answer is compared with what the snapshot it names "
        "answers offline.",
        epilog="examples:\n  hsnn bench rollouts runs/ads\n"
        "  hsnn bench rollouts runs/ads --rollouts 3 --rollbacks 1 --capacity 60",
    )  # fmt: skip
    rollouts.add_argument("run", type=Path, help="trained run; its test impressions are the requests")
    rollouts.add_argument("--rollouts", type=int, default=20, metavar="N", help="(default: %(default)s)")
    rollouts.add_argument("--rollbacks", type=int, default=5, metavar="N", help="(default: %(default)s)")
    rollouts.add_argument("--capacity", type=float, metavar="RATE",
                          help="closed-loop throughput (default: measured, as many under way as workers)")  # fmt: skip
    rollouts.add_argument("--load", type=float, default=0.7,
                          help="share of the closed-loop throughput (default: %(default)s)")  # fmt: skip
    rollouts.add_argument(
        "--mode", choices=("bls", "in_process"), default="bls", help="(default: %(default)s)"
    )
    rollouts.add_argument("--workers", type=int, default=2, metavar="N", help="(default: %(default)s)")
    rollouts.add_argument("--queue", type=int, default=512, metavar="N",
                          help="requests that may wait (default: %(default)s)")  # fmt: skip
    rollouts.add_argument("--k", type=int, default=100, help="items per request (default: %(default)s)")
    rollouts.add_argument("--latency-ms", type=float, default=2000.0, metavar="MS",
                          help="deadline of each request (default: %(default)g)")  # fmt: skip
    rollouts.add_argument("--requests", type=int, default=500, metavar="N",
                          help="distinct requests at most (default: %(default)s)")  # fmt: skip
    results(rollouts)
    rollouts.set_defaults(run_command=run_rollouts)


def run_rollouts(options: argparse.Namespace) -> None:
    """hsnn bench rollouts."""
    from hsnn_bench.rollouts import run_rollouts as run
    from hsnn_bench.rollouts_report import render, write_report

    at_least_one(options, "rollouts", "workers", "queue", "k", "requests")
    if not 0 <= options.rollbacks <= options.rollouts:
        raise RequestError(
            f"--rollbacks: got {options.rollbacks}, expected 0 to {options.rollouts}: each undoes a rollout"
        )
    for name in ("capacity", "load", "latency_ms"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise RequestError(f"--{name.replace('_', '-')}: got {value}, expected a number > 0")
    command = typed(
        options, f"hsnn bench rollouts {options.run}", rollouts=20, rollbacks=5, capacity=None, load=0.7, mode="bls",
        workers=2, queue=512, k=100, latency_ms=2000.0, requests=500,
    )  # fmt: skip
    report = run(
        options.run, rollouts=options.rollouts, rollbacks=options.rollbacks, capacity=options.capacity,
        load=options.load, mode=options.mode, workers=options.workers, queue=options.queue, k=options.k,
        deadline=options.latency_ms / 1000, requests=options.requests, command=command,
    )  # fmt: skip
    paths = write_report(report, options.results)
    print()
    print(render(report))
    print(f"report: {paths[1]}")
