"""hsnn data: look at, check and generate data."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from .tables import table


def add_commands(commands: Any) -> None:
    """Register data."""
    data = commands.add_parser(
        "data", help="generate simulated ads logs, or check your own tables",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Simulated ads logs, and checks of tables before training.",
        epilog="examples:\n  hsnn data synthetic --out ads/          three Parquet tables, simulated\n"
        "  hsnn data check my.yaml                  load, validate, split; says what training will see",
    )  # fmt: skip
    kinds = data.add_subparsers(dest="kind", required=True, metavar="WHAT")
    synthetic = kinds.add_parser(
        "synthetic", help="write simulated impressions, users and items",
        epilog="example: hsnn data synthetic --out ads/",
    )  # fmt: skip
    synthetic.add_argument("--out", type=Path, required=True, help="folder to write the three tables to")
    synthetic.add_argument("--seed", type=int, default=1)
    synthetic.set_defaults(run_command=run_synthetic)
    check = kinds.add_parser(
        "check", help="load a recipe's tables and say what training will see",
        epilog="example: hsnn data check shop.yaml",
    )  # fmt: skip
    check.add_argument("recipe", help="a shipped recipe's name or a YAML file")
    check.set_defaults(run_command=run_check)


def run_synthetic(options: argparse.Namespace) -> None:
    """hsnn data synthetic."""
    from hsnn_train.data.synthetic import WorldConfig, write_synthetic

    for path in write_synthetic(options.out, WorldConfig(seed=options.seed)).values():
        print(f"simulated: {path}")


def run_check(options: argparse.Namespace) -> None:
    """hsnn data check."""
    from hsnn_train.recipe import load_recipe

    from .commands_training import load_data

    recipe = load_recipe(options.recipe)
    began = time.monotonic()
    dataset = load_data(recipe)
    rows = []
    for name in ("train", "valid", "test"):
        examples = getattr(dataset, name)
        rates = examples.labels.mean(0) if len(examples.labels) else [None] * len(recipe.schema.tasks)
        rows.append([name, len(examples.item_row), *(None if r is None else float(r) for r in rates)])
    header = ["split", "impressions", *(f"{task.name} rate" for task in recipe.schema.tasks)]
    print(
        table(header, rows, f"{recipe.name}: {len(dataset.item_keys):,} items, schema {recipe.schema.hash}")
    )
    layouts = [(owner, recipe.schema.layout(owner)) for owner in ("user", "item")]
    print()
    print(
        table(["owner", "dense width", "id slots"], [[o, la.dense_width, la.ids_width] for o, la in layouts])
    )
    print(f"\nloaded in {time.monotonic() - began:.1f} s")
