"""hsnn bench orchestrator: what a request costs, and where."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

FORMAT = argparse.RawDescriptionHelpFormatter


def add_kinds(kinds: Any) -> None:
    """Register below `hsnn bench`."""
    command = kinds.add_parser(
        "orchestrator", help="the bare search loop, and the same through Triton in process and by BLS",
        formatter_class=FORMAT,
        description="Measure one exported run three ways side by side: a loop without a server, the orchestrator "
        "with its networks in process, and by BLS. Writes orchestrator-RUN.json, .md and .png.",
        epilog="examples:\n  hsnn bench orchestrator runs/ads\n"
        "  hsnn bench orchestrator runs/ads --widths 32,320 --k 1000 --requests 200 --rounds 3",
    )  # fmt: skip
    command.add_argument("run", type=Path, help="run directory that hsnn export finished")
    command.add_argument("--k", type=int, help="items to return (default: the snapshot's)")
    command.add_argument(
        "--widths", help="nodes kept after each layer but the last (default: the snapshot's)"
    )
    command.add_argument(
        "--requests", type=int, default=100, metavar="N", help="held-out users (default: %(default)s)"
    )
    command.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="times each is sent (default: %(default)s)"
    )
    command.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR",
                         help="where the report goes (default: %(default)s)")  # fmt: skip
    command.set_defaults(run_command=run_orchestrator)


def run_orchestrator(options: argparse.Namespace) -> None:
    """hsnn bench orchestrator."""
    from hsnn_bench import orchestrator
    from hsnn_core.errors import RequestError
    from hsnn_train.checkpoint import load_recipe_of_run

    from .commands_serving import widths_of
    from .commands_training import load_data

    for name in ("requests", "rounds"):
        if getattr(options, name) < 1:
            raise RequestError(f"--{name}: got {getattr(options, name)}, expected at least 1")
    dataset = load_data(load_recipe_of_run(options.run))
    wire, _ = dataset.requests("test", options.requests)
    found = orchestrator.measure(
        options.run, wire, widths=widths_of(options.widths), k=options.k, rounds=options.rounds
    )
    command = f"hsnn bench orchestrator {options.run}"
    for name, given, default in (
        ("k", options.k, None),
        ("widths", options.widths, None),
        ("requests", options.requests, 100),
        ("rounds", options.rounds, 3),
    ):
        command += "" if given == default else f" --{name} {given}"
    name = options.run.resolve().name
    written = orchestrator.report(found, command, name, options.results, dataset.simulated)
    print(written.read_text())
    print(f"report: {written}")
