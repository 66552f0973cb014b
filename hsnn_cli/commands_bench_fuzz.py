"""hsnn bench fuzz: malformed requests to a real server, and mutated files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hsnn_core.errors import HsnnError, RequestError

FORMAT = argparse.RawDescriptionHelpFormatter


def add_kinds(kinds: Any) -> None:
    """Register below `hsnn bench`."""
    fuzz = kinds.add_parser(
        "fuzz", help="malformed requests to a real server, mutated files: nothing may crash, hang or be accepted",
        formatter_class=FORMAT,
        description="Serve an exported run and send malformed requests over gRPC and HTTP, with good ones between "
        "them that must get\ntheir own users' items; and read mutated files of every kind in processes that may "
        "die. Writes fuzz-RUN.json and .md;\nends with 1 when something was found. A small run does. Ctrl-C keeps what "
        "is done, and the same command goes on.",
        epilog="examples:\n  hsnn bench fuzz runs/ads-tiny\n  hsnn bench fuzz runs/ads-tiny --requests 0 --kind "
        "'item log' --kind checkpoint.pt\n  hsnn bench fuzz runs/ads-tiny --url h:8001 --http h:8000 --mutations 0 "
        "--results /tmp/fuzz\n\na small run:\n  hsnn train synthetic --run runs/ads-tiny "
        "--set data.options.users=400 --set data.options.ads=400 \\\n    --set data.options.impressions=12000 --set "
        "'model.layers=[\"small\",\"small\",\"small\"]' --set 'model.codebooks=[6,4]' \\\n    --set "
        "'search.widths=[4,12]' --set search.max_k=200 --set search.requests=20\n  hsnn export runs/ads-tiny",
    )  # fmt: skip
    fuzz.add_argument("run", type=Path, help="run directory that hsnn export finished")
    fuzz.add_argument(
        "--requests",
        type=int,
        default=100_000,
        metavar="N",
        help="malformed requests, those that a change left good not counted (default: %(default)s)",
    )
    fuzz.add_argument("--url", metavar="HOST:PORT", help="gRPC of a server that runs already and serves this run, "
                      "whose items nothing changes meanwhile; default: a server of its own")  # fmt: skip
    fuzz.add_argument("--http", metavar="HOST:PORT", help="its HTTP, with --url")
    fuzz.add_argument("--mutations", type=int, default=1000, metavar="N",
                      help="mutations of every kind of file (default: %(default)s)")  # fmt: skip
    fuzz.add_argument("--kind", action="append", default=[], metavar="NAME", dest="kinds",
                      help="only these files; an unknown name lists the known ones")  # fmt: skip
    fuzz.add_argument(
        "--seed", type=int, default=1, help="of everything that is drawn (default: %(default)s)"
    )
    fuzz.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR",
                      help="where the report goes (default: %(default)s)")  # fmt: skip
    fuzz.set_defaults(run_command=run_fuzz)


def run_fuzz(options: argparse.Namespace) -> None:
    """hsnn bench fuzz."""
    from hsnn_bench.fuzz import earlier_report, findings, render, write_report
    from hsnn_bench.fuzz import run_fuzz as run
    from hsnn_server.state import Urls

    from .commands_bench_serving import typed

    for name in ("requests", "mutations", "seed"):
        if getattr(options, name) < 0:
            raise RequestError(f"--{name}: got {getattr(options, name)}, expected a whole number from 0 on")
    if (options.url is None) != (options.http is None):
        raise RequestError(
            f"--url: got {options.url}, --http: got {options.http}, expected both or neither; requests go over both"
        )
    command = typed(
        options,
        f"hsnn bench fuzz {options.run}",
        requests=100_000,
        mutations=1000,
        seed=1,
        url=None,
        http=None,
    )
    report = run(
        options.run, options.requests, options.mutations, options.seed, options.kinds, command,
        earlier=earlier_report(options.run, options.results), save=lambda part: write_report(part, options.results),
        elsewhere=None if options.url is None else Urls(options.url, options.http, ""),
    )  # fmt: skip
    path = write_report(report, options.results)
    print(render(report))
    print(f"report: {path}")
    if found := findings(report):
        raise HsnnError(f"{found} findings; {path} has them")
