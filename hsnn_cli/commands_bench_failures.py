"""hsnn bench failures | endurance: what serves when things are killed, filled and stopped."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hsnn_core.errors import RequestError

from .commands_bench_serving import at_least_one, results, typed
from .provenance import run_name

FORMAT = argparse.RawDescriptionHelpFormatter


def add_kinds(kinds: Any) -> None:
    """Register below `hsnn bench`."""
    endurance = kinds.add_parser(
        "endurance", help="an hour of load, updates, rollouts and killed processes: does it last?",
        formatter_class=FORMAT,
        description="Serve an exported run under the supervisor of hsnn serve and load it through the real client,\n"
        "while items change, snapshots are rolled out and Python stubs are killed: errors, latency, memory over time. "
        "Appends\nto endurance-RUN.csv and -incidents.csv as it goes; a run that was cut off has its report, too.",
        epilog="examples:\n  hsnn bench endurance runs/demo/run\n"
        "  hsnn bench endurance runs/demo/run --minutes 6 --rollout-every 1 --kill-every 2\n"
        "  hsnn bench endurance runs/demo/run --report-only     of what the files have so far",
    )  # fmt: skip
    endurance.add_argument("run", type=Path, help="run directory that hsnn export finished")
    endurance.add_argument("--minutes", type=float, default=60.0, help="how long (default: %(default)s)")
    endurance.add_argument("--load", type=float, default=0.7,
                           help="share of the closed-loop throughput (default: %(default)s)")  # fmt: skip
    endurance.add_argument("--capacity", type=float, metavar="RATE",
                           help="closed-loop throughput (default: measured, two calls and updates)")  # fmt: skip
    endurance.add_argument("--updates", type=float, default=50.0, metavar="RATE",
                           help="item updates a second (default: %(default)s)")  # fmt: skip
    endurance.add_argument(
        "--rollout-every", type=float, default=5.0, metavar="MINUTES", help="(default: %(default)s)"
    )
    endurance.add_argument(
        "--kill-every", type=float, default=10.0, metavar="MINUTES", help="(default: %(default)s)"
    )
    endurance.add_argument("--report-only", action="store_true", help="of the files that a run has left")
    _served(endurance, "endurance")
    endurance.set_defaults(run_command=run_endurance)

    failures = kinds.add_parser(
        "failures", help="kill, stop and fill things under load: time to recovery, and what clients see",
        formatter_class=FORMAT,
        description="Serve an exported run under the supervisor of hsnn serve, load it through the real client, and "
        "break one thing\nafter another: Python stubs and the server killed or stopped, /dev/shm and the item log's "
        "disk full (small ones,\nfor this command alone; needs root). Writes failures-RUN.json and .md.",
        epilog="examples:\n  hsnn bench failures runs/demo/run\n"
        "  hsnn bench failures runs/demo/run --rounds 1 --only killed",
    )  # fmt: skip
    failures.add_argument("run", type=Path, help="run directory that hsnn export finished")
    failures.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="of all failures (default: %(default)s)"
    )
    failures.add_argument("--only", metavar="TEXT", help="failures whose name has this text")
    failures.add_argument("--load", type=float, default=0.5,
                          help="share of the closed-loop throughput (default: %(default)s)")  # fmt: skip
    failures.add_argument("--capacity", type=float, metavar="RATE",
                          help="closed-loop throughput (default: measured, two calls always under way)")  # fmt: skip
    _served(failures, "failures")
    failures.set_defaults(run_command=run_failures)


def _served(command: Any, work: str) -> None:
    command.add_argument("--mode", choices=("bls", "in_process"), default="bls",
                         help="how networks are called (default: %(default)s)")  # fmt: skip
    command.add_argument("--k", type=int, default=100,
                         help="items per request, at most the recipe's max_k (default: %(default)s)")  # fmt: skip
    command.add_argument("--timeout-ms", type=float, default=1000.0, metavar="MS",
                         help="that a call may take (default: %(default)s)")  # fmt: skip
    command.add_argument("--requests", type=int, default=1000, metavar="N",
                         help="distinct requests at most (default: %(default)s)")  # fmt: skip
    command.add_argument("--work", type=Path, default=Path("runs") / work, metavar="DIR",
                         help="the repository's folder, emptied first (default: %(default)s)")  # fmt: skip
    results(command)


def _positive(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise RequestError(f"--{name.replace('_', '-')}: got {value}, expected a number > 0")


def run_failures(options: argparse.Namespace) -> None:
    """hsnn bench failures."""
    from hsnn_bench.failures import run_failures as run
    from hsnn_bench.failures_report import write_report
    from hsnn_server.processes import ended_like_ctrl_c

    at_least_one(options, "k", "requests", "rounds")
    _positive(options, "load", "capacity", "timeout_ms")
    command = typed(
        options, f"hsnn bench failures {options.run}", rounds=3, only=None, load=0.5, capacity=None, mode="bls", k=100,
        timeout_ms=1000.0, requests=1000,
    )  # fmt: skip
    with ended_like_ctrl_c():
        report = run(
            options.run, rounds=options.rounds, load=options.load, capacity=options.capacity, mode=options.mode,
            k=options.k, timeout=options.timeout_ms / 1000, requests=options.requests, work=options.work,
            command=command, only=options.only,
        )  # fmt: skip
    written = write_report(report, options.results / f"failures-{run_name(options.run)}")
    print(written.read_text())
    print(f"report: {written}")


def run_endurance(options: argparse.Namespace) -> None:
    """hsnn bench endurance."""
    from hsnn_bench.endurance import Plan
    from hsnn_bench.endurance import run_endurance as run
    from hsnn_bench.endurance_report import write_report
    from hsnn_server.processes import ended_like_ctrl_c

    at_least_one(options, "k", "requests")
    _positive(options, "minutes", "load", "capacity", "updates", "rollout_every", "kill_every", "timeout_ms")
    stem = options.results / f"endurance-{run_name(options.run)}"
    if not options.report_only:
        command = typed(
            options, f"hsnn bench endurance {options.run}", minutes=60.0, load=0.7, capacity=None, updates=50.0,
            rollout_every=5.0, kill_every=10.0, mode="bls", k=100, timeout_ms=1000.0, requests=1000,
        )  # fmt: skip
        plan = Plan(
            minutes=options.minutes, load=options.load, capacity=options.capacity, updates=options.updates,
            rollout_every=options.rollout_every, kill_every=options.kill_every, mode=options.mode, k=options.k,
            timeout=options.timeout_ms / 1000, requests=options.requests,
        )  # fmt: skip
        with ended_like_ctrl_c():
            try:
                run(options.run, plan, options.work, stem, command)
            except KeyboardInterrupt:
                print("stopped; the report is of what there is")
    written = write_report(stem)
    print(written.read_text())
    print(f"report: {written}")
