"""hsnn bench tracing | dashboard: what watching a server costs, and what it shows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .provenance import run_name

FORMAT = argparse.RawDescriptionHelpFormatter


def add_kinds(kinds: Any) -> None:
    """Register below `hsnn bench`."""
    tracing = kinds.add_parser(
        "tracing", help="what tracing adds to a request", formatter_class=FORMAT,
        description="Send the same requests to a server without tracing and to one with, traced and not, side by side. "
        "Writes tracing-RUN.json and .md.",
        epilog="examples:\n  hsnn bench tracing runs/ads\n  hsnn bench tracing runs/ads --mode bls --rounds 500",
    )  # fmt: skip
    tracing.add_argument("run", type=Path, help="run directory that hsnn export finished")
    tracing.add_argument("--mode", choices=("bls", "in_process"), default="in_process",
                         help="how networks are called (default: %(default)s)")  # fmt: skip
    tracing.add_argument("--rounds", type=int, default=250, metavar="N",
                         help="over the users of the smoke request, each way (default: %(default)s)")  # fmt: skip
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

    found = measure(options.run, options.mode, options.rounds)
    command = f"hsnn bench tracing {options.run} --mode {options.mode} --rounds {options.rounds}"
    path = report(found, command, run_name(options.run), options.results)
    print(path.read_text())
    print(f"written: {path}")


def run_dashboard(options: argparse.Namespace) -> None:
    """hsnn bench dashboard."""
    from hsnn_bench.dashboard_run import picture

    command = f"hsnn bench dashboard {options.run} --seconds {options.seconds:g}"
    picture(options.run, options.picture, options.seconds, command)
    print(f"written: {options.picture}")
