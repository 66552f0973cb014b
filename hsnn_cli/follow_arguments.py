"""The arguments of hsnn train that belong to --follow, apart from what they start: that takes seconds to import."""

from __future__ import annotations

import argparse
from pathlib import Path

from hsnn_core.errors import SchemaError

from .connection import add_tls


def add_arguments(train: argparse.ArgumentParser) -> None:
    """The arguments of hsnn train that belong to --follow."""
    group = train.add_argument_group("following a stream")
    group.add_argument("--follow", type=Path, metavar="FOLDER", help="learn from Parquet files of impressions that "
                       "appear there (by rename), by name, each once; until Ctrl-C")  # fmt: skip
    group.add_argument("--from", type=Path, metavar="RUN", dest="base", help="finished run to begin from; it stays as "
                       "it is (not needed to go on)")  # fmt: skip
    group.add_argument("--once", action="store_true", help="stop after the files that are there")
    group.add_argument(
        "--repository", type=Path, help="model repository for the snapshots (default: none are made)"
    )
    group.add_argument(
        "--publish-every", type=float, metavar="MINUTES", help="between snapshots (default: 10)"
    )
    group.add_argument("--engine", help="of the snapshots, as in hsnn export (default: onnxruntime)")
    group.add_argument(
        "--embeddings", choices=("float32", "float16"), help="as in hsnn export (default: float32)"
    )
    group.add_argument("--url", help="host:port of a running Triton's gRPC that is to serve the snapshots")
    group.add_argument("--key-file", type=Path, metavar="FILE", help="file with that server's admin key")
    group.add_argument("--sign-key", type=Path, metavar="FILE", help="as in hsnn publish")
    add_tls(train)


def check_arguments(options: argparse.Namespace) -> None:
    """SchemaError for arguments that do not go together."""
    if options.follow is None:
        given = (
            "base",
            "once",
            "repository",
            "publish_every",
            "engine",
            "embeddings",
            "url",
            "key_file",
            "sign_key",
            "tls_ca",
            "tls_cert",
            "tls_key",
        )
        used = [name for name in given if getattr(options, name)]
        if used:
            names = ", ".join("--from" if name == "base" else f"--{name.replace('_', '-')}" for name in used)
            raise SchemaError(f"{names}: is for following a stream; give --follow FOLDER too")
        return
    if options.recipe or options.resume or options.overrides or options.restart or options.no_evaluate:
        raise SchemaError(
            "hsnn train --follow: goes on with a finished run's own recipe; leave out RECIPE, --resume, --set, "
            "--restart and --no-evaluate"
        )
    if options.run is None:
        raise SchemaError("hsnn train --follow: --run is missing; name the folder of the run that follows")
    if options.publish_every is not None and not options.publish_every > 0:
        raise SchemaError(f"--publish-every: got {options.publish_every:g}, expected minutes above 0")
    for name in ("publish_every", "engine", "embeddings", "url", "sign_key"):
        if getattr(options, name) is not None and options.repository is None:
            raise SchemaError(f"--{name.replace('_', '-')}: is about snapshots; give their --repository too")
    if (options.url is None) != (options.key_file is None):
        raise SchemaError("--url and --key-file: give both (to serve every snapshot at once) or neither")
