"""hsnn bench serving | capacity | soak: what a request costs in Triton, how many it takes, and for how long."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hsnn_core.errors import RequestError

from .commands_serving import widths_of
from .connection import add_tls, tls_of

FORMAT = argparse.RawDescriptionHelpFormatter


def add_kinds(kinds: Any) -> None:
    """Register the kinds of hsnn bench that need a running Triton."""
    serving = kinds.add_parser(
        "serving", help="the HSNN beside EBR, flat models and an echo in one Triton", formatter_class=FORMAT,
        description="Serve an exported run and its peers over the same items in one Triton, ask them the same requests "
        "in turns, and report CPU time, latency and recall of each. The flat peers are trained once, under RUN/peers.",
        epilog="examples:\n  hsnn bench serving runs/ads\n  hsnn bench serving runs/ads --k 100 --rounds 60\n"
        "  hsnn bench serving runs/ads-scale --items 1000000 --widths 64,1024 --recall-requests 20\n\n"
        "It takes as long as training two flat models of the recipe, and then some minutes. With --items the corpus\n"
        "is grown from the run's simulated world, as `hsnn bench scale` does; over more than 200,000 there is no flat\n"
        "MoNN, which takes a second per request, and no HNSW, which takes an hour to build.",
    )  # fmt: skip
    serving.add_argument("run", type=Path, help="run directory, exported")
    serving.add_argument("--k", type=int, default=1000,
                         help="items per request, at most the recipe's max_k (default: %(default)s)")  # fmt: skip
    serving.add_argument("--requests", type=int, default=1000, metavar="N",
                         help="distinct test requests at most (default: %(default)s)")  # fmt: skip
    serving.add_argument("--rounds", type=int, default=30, metavar="N",
                         help="rounds of 10 requests per model; 100 for a p99 (default: %(default)s)")  # fmt: skip
    serving.add_argument("--recall-requests", type=int, default=100, metavar="N",
                         help="requests that recall is taken over (default: %(default)s)")  # fmt: skip
    serving.add_argument("--widths", help="nodes that the HSNN keeps after each layer but the last, like 16,128 "
                         "(default: the export's)")  # fmt: skip
    serving.add_argument("--items", type=int, metavar="V",
                         help="grow the run's simulated world to so many items (default: its own items)")  # fmt: skip
    serving.add_argument("--work", type=Path, default=Path("runs/scale"), metavar="DIR",
                         help="where grown corpora are kept (default: %(default)s)")  # fmt: skip
    serving.add_argument("--workers", type=int, default=2, metavar="N",
                         help="workers of the orchestrators (default: %(default)s)")  # fmt: skip
    results(serving)
    serving.set_defaults(run_command=run_serving)

    capacity = kinds.add_parser(
        "capacity", help="the highest load at which a latency percentile holds, and overload", formatter_class=FORMAT,
        description="Find with perf_analyzer the highest load, closed loop and Poisson arrivals, at which a percentile "
        "stays within a limit; then p99 / p50 at 70% of it, and who is answered and refused at three times as much. It "
        "takes about a quarter of an hour; longer where only few requests a second are within the limit. "
        "Works against any Triton that serves the run's schema, or starts one from a repository.",
        epilog="examples:\n  hsnn bench capacity runs/ads --repository repo\n"
        "  hsnn bench capacity runs/ads --repository repo --latency-ms 20 --percentile 99\n"
        "  hsnn bench capacity runs/ads --url triton.example:8001 --metrics-url triton.example:8002",
    )  # fmt: skip
    capacity.add_argument("run", type=Path, help="run directory; its test impressions are the requests")
    where = capacity.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--repository", type=Path, help="start a local Triton on the newest snapshot of this repository"
    )
    where.add_argument("--url", metavar="HOST:PORT", help="gRPC of a running Triton")
    capacity.add_argument("--metrics-url", metavar="HOST:PORT",
                         help="metrics of that Triton; without it the server's own counts are left out")  # fmt: skip
    capacity.add_argument("--latency-ms", type=float, default=20.0, metavar="MS",
                         help="the limit (default: %(default)s)")  # fmt: skip
    capacity.add_argument(
        "--percentile", type=int, default=99, help="50, 90, 95 or 99 (default: %(default)s)"
    )
    capacity.add_argument("--k", type=int, default=1000,
                         help="items per request, at most the recipe's max_k (default: %(default)s)")  # fmt: skip
    capacity.add_argument("--requests", type=int, default=5000, metavar="N",
                         help="distinct requests at most (default: %(default)s)")  # fmt: skip
    capacity.add_argument("--seconds", type=float, default=10.0, metavar="S",
                         help="how long a level is measured, at least (default: %(default)s)")  # fmt: skip
    capacity.add_argument("--arrivals", type=int, default=1000, metavar="N",
                         help="requests of a level, in up to two minutes (default: %(default)s)")  # fmt: skip
    capacity.add_argument("--perf-analyzer", type=Path, metavar="FILE",
                         help="the binary (default: in PATH, else that of `make perf_analyzer`)")  # fmt: skip
    add_tls(capacity)
    results(capacity)
    capacity.set_defaults(run_command=run_capacity)

    soak = kinds.add_parser(
        "soak", help="memory of a loaded server over time", formatter_class=FORMAT,
        description="Serve a repository, load it with a share of its capacity for a long time, and report how its "
        "memory and its /dev/shm grow. The capacity is that of `hsnn bench capacity`'s report.",
        epilog="examples:\n  hsnn bench soak runs/ads --repository repo --capacity 120\n"
        "  hsnn bench soak runs/ads --repository repo --capacity 120 --minutes 30 --load 0.8",
    )  # fmt: skip
    soak.add_argument("run", type=Path, help="run directory; its test impressions are the requests")
    soak.add_argument("--repository", type=Path, required=True, help="model repository to serve")
    soak.add_argument("--capacity", type=float, required=True, metavar="RATE", help="requests a second")
    soak.add_argument("--load", type=float, default=0.8, help="share of the capacity (default: %(default)s)")
    soak.add_argument("--minutes", type=float, default=30.0, help="how long (default: %(default)s)")
    soak.add_argument("--latency-ms", type=float, default=100.0, metavar="MS",
                      help="deadline of each request (default: %(default)s)")  # fmt: skip
    soak.add_argument("--k", type=int, default=1000,
                      help="items per request, at most the recipe's max_k (default: %(default)s)")  # fmt: skip
    soak.add_argument("--requests", type=int, default=5000, metavar="N",
                      help="distinct requests at most (default: %(default)s)")  # fmt: skip
    results(soak)
    soak.set_defaults(run_command=run_soak)


def results(command: Any) -> None:
    """The option of where a report goes."""
    command.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR",
                         help="where the report goes (default: %(default)s)")  # fmt: skip


def at_least_one(options: argparse.Namespace, *names: str) -> None:
    """RequestError unless these options are at least 1."""
    for name in names:
        value = getattr(options, name)
        if value < 1:
            raise RequestError(f"--{name.replace('_', '-')}: got {value}, expected at least 1")


def typed(options: argparse.Namespace, start: str, **defaults: object) -> str:
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
    from hsnn_bench.serving_peers import Grown
    from hsnn_bench.serving_report import render, write_report

    at_least_one(options, "k", "requests", "rounds", "recall_requests", "workers")
    widths = widths_of(options.widths)
    command = typed(
        options, f"hsnn bench serving {options.run}", k=1000, requests=1000, rounds=30, recall_requests=100,
        workers=2, widths=None, items=None,
    )  # fmt: skip
    report = run(
        options.run, options.k, options.requests, options.rounds, options.recall_requests, options.workers,
        None if widths is None else tuple(widths), command,
        None if options.items is None else Grown(options.items, options.work),
    )  # fmt: skip
    paths = write_report(report, options.results)
    print(render(report))
    print(f"report: {paths[1]}")


def run_capacity(options: argparse.Namespace) -> None:
    """hsnn bench capacity."""
    from contextlib import nullcontext

    from hsnn_bench.capacity import own_server
    from hsnn_bench.capacity import run_capacity as run
    from hsnn_bench.capacity_report import render, write_report
    from hsnn_bench.perf_analyzer import find

    at_least_one(options, "k", "requests", "latency_ms", "seconds", "arrivals")
    tool = find(options.perf_analyzer)
    where = f"--repository {options.repository}" if options.repository else f"--url {options.url}"
    command = typed(
        options, f"hsnn bench capacity {options.run} {where}", metrics_url=None, latency_ms=20.0, percentile=99,
        k=1000, requests=5000, seconds=10.0, arrivals=1000,
    )  # fmt: skip

    def server() -> Any:
        if options.repository is None:
            return nullcontext((options.url, options.metrics_url))
        return own_server(options.repository)

    report = run(
        options.run, server, tool, k=options.k, latency_ms=options.latency_ms, percentile=options.percentile,
        requests=options.requests, seconds=options.seconds, arrivals=options.arrivals, command=command,
        beside_bare=options.repository is not None, tls=tls_of(options),
    )  # fmt: skip
    paths = write_report(report, options.results)
    print()
    print(render(report))
    print(f"report: {paths[2]}")


def run_soak(options: argparse.Namespace) -> None:
    """hsnn bench soak."""
    from hsnn_bench.soak import render, write_report
    from hsnn_bench.soak import run_soak as run

    at_least_one(options, "k", "requests")
    for name in ("capacity", "load", "minutes", "latency_ms"):
        if not getattr(options, name) > 0:
            raise RequestError(
                f"--{name.replace('_', '-')}: got {getattr(options, name)}, expected a number > 0"
            )
    command = typed(
        options, f"hsnn bench soak {options.run} --repository {options.repository} --capacity {options.capacity:g}",
        load=0.8, minutes=30.0, latency_ms=100.0, k=1000, requests=5000,
    )  # fmt: skip
    report = run(
        options.run, options.repository, capacity=options.capacity, load=options.load, minutes=options.minutes,
        k=options.k, latency_ms=options.latency_ms, requests=options.requests, command=command,
    )  # fmt: skip
    paths = write_report(report, options.results)
    print(render(report))
    print(f"report: {paths[2]}")
