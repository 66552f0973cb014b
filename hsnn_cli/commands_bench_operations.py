"""hsnn bench tracing | dashboard: what watching a server costs, and what it shows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .commands_bench_serving import at_least_one, typed
from .provenance import run_name

FORMAT = argparse.RawDescriptionHelpFormatter


def add_kinds(kinds: Any) -> None:
    """Register below `hsnn bench`."""
    tracing = kinds.add_parser(
        "tracing", help="what tracing adds to a request", formatter_class=FORMAT,
        description="Send the same requests to servers without tracing and with, traced and not, side by side; pairs "
        "of\nservers are started anew, for two processes differ by themselves. Writes tracing-RUN.json and .md.",
        epilog="examples:\n  hsnn bench tracing runs/ads\n  hsnn bench tracing runs/ads --mode bls --pairs 20",
    )  # fmt: skip
    tracing.add_argument("run", type=Path, help="run directory that hsnn export finished")
    tracing.add_argument("--mode", choices=("bls", "in_process"), action="append",
                         help="how networks are called (may be repeated; default: both)")  # fmt: skip
    tracing.add_argument("--pairs", type=int, default=6, metavar="N",
                         help="of servers, at least 2 (default: %(default)s)")  # fmt: skip
    tracing.add_argument("--rounds", type=int, default=20, metavar="N",
                         help="over the smoke request's users, of each comparison (default: %(default)s)")  # fmt: skip
    tracing.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR",
                         help="where the report goes (default: %(default)s)")  # fmt: skip
    tracing.set_defaults(run_command=run_tracing)

    dashboard = kinds.add_parser(
        "dashboard", help="a picture of the Grafana dashboard, over a server under load", formatter_class=FORMAT,
        description="Serve an exported run, load it lightly, fully and too much while items change, ask a real "
        "Prometheus the dashboard's queries, and draw its panels. Needs make prometheus, no Grafana.",
        epilog="examples:\n  hsnn bench dashboard runs/ads\n"
        "  hsnn bench dashboard runs/ads --seconds 60 --picture /tmp/dashboard.png",
    )  # fmt: skip
    dashboard.add_argument("run", type=Path, help="run directory that hsnn export finished")
    dashboard.add_argument(
        "--seconds", type=float, default=240.0, metavar="S", help="of load (default: %(default)s)"
    )
    dashboard.add_argument("--picture", type=Path, default=Path("docs/dashboard.png"), metavar="FILE",
                           help="where it goes (default: %(default)s)")  # fmt: skip
    dashboard.set_defaults(run_command=run_dashboard)


def run_tracing(options: argparse.Namespace) -> None:
    """hsnn bench tracing."""
    from hsnn_bench.tracing import measure, report

    at_least_one(options, "rounds")
    modes = options.mode or ["in_process", "bls"]
    found = [measure(options.run, mode, options.pairs, options.rounds) for mode in modes]
    chosen = "".join(f" --mode {mode}" for mode in options.mode or ())
    command = typed(options, f"hsnn bench tracing {options.run}{chosen}", pairs=6, rounds=20)
    path = report(found, command, run_name(options.run), options.results)
    print(path.read_text())
    print(f"written: {path}")


def run_dashboard(options: argparse.Namespace) -> None:
    """hsnn bench dashboard."""
    from hsnn_bench.dashboard_run import picture

    command = f"hsnn bench dashboard {options.run} --seconds {options.seconds:g}"
    picture(options.run, options.picture, options.seconds, command)
    print(f"written: {options.picture}")
