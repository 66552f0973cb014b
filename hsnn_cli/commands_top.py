"""hsnn top: the metrics of running servers, live in a terminal."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from clients.metrics import scrape
from clients.vitals import REFUSALS, Vitals, vitals
from hsnn_core.errors import RequestError, ServerError

from .tables import table

_HOME_AND_CLEAR = "\x1b[H\x1b[2J"
_LEAST = 0.5  # seconds; servers report every quarter of one


def add_commands(commands: Any) -> None:
    """Register top."""
    top = commands.add_parser(
        "top", help="live view of running servers", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Requests, latency, refusals, layers and items of running servers, from their metrics.\n"
        "Every figure is of the time between two looks, every row of one snapshot version on one server.",
        epilog="examples:\n"
        "  hsnn top                                        the local server, every 2 seconds, until Ctrl-C\n"
        "  hsnn top --url ads1:8002 --url ads2:8002        several servers, one under the other\n"
        "  hsnn top --once --every 10                      one table over 10 seconds, for a ticket or a script\n\n"
        "reading it:\n"
        "  p50, p99      milliseconds from a request's arrival to its answer, estimated within histogram buckets\n"
        "  under way     requests accepted and not answered, of as many as can run at once; more are waiting\n"
        "  overload      refused a second because the queue was full; unmeetable: the deadline could not be met;\n"
        "                deadline: given up when their time had passed\n"
        "  no item       share of users that got none: nothing matched their context\n"
        "  changed       items that are not as the snapshot has them; hsnn items compact folds them in\n"
        "  behind        positions of the item log that are not followed yet; -1: it is not followed\n\n"
        "for history, alerts and many servers: docker/prometheus and docker/grafana.",
    )  # fmt: skip
    top.add_argument("--url", action="append", metavar="HOST:PORT", dest="urls",
                     help="Triton's metrics; may be repeated (default: 127.0.0.1:8002)")  # fmt: skip
    top.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="between looks (default: %(default)s)"
    )
    top.add_argument("--once", action="store_true", help="print one view and stop")
    top.set_defaults(run_command=run_top)


def run_top(options: argparse.Namespace) -> None:
    """hsnn top."""
    if options.every < _LEAST:
        raise RequestError(f"--every: got {options.every:g}, expected at least {_LEAST:g} seconds")
    urls = options.urls or ["127.0.0.1:8002"]
    before = _look(urls)
    while True:
        time.sleep(options.every)
        after = _look(urls)
        view = "\n\n".join(_server(url, before[url], after[url]) for url in urls)
        if options.once:
            print(view)
            if all(isinstance(looked, ServerError) for _, looked in after.values()):
                raise ServerError("none of the servers answered; is --url the address of Triton's metrics?")
            return
        sys.stdout.write((_HOME_AND_CLEAR if sys.stdout.isatty() else "") + view + "\n")
        sys.stdout.flush()
        before = after


_Looked = tuple[float, dict[str, float] | ServerError]


def _look(urls: Sequence[str]) -> dict[str, _Looked]:
    """When each server was asked, and what it said."""
    looked: dict[str, _Looked] = {}
    for url in urls:
        try:
            looked[url] = time.monotonic(), scrape(url)
        except ServerError as error:
            looked[url] = time.monotonic(), error
    return looked


def _server(url: str, before: _Looked, after: _Looked) -> str:
    (began, was), (ended, is_now) = before, after
    clock = time.strftime("%H:%M:%S")
    if isinstance(is_now, ServerError):
        return f"{url}  {clock}  does not answer: {is_now}"
    if isinstance(was, ServerError):
        return f"{url}  {clock}  answers again"
    versions = vitals(was, is_now, ended - began)
    if not versions:
        return f"{url}  {clock}  serves no snapshot"
    return f"{url}  {clock}, over {ended - began:.1f} s\n\n" + "\n\n".join(
        table(header, rows) for header, rows in (_requests(versions), _layers(versions), _items(versions))
    )


_Table = tuple[list[str], list[list[Any]]]


def _requests(versions: Sequence[Vitals]) -> _Table:
    header = ["version", "requests/s", "p50 ms", "p99 ms", "under way", "failed/s", "wrong/s"]
    header += [f"{reason}/s" for reason in REFUSALS]
    return header, [
        [
            one.version, _number(one.rate), _milliseconds(one.p50), _milliseconds(one.p99),
            f"{one.in_flight} of {one.workers}", _number(one.errors), _number(one.invalid),
            *(_number(one.refused[reason]) for reason in REFUSALS),
        ]
        for one in versions
    ]  # fmt: skip


def _layers(versions: Sequence[Vitals]) -> _Table:
    return ["version", "layer", "mean ms", "p99 ms", "nodes per user"], [
        [one.version, layer, _milliseconds(use.mean), _milliseconds(use.p99), _number(use.candidates)]
        for one in versions
        for layer, use in one.layers.items()
    ]


def _items(versions: Sequence[Vitals]) -> _Table:
    return ["version", "items", "changed", "behind", "matching", "no item", "calls failed/s", "snapshot"], [
        [
            one.version, one.items, one.changed, one.behind, _share(one.eligible), _share(one.empty),
            _number(one.bls_failures), f"{_age(time.time() - one.created)} old",
        ]
        for one in versions
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.3g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
