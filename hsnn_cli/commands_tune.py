"""hsnn tune: the beam's widths from measured recall and cost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

FORMAT = argparse.RawDescriptionHelpFormatter


def add_commands(commands: Any) -> None:
    """Register tune."""
    tune = commands.add_parser(
        "tune", help="pick the beam's widths from measured recall and cost", formatter_class=FORMAT,
        description="Search an exported run at many widths, next to its exhaustive twin, and write the cheapest widths "
        "that reach the target into the run's recipe. Export and publish it again to serve them.",
        epilog="examples:\n  hsnn tune runs/ads --target-recall 0.98\n"
        "  hsnn tune runs/ads --target-recall 0.95 --target-latency 10 --k 100",
    )  # fmt: skip
    tune.add_argument("run", type=Path, help="run directory that hsnn export finished")
    tune.add_argument("--target-recall", type=float, default=0.98, metavar="R",
                      help="share of the exhaustive top K to be found (default: %(default)s)")  # fmt: skip
    tune.add_argument(
        "--target-latency", type=float, metavar="MS", help="milliseconds per request, median of the bare loop"
    )
    tune.add_argument("--k", type=int, help="items to return (default: the snapshot's)")
    tune.add_argument(
        "--requests", type=int, default=50, metavar="N", help="validation users (default: %(default)s)"
    )
    tune.set_defaults(run_command=run_tune)


def run_tune(options: argparse.Namespace) -> None:
    """hsnn tune."""
    from export.exported import open_export
    from hsnn_bench.plots import recall_of_widths
    from hsnn_bench.width_search import find
    from hsnn_core.bundle import Bundle
    from hsnn_core.errors import RequestError
    from hsnn_core.onnx_runner import OnnxRunner
    from hsnn_train.checkpoint import load_recipe_of_run, set_widths

    from .commands_training import load_data
    from .tables import table

    for name in ("requests", "k"):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise RequestError(f"--{name}: got {given}, expected at least 1")
    exported = open_export(options.run)
    bundle = Bundle.open(exported.bundle)
    files = [exported.path / graph.file for graph in exported.graphs]
    k = min(options.k or bundle.manifest["k"], bundle.index.items)
    dataset = load_data(load_recipe_of_run(options.run))
    # Widths are a choice; what is reported of them is measured on test.
    _, users = dataset.requests("valid", options.requests)
    chosen, points = find(
        bundle.index, bundle.scorer(OnnxRunner(files[0], files[2:])), users, k, bundle.schema.rank,
        options.target_recall, options.target_latency,
    )  # fmt: skip
    rows = [
        [", ".join(map(str, p.widths)), p.recall, p.ms, p.p10, p.p90, round(p.candidates[-1]),
         "chosen" if p is chosen else "front" if p.best else ""]
        for p in points
    ]  # fmt: skip
    title = (
        f"search recall@{k} on {len(users)} validation users{', simulated data' if dataset.simulated else ''}"
    )
    print(table(["widths", "recall", "ms", "p10", "p90", "items scored", ""], rows, title))
    plot = recall_of_widths(points, chosen, title, options.run / "plots" / "widths.png")
    set_widths(options.run, chosen.widths)
    print(f"plot: {plot}")
    print(f"written into {options.run / 'recipe.yaml'}: search.widths {list(chosen.widths)}")
    print(f"serve them with: hsnn export {options.run}, then hsnn publish")
