"""hsnn bench orchestrator | breakdown | scale | targeting | gpu: what a request costs, where, and on how large a
corpus."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from .provenance import run_name

FORMAT = argparse.RawDescriptionHelpFormatter


def add_kinds(kinds: Any) -> None:
    """Register below `hsnn bench`."""
    for kind, text, description, runner in (
        (
            "orchestrator", "the bare search loop, and the same through Triton in process and by BLS",
            "Measure one exported run three ways side by side: a loop without a server, the orchestrator with its "
            "networks in process, and by BLS. Writes orchestrator-RUN.json, .md and .png.", run_orchestrator,
        ),
        (
            "breakdown", "where the microseconds of a request go, by layer and step, through Triton and without it",
            "Take requests over one exported run apart: steps of the search by layer, what Triton and the client add, "
            "in process and by BLS. Writes breakdown-RUN.json, .md and .png.", run_breakdown,
        ),
    ):  # fmt: skip
        command = kinds.add_parser(
            kind, help=text, formatter_class=FORMAT, description=description,
            epilog=f"examples:\n  hsnn bench {kind} runs/ads\n"
            f"  hsnn bench {kind} runs/ads --widths 32,320 --k 1000 --requests 200 --rounds 3",
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
        command.set_defaults(run_command=runner)

    scale = kinds.add_parser(
        "scale", help="corpora of a hundred thousand to ten million ads: build, load, recall and latency",
        formatter_class=FORMAT,
        description="Grow the simulated world of a run, index it by the run's item tower and codebooks, tune the "
        "widths and measure. Writes scale-RUN.json, .md and .png. Ctrl-C stops it, and the same command goes on.",
        epilog="examples:\n  hsnn bench scale runs/ads-scale\n"
        "  hsnn bench scale runs/ads-scale --items 50000 --items 200000 --k 100\n\n"
        "Once the corpora are built, most of the time goes into exhaustive scoring, once for each request that widths\n"
        "are chosen or recall is taken on: some seconds each at ten million ads.",
    )  # fmt: skip
    scale.add_argument("run", type=Path, help="run directory of a simulated world that hsnn export finished")
    scale.add_argument("--items", type=int, action="append", default=[], metavar="V",
                       help="size of a corpus; may be repeated (default: 100,000, 1 million, 10 million)")  # fmt: skip
    scale.add_argument("--k", type=int, default=1000, help="items to return (default: %(default)s)")
    scale.add_argument(
        "--target-recall", type=float, default=0.98, metavar="R", help="search recall (default: %(default)s)"
    )
    scale.add_argument(
        "--requests", type=int, default=100, metavar="N", help="timed test requests (default: %(default)s)"
    )
    scale.add_argument("--tuned-on", type=int, default=30, metavar="N",
                       help="validation requests that widths are chosen on (default: %(default)s)")  # fmt: skip
    scale.add_argument("--recall-requests", type=int, default=60, metavar="N",
                       help="test requests that recall is taken on (default: %(default)s)")  # fmt: skip
    scale.add_argument("--work", type=Path, default=Path("runs/scale"), metavar="DIR",
                       help="where corpora are kept, 7 GB at ten million (default: %(default)s)")  # fmt: skip
    scale.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR",
                       help="where the report goes (default: %(default)s)")  # fmt: skip
    scale.set_defaults(run_command=run_scale)

    targeting = kinds.add_parser(
        "targeting", help="filtered searches beside an unfiltered one: cost, recall, results that come back",
        formatter_class=FORMAT,
        description="Grow the simulated world of a run, and search it with the world's own targeting and with drawn "
        "filters that let 100% to 0.1% of the items through. Writes targeting-RUN.json, .md and .png.",
        epilog="examples:\n  hsnn bench targeting runs/ads-scale\n"
        "  hsnn bench targeting runs/ads-scale --items 100000 --widths 256,2048 --requests 20",
    )  # fmt: skip
    targeting.add_argument(
        "run", type=Path, help="run directory of a simulated world that hsnn export finished"
    )
    targeting.add_argument(
        "--items", type=int, default=1_000_000, metavar="V", help="ads (default: %(default)s)"
    )
    targeting.add_argument("--widths", default="64,1024", help="nodes kept after each layer but the last (default: "
                           "%(default)s, what `hsnn bench scale` finds for a million)")  # fmt: skip
    targeting.add_argument("--k", type=int, default=1000, help="items to return (default: %(default)s)")
    targeting.add_argument(
        "--requests", type=int, default=30, metavar="N", help="held-out users (default: %(default)s)"
    )
    targeting.add_argument("--work", type=Path, default=Path("runs/scale"), metavar="DIR",
                           help="where corpora are kept (default: %(default)s)")  # fmt: skip
    targeting.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR",
                           help="where the report goes (default: %(default)s)")  # fmt: skip
    targeting.set_defaults(run_command=run_targeting)

    gpu = kinds.add_parser(
        "gpu", help="a layer of nodes scored on a GPU, beside what the card can do at all", formatter_class=FORMAT,
        description="Score the nodes of one layer with MoNNs of the paper's Table 5 on a CUDA GPU, and set the time "
        "against the card's measured ceilings. Writes gpu-CARD.json and .md. Needs a CUDA build of torch.",
        epilog="examples:\n  hsnn bench gpu\n  hsnn bench gpu --preset large --batch 1 --batch 8 --nodes 4000",
    )  # fmt: skip
    gpu.add_argument("--preset", action="append", default=[], metavar="P", dest="presets",
                     help="may be repeated (default: small, medium, large)")  # fmt: skip
    gpu.add_argument("--batch", type=int, action="append", default=[], metavar="B", dest="batches",
                     help="users scored together; may be repeated (default: 1 and 32)")  # fmt: skip
    gpu.add_argument("--nodes", type=int, default=1000, metavar="N", help="per user (default: %(default)s)")
    gpu.add_argument("--device", default="cuda", metavar="D", help="cuda or cuda:N (default: %(default)s)")
    gpu.add_argument("--results", type=Path, default=Path("docs/results"), metavar="DIR",
                     help="where the report goes (default: %(default)s)")  # fmt: skip
    gpu.set_defaults(run_command=run_gpu)


def run_gpu(options: argparse.Namespace) -> None:
    """hsnn bench gpu."""
    from hsnn_bench import gpu_scorer
    from hsnn_core.errors import RequestError

    unknown = [name for name in options.presets if name not in gpu_scorer.MONNS]
    if unknown:
        raise RequestError(
            f"--preset: got {', '.join(unknown)}, expected one of {', '.join(gpu_scorer.MONNS)}"
        )
    if min([options.nodes, *options.batches]) < 1:
        raise RequestError("--nodes, --batch: expected at least 1")
    asked = gpu_scorer.GpuOptions(device=options.device, nodes=options.nodes)
    asked = replace(asked, presets=options.presets or asked.presets, batches=options.batches or asked.batches)
    command = "hsnn bench gpu" + "".join(f" --preset {name}" for name in options.presets)
    command += "".join(f" --batch {batch}" for batch in options.batches)
    command += "" if options.nodes == 1000 else f" --nodes {options.nodes}"
    path = gpu_scorer.run_gpu(asked, command, options.results)
    print(f"{path.read_text()}\nreport: {path}")


def run_orchestrator(options: argparse.Namespace) -> None:
    """hsnn bench orchestrator."""
    from hsnn_bench import orchestrator

    _run_ways(options, "orchestrator", orchestrator.measure, orchestrator.report)


def run_breakdown(options: argparse.Namespace) -> None:
    """hsnn bench breakdown."""
    from hsnn_bench import breakdown

    _run_ways(options, "breakdown", breakdown.measure, breakdown.report)


def _run_ways(options: argparse.Namespace, kind: str, measure: Any, report: Any) -> None:
    from hsnn_core.errors import RequestError
    from hsnn_train.checkpoint import load_recipe_of_run

    from .commands_serving import widths_of
    from .commands_training import load_data

    for name in ("requests", "rounds"):
        if getattr(options, name) < 1:
            raise RequestError(f"--{name}: got {getattr(options, name)}, expected at least 1")
    dataset = load_data(load_recipe_of_run(options.run))
    wire, _ = dataset.requests("test", options.requests)
    found = measure(options.run, wire, widths=widths_of(options.widths), k=options.k, rounds=options.rounds)
    command = f"hsnn bench {kind} {options.run}"
    for name, given, default in (
        ("k", options.k, None),
        ("widths", options.widths, None),
        ("requests", options.requests, 100),
        ("rounds", options.rounds, 3),
    ):
        command += "" if given == default else f" --{name} {given}"
    name = run_name(options.run)
    written = report(found, command, name, options.results, dataset.simulated)
    print(written.read_text())
    print(f"report: {written}")


def run_scale(options: argparse.Namespace) -> None:
    """hsnn bench scale."""
    from hsnn_bench import scale
    from hsnn_core.errors import RequestError
    from hsnn_train.checkpoint import load_recipe_of_run

    from .commands_training import load_data

    for name in ("requests", "tuned_on", "recall_requests", "k"):
        if getattr(options, name) < 1:
            raise RequestError(
                f"--{name.replace('_', '-')}: got {getattr(options, name)}, expected at least 1"
            )
    sizes = sorted(set(options.items)) or [100_000, 1_000_000, 10_000_000]
    dataset = load_data(load_recipe_of_run(options.run))
    choosing, _ = dataset.requests("valid", options.tuned_on)
    asked, _ = dataset.requests("test", max(options.requests, options.recall_requests))
    found = scale.run_scale(
        options.run,
        sizes,
        choosing,
        asked,
        options.work,
        k=options.k,
        target_recall=options.target_recall,
        recall_requests=options.recall_requests,
    )
    command = f"hsnn bench scale {options.run}" + "".join(f" --items {items}" for items in options.items)
    for name, given, default in (
        ("k", options.k, 1000),
        ("target-recall", options.target_recall, 0.98),
        ("requests", options.requests, 100),
        ("tuned-on", options.tuned_on, 30),
        ("recall-requests", options.recall_requests, 60),
    ):
        command += "" if given == default else f" --{name} {given}"
    written = scale.report(found, command, run_name(options.run), options.results)
    print(written.read_text())
    print(f"report: {written}")


def run_targeting(options: argparse.Namespace) -> None:
    """hsnn bench targeting."""
    from hsnn_bench import targeting
    from hsnn_core.errors import RequestError
    from hsnn_train.checkpoint import load_recipe_of_run

    from .commands_serving import widths_of
    from .commands_training import load_data

    for name in ("items", "requests", "k"):
        if getattr(options, name) < 1:
            raise RequestError(f"--{name}: got {getattr(options, name)}, expected at least 1")
    dataset = load_data(load_recipe_of_run(options.run))
    wire, _ = dataset.requests("test", options.requests)
    found = targeting.measure(
        options.run, options.items, wire, widths_of(options.widths) or [], options.work, options.k,
        now=float(dataset.test.time.max()),
    )  # fmt: skip
    command = f"hsnn bench targeting {options.run}"
    for name, given, default in (
        ("items", options.items, 1_000_000),
        ("widths", options.widths, "64,1024"),
        ("k", options.k, 1000),
        ("requests", options.requests, 30),
    ):
        command += "" if given == default else f" --{name} {given}"
    written = targeting.report(found, command, run_name(options.run), options.results)
    print(written.read_text())
    print(f"report: {written}")
