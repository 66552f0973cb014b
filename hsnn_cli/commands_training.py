"""hsnn train | evaluate | info: what happens before serving."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hsnn_core.errors import SchemaError

from .follow_arguments import add_arguments, check_arguments
from .tables import table

if TYPE_CHECKING:
    import torch

    from hsnn_train.data.dataset import Dataset
    from hsnn_train.recipe import Recipe
    from hsnn_train.warm import WarmStarts

FORMAT = argparse.RawDescriptionHelpFormatter


def add_commands(commands: Any) -> None:
    """Register train, evaluate and info."""
    train = commands.add_parser(
        "train", help="train a recipe into a run directory", formatter_class=FORMAT,
        description="Train an HSNN (towers, ensemble and index together) from a recipe.",
        epilog="examples:\n  hsnn train synthetic --run runs/ads\n  hsnn train my.yaml --run runs/mine "
        "--set train.epochs=4 --set train.seed=7\n  hsnn train --resume runs/mine     go on after Ctrl-C\n"
        "  hsnn train --follow stream --from runs/mine --run runs/live --repository repo --publish-every 5",
    )  # fmt: skip
    train.add_argument("recipe", nargs="?", help="a shipped recipe's name or a YAML file")
    train.add_argument("--run", type=Path, help="run directory to write (default: runs/<recipe>)")
    train.add_argument("--resume", type=Path, metavar="RUN", help="continue that run from its checkpoint")
    train.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
                       help="change one value of the recipe; may be repeated")  # fmt: skip
    train.add_argument("--restart", action="store_true", help="train anew into a run that was interrupted")
    _device(train, "train and evaluate")
    train.add_argument("--no-evaluate", action="store_true", help="stop after training")
    add_arguments(train)
    train.set_defaults(run_command=run_train)

    evaluate = commands.add_parser(
        "evaluate", help="evaluate a run on held-out data", formatter_class=FORMAT,
        description="NE, calibration, Recall@K over the whole corpus, search recall and index health.",
        epilog="examples:\n  hsnn evaluate runs/ads\n  hsnn evaluate runs/ads --split valid",
    )  # fmt: skip
    evaluate.add_argument("run", type=Path, help="run directory")
    evaluate.add_argument("--split", choices=("valid", "test"), default="test")
    _device(evaluate, "evaluate")
    evaluate.set_defaults(run_command=run_evaluate)

    info = commands.add_parser(
        "info", help="describe a run, a recipe, a repository, or the presets", formatter_class=FORMAT,
        description="Describe a thing: a run directory, a recipe, a model repository, or `presets`.",
        epilog="examples:\n  hsnn info presets      FLOPs of the Table 5 presets beside the paper's ratios\n"
        "  hsnn info runs/ads\n  hsnn info synthetic",
    )  # fmt: skip
    info.add_argument("what", help="presets, a run directory, a repository, or a recipe")
    info.set_defaults(run_command=run_info)


def with_overrides(recipe: Recipe, overrides: list[str]) -> Recipe:
    """The recipe with SECTION.KEY=VALUE changes (YAML values). Raises SchemaError for a malformed one."""
    from hsnn_train.recipe import recipe_from_dict

    raw = recipe.to_dict()
    for text in overrides:
        path, equals, value = text.partition("=")
        keys = path.split(".")
        if not equals or not path:
            raise SchemaError(
                f"--set {text!r}: expected SECTION.KEY=VALUE, for example train.epochs=4, or SECTION=VALUE"
            )
        section = raw
        for key in keys[:-1]:
            section = section.setdefault(key, {}) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            raise SchemaError(f"--set {text!r}: {'.'.join(keys[:-1])} is a value, not a section")
        try:
            section[keys[-1]] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SchemaError(f"--set {text!r}: the value is not YAML: {error}") from error
    return recipe_from_dict(raw, recipe.name, recipe.base)


def _device(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--device", default="cpu", metavar="D",
                         help=f"where to {what}: cpu, cuda or cuda:N (default: %(default)s)")  # fmt: skip


def run_train(options: argparse.Namespace) -> None:
    """hsnn train."""
    from hsnn_train.checkpoint import load_recipe_of_run, refuse_followed, refuse_unfinished
    from hsnn_train.device import find_device
    from hsnn_train.recipe import load_recipe

    check_arguments(options)
    if options.follow is not None:
        from .follow import run_follow

        run_follow(options)
        return
    if (options.recipe is None) == (options.resume is None):
        raise SchemaError("hsnn train: give either a recipe or --resume RUN (see hsnn train --help)")
    if options.resume is not None:
        if options.overrides or options.run or options.restart:
            raise SchemaError(
                "hsnn train --resume: goes on with the run's own recipe; leave out --set, --run and --restart"
            )
        refuse_followed(options.resume)
        recipe = load_recipe_of_run(options.resume)
        run = options.resume
    else:
        recipe = with_overrides(load_recipe(options.recipe), options.overrides)
        run = options.run or Path("runs") / recipe.name
        if not options.restart:
            refuse_unfinished(run)
    train_and_evaluate(
        recipe, load_data(recipe), run, resume=options.resume is not None, evaluate=not options.no_evaluate,
        device=find_device(options.device),
    )  # fmt: skip


def load_data(recipe: Recipe) -> Dataset:
    """The recipe's data set; says on the way what a person should know about it."""
    from hsnn_train.data.dataset import load_dataset

    dataset = load_dataset(recipe.schema, recipe.data, recipe.split, recipe.base, recipe.train.seed)
    if dataset.simulated:
        print("data: SIMULATED")
    for note in dataset.notes:
        print(f"data: {note}")
    return dataset


def train_and_evaluate(
    recipe: Recipe,
    dataset: Dataset,
    run: Path,
    resume: bool = False,
    evaluate: bool = True,
    warm: WarmStarts | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Train, calibrate on valid, evaluate on test and plot; returns the metrics that were written to metrics.json,
    an empty dict without ``evaluate`` or without a test split. Raises Interrupted after Ctrl-C. ``warm``,
    ``device`` (the CPU by default): see `Trainer`."""
    from hsnn_train import evaluate as ev
    from hsnn_train.beam import fit_beam, node_pairs
    from hsnn_train.calibration import calibrate
    from hsnn_train.item_order import fit_items, item_lists
    from hsnn_train.plots import index_over_training, node_occupancy, training_curves
    from hsnn_train.trainer import CPU, Interrupted, Trainer, evaluation_batches

    began = time.monotonic()
    trainer = Trainer(recipe, dataset, run, resume=resume, warm=warm, device=device or CPU)
    model = trainer.train()
    try:
        if trainer.calibrated:
            print("calibrated before")
        elif len(dataset.valid):
            batches = evaluation_batches(dataset, recipe)
            seed = recipe.train.seed
            values = ev.pointwise(
                model, batches, dataset.valid, trainer.state, seed, progress="calibrate", parts=True
            )
            calibrate(model, values)
            lists = item_lists(model, dataset, recipe, trainer.state, progress="calibrate the items' order")
            fit_items(model, lists, values, recipe.schema.rank)
            pairs = node_pairs(model, dataset, recipe, trainer.state, progress="calibrate the beam")
            fit_beam(model, pairs, values, recipe.schema.rank)
            trainer.calibrated = True
            trainer.save()
        else:
            print("not calibrated: the split leaves no impressions for valid")
        trained = time.monotonic()
        print(f"plot: {training_curves(trainer.history, run / 'plots' / 'training.png')}")
        print(f"plot: {index_over_training(trainer.history, run / 'plots' / 'index.png')}")
        print(f"plot: {node_occupancy(trainer.state, run / 'plots' / 'occupancy.png')}")
        if not evaluate:
            return {}
        if not len(dataset.test):
            print("not evaluated: the split leaves no impressions for test")
            return {}
        report = ev.evaluate(model, dataset, recipe, trainer.state)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped after training, before the end of calibration and evaluation; the checkpoint is in {run}; "
            f"go on with: hsnn train --resume {run}"
        ) from None
    report["seconds"] = {"train": trained - began, "evaluate": time.monotonic() - trained}
    print_and_keep(report, run)
    return report


def print_and_keep(report: dict[str, Any], run: Path) -> None:
    """Show an evaluation and write it into the run: metrics.json for test, metrics-valid.json for valid."""
    from hsnn_train.checkpoint import write_json

    path = run / ("metrics.json" if report["split"] == "test" else f"metrics-{report['split']}.json")
    write_json(path, report)
    print(describe(report))
    print(f"metrics: {path}")


def run_evaluate(options: argparse.Namespace) -> None:
    """hsnn evaluate."""
    from hsnn_train import evaluate as ev
    from hsnn_train.checkpoint import check_inputs, load_run, refuse_followed
    from hsnn_train.device import find_device

    device = find_device(options.device)
    refuse_followed(options.run)
    run = load_run(options.run)
    data = load_data(run.recipe)
    check_inputs(options.run, data.schema, data.transform, data.items, data.item_keys)
    print_and_keep(ev.evaluate(run.model.to(device), data, run.recipe, run.index, options.split), options.run)


def describe(report: dict[str, Any]) -> str:
    """The evaluation as tables."""
    out = [
        table(
            ["layer", "task", "NE", "calibration"],
            [[r["layer"], r["task"], r["ne"], r["calibration"]] for r in report["pointwise"]],
            f"Held-out impressions ({report['split']}, ensemble of layers 1..l; the hard index is what serves)",
        )
    ]
    if report["index"]:
        out.append(
            table(
                ["layer", "codewords", "used", "perplexity", "largest share", "soft≠hard", "nodes"],
                [
                    [r["layer"], r["codewords"], r["used"], r["perplexity"], r["largest_share"],
                     r["disagreement"], r["nodes"]]
                    for r in report["index"]
                ],
                "Index health (hard assignment)",
            )
        )  # fmt: skip
    got = report["retrieval"]
    if not got["requests"]:
        return "\n\n".join([*out, "Retrieval: no user has a positive in this split"])
    names = list(got["search"])
    among = f"all {got['corpus']:,} items"
    if got.get("candidates", "all") != "all":  # runs evaluated earlier do not say
        among = (
            f"{got['candidates_per_request']:,.0f} candidates ({got['candidates']}) of {got['corpus']:,} items, "
            f"{got['positives_dropped']} of {got['positives']} positives are none"
        )
    out.append(
        table(
            ["", *names],
            [
                ["layer-wise search", *got["search"].values()],
                ["exhaustive twin", *got["exhaustive"].values()],
                ["search recall", *(got["search_recall"].get(n.removeprefix("recall")) for n in names)],
            ],
            f"Retrieval over {among}, {got['requests']} requests, widths {got['widths']}, "
            f"{100 * got['scored_share']:.1f}% of the items scored",
        )
    )
    return "\n\n".join(out)


def run_info(options: argparse.Namespace) -> None:
    """hsnn info."""
    from hsnn_train.recipe import load_recipe

    path = Path(options.what)
    if options.what == "presets":
        print(describe_presets())
    elif (path / "checkpoint.pt").exists():
        print(describe_run(path))
    elif (path / "hsnn_retrieve").is_dir():
        from export.repository import versions

        found = versions(path)
        print(f"repository {path}: versions {', '.join(map(str, found)) or 'none'}")
    else:
        recipe = load_recipe(options.what)
        print(yaml.safe_dump(recipe.to_dict(), sort_keys=False).rstrip())


def describe_presets() -> str:
    """The preset table: counted FLOPs beside the paper's ratios."""
    from hsnn_train.flops import preset_table

    return table(
        ["preset", "user (per request)", "item (offline)", "pair", "single inference", "vs small", "paper"],
        [
            [r.name, r.flops.user_tower, r.flops.item_tower, r.flops.pair, r.flops.single_inference, r.ratio,
             r.paper_ratio]
            for r in preset_table()
        ],
        "FLOPs on Table 5's feature counts (matrix products; a multiply-add is two)",
    )  # fmt: skip


def describe_stream(path: Path) -> str:
    """What a run that follows a stream has seen."""
    from hsnn_train.checkpoint import load_checkpoint, load_recipe_of_run
    from hsnn_train.follow_report import read_rows

    seen = load_checkpoint(path / "checkpoint.pt", load_recipe_of_run(path).schema)["follow"]
    bad = ", ".join(seen["bad"])
    lines = [
        f"follows {seen['stream']}, began from {seen['base']}",
        f"{len(seen['files'])} files, {seen['seen']:,} impressions, "
        f"{seen['dropped']:,} left out (items that the items table lacks), {len(seen['bad'])} bad files"
        + (f": {bad}" if bad else ""),
    ]
    rows = [
        [row["file"], row["impressions"], own["task"], own["ne"], own["calibration"]]
        for row in read_rows(path)[-5:]
        for own in row["pointwise"]
        if own["layer"] == row["pointwise"][-1]["layer"]
    ]
    title = "The latest files, predicted before they were learnt from"
    return "\n".join([*lines, "", table(["file", "impressions", "task", "NE", "calibration"], rows, title)])


def describe_run(path: Path) -> str:
    """One screen about a run."""
    from hsnn_train.checkpoint import follows_stream, load_run

    run = load_run(path)
    parameters = sum(p.numel() for p in run.model.parameters())
    lines = [
        f"run {path}: recipe {run.recipe.name}, schema {run.schema.hash}, step {run.step}"
        + ("" if run.finished else f"; not finished, go on with: hsnn train --resume {path}"),
        f"{run.model.layers} layers: {', '.join(run.recipe.model.layers)}; {parameters:,} parameters; "
        f"{len(run.item_ids):,} items; index {run.recipe.model.index} {list(run.recipe.model.codebooks)}",
    ]
    if follows_stream(path):
        lines += ["", describe_stream(path)]
    metrics = path / "metrics.json"
    if metrics.exists():
        lines += ["", describe(json.loads(metrics.read_text()))]
    return "\n".join(lines)
