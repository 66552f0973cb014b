"""`hsnn`: the one console command. Each sub-command lives in a module of its own."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence

from hsnn_core.errors import HsnnError

from . import (
    commands_bench,
    commands_data,
    commands_items,
    commands_rollout,
    commands_serving,
    commands_top,
    commands_training,
    commands_tune,
    demo,
)

DESCRIPTION = """HSNN retrieval on NVIDIA Triton: train, export, publish, serve, query.

the whole way on simulated ads:
  hsnn demo

step by step on your own logs (a recipe is one YAML file; see README):
  hsnn data check my.yaml                      load and validate the tables
  hsnn train my.yaml --run runs/mine           train towers and index jointly
  hsnn evaluate runs/mine                      NE, calibration, Recall@K, search recall
  hsnn export runs/mine                        ONNX or TensorRT, parity-gated
  hsnn publish runs/mine --repository repo     one new version, atomically
  hsnn serve --repository repo                 the real Triton on loopback
  hsnn query --url 127.0.0.1:8001 --user '{"history": [3, 17]}'
  hsnn top                                     what it does, live
  hsnn items upsert new.parquet                insert, change, delete items while it serves
"""

OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
WHAT_TO_DO = "make room, or give another folder, and run the command again"


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(
        prog="hsnn", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = (
        commands_data,
        commands_training,
        commands_tune,
        commands_serving,
        commands_top,
        commands_items,
        commands_rollout,
        commands_bench,
        demo,
    )
    for module in modules:
        module.add_commands(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Expected failures print one line on stderr, and one for each note, and exit with 1; Ctrl-C with
    130."""
    options = parser().parse_args(arguments)
    try:
        status = options.run_command(options)
    except HsnnError as error:
        for text in (error, *getattr(error, "__notes__", ())):
            print(f"hsnn: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hsnn: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        print(f"hsnn: {error}; what was complete before is still there: {WHAT_TO_DO}", file=sys.stderr)
        return 1
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
