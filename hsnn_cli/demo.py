"""hsnn demo and hsnn pipeline: the whole way with one command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .tables import cell, table

FORMAT = argparse.RawDescriptionHelpFormatter


def add_commands(commands: Any) -> None:
    """Register demo and pipeline."""
    demo = commands.add_parser(
        "demo", help="simulated ads → trained HSNN → Triton → top 10, in minutes", formatter_class=FORMAT,
        description="Train a 3-layer HSNN with a jointly learnt index on a seeded, simulated ads world, export and "
        "publish it, serve it with the real Triton on free loopback ports, and query it.",
        epilog="examples:\n  hsnn demo\n  hsnn demo --keep            leave the server running",
    )  # fmt: skip
    demo.add_argument(
        "--keep", action="store_true", help="leave the server running and print how to query it"
    )
    demo.add_argument(
        "--work", type=Path, default=Path("runs/demo"), help="folder to work in (default: %(default)s)"
    )
    demo.set_defaults(run_command=run_demo)

    pipeline = commands.add_parser(
        "pipeline", help="the same for any recipe, with the served results checked against offline search",
        formatter_class=FORMAT,
        description="train → evaluate → export → publish → serve → query for a recipe; writes report.json.",
        epilog="examples:\n  hsnn pipeline ml-100k --work runs/ml-100k\n"
        "  hsnn pipeline my.yaml --mode in_process --users 500",
    )  # fmt: skip
    pipeline.add_argument("recipe", help="a shipped recipe's name or a YAML file")
    pipeline.add_argument("--work", type=Path, help="folder to work in (default: runs/<recipe>)")
    pipeline.add_argument(
        "--users", type=int, default=200, help="held-out users to query (default: %(default)s)"
    )
    pipeline.add_argument("--mode", choices=("bls", "in_process"), default="bls")
    pipeline.add_argument("--results", type=Path, help="folder to put <recipe>.json and <recipe>.md into")
    pipeline.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
                          help="change one value of the recipe; may be repeated")  # fmt: skip
    pipeline.set_defaults(run_command=run_pipeline_command)


def run_pipeline_command(options: argparse.Namespace) -> None:
    """hsnn pipeline."""
    from hsnn_train.recipe import load_recipe

    from .commands_training import with_overrides
    from .pipeline import run_pipeline

    recipe = with_overrides(load_recipe(options.recipe), options.overrides)
    work = options.work or Path("runs") / recipe.name
    report = run_pipeline(recipe, work, options.users, mode=options.mode)
    print()
    print(summary(report))
    print(f"report: {work / 'report.json'}")
    if options.results is not None:
        from hsnn_core.files import write_bytes
        from hsnn_train.checkpoint import write_json

        options.results.mkdir(parents=True, exist_ok=True)
        write_json(options.results / f"{recipe.name}.json", report)
        command = " ".join(
            ["hsnn pipeline", options.recipe, f"--mode {options.mode} --users {options.users}"]
            + [f"--set {change}" for change in options.overrides]
        )
        page = options.results / f"{recipe.name}.md"
        write_bytes(page, f"# {recipe.name}\n\n`{command}`\n\n```\n{summary(report)}\n```\n".encode())
        print(f"results: {page}")


def summary(report: dict[str, Any]) -> str:
    """What a pipeline run found, as one table."""
    metrics, served, offline = report["metrics"], report["served"], report["offline"]
    got = metrics["retrieval"]
    last = max(row["layer"] for row in metrics["pointwise"])
    rows: list[list[Any]] = [
        ["impressions (train / valid / test)", " / ".join(f"{n:,}" for n in metrics["rows"].values())],
        ["items", f"{metrics['items']:,}"],
        ["minutes", f"{report['minutes']:.1f}"],
    ]
    rows += [
        [f"NE, {r['task']} (calibration)", f"{cell(r['ne'])} ({cell(r['calibration'])})"]
        for r in metrics["pointwise"]
        if r["layer"] == last
    ]
    rows += [
        [f"{name}, search (exhaustive)", f"{got['search'][name]:.4f} ({got['exhaustive'][name]:.4f})"]
        for name in ("recall@10", "recall@100")
        if name in got["search"]
    ]  # fmt: skip
    rows += [
        [f"search recall@100, {100 * got['scored_share']:.1f}% of the items scored",
         f"{got['search_recall'].get('@100', float('nan')):.4f}"],
        [f"served, p50 / p99 at the client, top {served['k']}",
         f"{served['p50_ms_client']:.2f} / {served['p99_ms_client']:.2f} ms"],
        ["served = offline search, users", f"{offline['users'] - offline['mismatched']} of {offline['users']}, "
         f"largest score difference {offline['largest_score_difference']:.1e}"],
        ["full-width search = exhaustive", offline["full_width_equals_exhaustive"]],
    ]  # fmt: skip
    made = "SIMULATED data, " if report["simulated"] else ""
    title = (
        f"{report['recipe']}: {made}{report['machine']}, {report['date']}, commit {report['commit']}, "
        f"seed {report['seed']}, mode {report['mode']}"
    )
    return table(["figure", "value"], rows, title)


def run_demo(options: argparse.Namespace) -> None:
    """hsnn demo."""
    import numpy as np

    from clients.retrieval import RetrievalClient
    from export.rollout import promote
    from hsnn_server.triton import TritonServer
    from hsnn_train.plots import latency_per_layer
    from hsnn_train.recipe import load_recipe

    from .commands_training import load_data
    from .pipeline import ask, check_against_offline, publish_run

    recipe = load_recipe("synthetic")
    work: Path = options.work
    print("A simulated ads world: users, ads, impressions, clicks and conversions are all made up.\n")
    dataset = load_data(recipe)
    _, repository, _ = publish_run(recipe, dataset, work, "bls")
    requests, encoded = dataset.requests("test", 100)
    state = work / "server.json"
    server = TritonServer.start_detached(repository, state, log_file=work / "triton.log")
    keep = False
    try:
        promote(repository, server.admin)
        url = server.urls.grpc
        with RetrievalClient(url, timeout=30.0) as client:
            served = ask(client, requests, k=100)
            print(f"\nTriton serves version {served.results[0].version} at {url}; the top 10 of three users:")
            for user in range(3):
                print_hits(user, served.results[user])
        offline = check_against_offline(work / "run", encoded, served, 100)
        names, stages = served.stages()
        middle = np.median(stages, axis=0) / 1000
        print()
        print(table(["stage", "milliseconds, median"], [[n, float(m)] for n, m in zip(names, middle)],
                    f"Where the time of {len(stages)} requests went, seen by the server"))  # fmt: skip
        print(f"seen by the client: {np.median(served.seconds) * 1000:.2f} ms")
        print(
            f"recall of the layer-wise search against exhaustive scoring, top 100: "
            f"{offline['served_search_recall']:.4f}; served = offline search for "
            f"{offline['users'] - offline['mismatched']} of {offline['users']} users"
        )
        plot = latency_per_layer(names, stages, work / "run" / "plots" / "latency.png")
        print(f"plots: {', '.join(str(p) for p in sorted(plot.parent.glob('*.png')))}")
        keep = options.keep
        if keep:
            print(
                f"\nthe server goes on (process {server.pid}). Ask it:\n  hsnn query --url {url} --user '{{}}'"
            )
            print(f"stop it:\n  hsnn serve --stop {state}")
    finally:
        if not keep:
            server.stop()


def print_hits(number: int, results: Any) -> None:
    """One user's hits as a table, with the milliseconds per layer."""
    hits = results[0][:10]
    tasks = list(hits[0].scores) if hits else []
    rows = [[h.item_id, *(h.scores[t] for t in tasks)] for h in hits]
    t = results.timings
    spent = "  ".join(f"layer {i} {us / 1000:.2f}" for i, us in enumerate(t.layers, start=1)) if t else ""
    print()
    print(table(["item", *(f"P({t})" for t in tasks)], rows, f"user {number}: ms per layer: {spent}"))
