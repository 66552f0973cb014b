"""hsnn bench live | filtering | crashes: how soon changed items are found, what that costs, what must not be returned,
and what must not be lost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .provenance import run_name

FORMAT = argparse.RawDescriptionHelpFormatter


def add_kinds(kinds: Any) -> None:
    """Register below `hsnn bench`."""
    live = kinds.add_parser(
        "live", help="how soon an updated item is found, and searches beside updates", formatter_class=FORMAT,
        description="Serve a large simulated corpus with the local Triton, change its items and search: milliseconds "
        "from the acknowledgement\nof an upsert to an answer that has it, and latency with and without updates. Writes "
        "live-RUN.json, .md and .png.",
        epilog="examples:\n  hsnn bench live runs/ads-scale\n"
        "  hsnn bench live runs/ads-scale --items 100000 --widths 256,2048 --probes 50",
    )  # fmt: skip
    live.add_argument("run", type=Path, help="run directory of a simulated world that hsnn export finished")
    live.add_argument("--items", type=int, default=1_000_000, metavar="V", help="ads (default: %(default)s)")
    live.add_argument("--widths", default="64,1024", help="nodes kept after each layer but the last (default: "
                      "%(default)s, what `hsnn bench scale` finds for a million)")  # fmt: skip
    live.add_argument("--k", type=int, default=1000, help="items to return (default: %(default)s)")
    live.add_argument("--probes", type=int, default=300, metavar="N",
                      help="items whose freshness is measured (default: %(default)s)")  # fmt: skip
    live.add_argument("--rate", type=float, default=1000.0, metavar="R",
                      help="sustained updates a second (default: %(default)s)")  # fmt: skip
    live.add_argument("--turns", type=int, default=5, metavar="N",
                      help="turns without and with updates (default: %(default)s)")  # fmt: skip
    live.add_argument("--turn-seconds", type=float, default=10.0, metavar="S",
                      help="length of a turn (default: %(default)s)")  # fmt: skip
    live.add_argument(
        "--requests", type=int, default=1000, metavar="N", help="different requests (default: %(default)s)"
    )
    live.add_argument("--work", type=Path, default=Path("runs/scale"), metavar="DIR",
                      help="where corpora are kept (default: %(default)s)")  # fmt: skip
    live.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR",
                      help="where the report goes (default: %(default)s)")  # fmt: skip
    live.set_defaults(run_command=run_live)

    filtering = kinds.add_parser(
        "filtering", help="is an item ever returned that must not be? random histories and requests",
        formatter_class=FORMAT,
        description="Change the items of an exported run at random, ask with random context and exclusions, and check "
        "every item\nthat comes back against the rules, read plainly. Writes filtering-RUN.json and .md; ends with 1 "
        "when one was wrong.",
        epilog="examples:\n  hsnn bench filtering runs/ads\n  hsnn bench filtering runs/ads --queries 10000 --seed 2",
    )  # fmt: skip
    filtering.add_argument("run", type=Path, help="run directory that hsnn export finished")
    filtering.add_argument(
        "--queries", type=int, default=1_000_000, metavar="N", help="requests (default: %(default)s)"
    )
    filtering.add_argument(
        "--seed", type=int, default=1, help="of everything that is drawn (default: %(default)s)"
    )
    filtering.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR",
                           help="where the report goes (default: %(default)s)")  # fmt: skip
    filtering.set_defaults(run_command=run_filtering)

    crashes = kinds.add_parser(
        "crashes", help="are acknowledged updates lost when something is killed?", formatter_class=FORMAT,
        description="Serve an exported run, change items all the time, and kill with SIGKILL in turn: the log's "
        "writer, the orchestrator,\nthe server, a compaction, a rollout. Writes crashes-RUN.json and .md; ends with 1 "
        "when an update was lost.",
        epilog="examples:\n  hsnn bench crashes runs/ads\n  hsnn bench crashes runs/ads --kills 5",
    )  # fmt: skip
    crashes.add_argument(
        "run", type=Path, help="run directory of a simulated world that hsnn export finished"
    )
    crashes.add_argument("--kills", type=int, default=100, metavar="N", help="in all (default: %(default)s)")
    crashes.add_argument("--seed", type=int, default=1, help="of the moments (default: %(default)s)")
    crashes.add_argument("--work", type=Path, default=Path("runs/crashes"), metavar="DIR",
                         help="the repository's folder, emptied first (default: %(default)s)")  # fmt: skip
    crashes.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR",
                         help="where the report goes (default: %(default)s)")  # fmt: skip
    crashes.set_defaults(run_command=run_crashes)


def run_live(options: argparse.Namespace) -> None:
    """hsnn bench live."""
    from hsnn_bench import live_items
    from hsnn_core.errors import RequestError

    from .commands_serving import widths_of

    for name in ("items", "k", "probes", "rate", "turns", "turn_seconds", "requests"):
        if getattr(options, name) <= 0:
            raise RequestError(
                f"--{name.replace('_', '-')}: got {getattr(options, name)}, expected more than 0"
            )
    command = f"hsnn bench live {options.run}"
    for name, given, default in (
        ("items", options.items, 1_000_000),
        ("widths", options.widths, "64,1024"),
        ("k", options.k, 1000),
        ("probes", options.probes, 300),
        ("rate", options.rate, 1000.0),
        ("turns", options.turns, 5),
        ("turn-seconds", options.turn_seconds, 10.0),
        ("requests", options.requests, 1000),
    ):
        if given != default:
            command += f" --{name} {given:g}" if isinstance(given, float) else f" --{name} {given}"
    found = live_items.run_live(
        options.run, options.items, widths_of(options.widths) or [], options.work, k=options.k,
        probes=options.probes, rate=options.rate, turns=options.turns, turn_seconds=options.turn_seconds,
        requests=options.requests, command=command,
    )  # fmt: skip
    written = live_items.report(found, run_name(options.run), options.results)
    print(written.read_text())
    print(f"report: {written}")


def run_filtering(options: argparse.Namespace) -> None:
    """hsnn bench filtering."""
    from hsnn_bench import filtering
    from hsnn_core.errors import SearchError
    from hsnn_train.checkpoint import load_recipe_of_run

    from .commands_training import load_data

    _, users = load_data(load_recipe_of_run(options.run)).requests("test", 1000)
    tally = filtering.run_filtering(options.run, options.queries, options.seed, users)
    command = f"hsnn bench filtering {options.run}"
    for name, given, default in (("queries", options.queries, 1_000_000), ("seed", options.seed, 1)):
        command += "" if given == default else f" --{name} {given}"
    written = filtering.report(tally, command, run_name(options.run), options.seed, options.results)
    print(written.read_text())
    print(f"report: {written}")
    if tally.wrong or tally.short:
        raise SearchError(
            f"{len(tally.wrong)} items came back that must not, {len(tally.short)} requests were short"
        )


def run_crashes(options: argparse.Namespace) -> None:
    """hsnn bench crashes."""
    from hsnn_bench import crashes
    from hsnn_core.errors import LogError

    bench = crashes.Crashes(options.run, options.work, options.seed)
    try:
        outcomes, updates = bench.run(options.kills)
    finally:
        bench.close()
    command = f"hsnn bench crashes {options.run}"
    for name, given, default in (("kills", options.kills, 100), ("seed", options.seed, 1)):
        command += "" if given == default else f" --{name} {given}"
    written = crashes.report(outcomes, updates, command, run_name(options.run), options.results)
    print(written.read_text())
    print(f"report: {written}")
    lost = sum(outcome.lost + outcome.not_served for outcome in outcomes.values())
    if lost:
        raise LogError(f"{lost} updates were lost or not served as the log says")
