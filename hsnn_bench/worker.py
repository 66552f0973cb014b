"""One job in a process of its own: `python -m hsnn_bench.worker FOLDER DEVICE`, started by `hsnn_bench.workers`.

Trains and evaluates the recipe of FOLDER/job.json into FOLDER, on DEVICE and with one torch thread, going on from a
checkpoint that is there. SIGINT stops it with a checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import yaml

from hsnn_cli.commands_training import load_data, train_and_evaluate
from hsnn_cli.provenance import commit
from hsnn_core.errors import DataError, HsnnError
from hsnn_core.files import write_bytes
from hsnn_train.checkpoint import write_json
from hsnn_train.device import device_name, find_device
from hsnn_train.recipe import recipe_from_dict
from hsnn_train.warm import WarmStarts

from .jobs import CHECKPOINT, DONE, JOB, evaluation_key
from .widths import SWEEP

WATCH_SECONDS = 2.0


def work(folder: Path, device: torch.device) -> None:
    """Train or go on, evaluate, and write done.json last. Raises HsnnError."""
    began = time.monotonic()
    for name in (DONE, SWEEP):
        (folder / name).unlink(missing_ok=True)
    raw = json.loads((folder / JOB).read_text())
    recipe = recipe_from_dict(raw, folder.name, folder)
    dataset = load_data(recipe)
    resume = (folder / CHECKPOINT).exists()
    if resume:  # trained to the end perhaps, and only evaluated anew at other widths
        write_bytes(folder / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode())
    warm = WarmStarts(folder.parent)
    if not train_and_evaluate(recipe, dataset, folder, resume=resume, warm=warm, device=device):
        raise DataError("the split leaves no impressions for test, so there is nothing for a table")
    minutes = (time.monotonic() - began) / 60
    evaluated = evaluation_key(recipe, folder.parents[1])
    found = {"evaluated": evaluated, "commit": commit(), "minutes": minutes, "device": device_name(device)}
    write_json(folder / DONE, found)


def end_with_parent() -> None:
    """Interrupt this process when the one that started it is gone, be it killed: nobody would read its answer."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """The process: 0 done, 1 failed (one line on stderr), 130 interrupted."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
    end_with_parent()
    torch.set_num_threads(1)
    try:
        work(Path(sys.argv[1]), find_device(sys.argv[2]))
    except HsnnError as error:
        print(f"hsnn bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
