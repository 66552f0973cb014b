"""Acknowledged item updates that a killed writer loses: none, or the log is not durable.

A writer process appends and says what was acknowledged; it is killed -9 at a random moment, and what it said is
compared with what a reader finds. Run as a program (`python -m hsnn_bench.log_kills LOG SEED`) this is the writer: one
line `item sequence` on standard output for every acknowledged update.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hsnn_core.item_log import ItemLog, LogReader
from hsnn_core.item_updates import Update

SCHEMA_HASH = "0123456789abcdef"
ITEMS = 200  # few, so that most updates replace one
LONGEST_LIFE = 0.15  # seconds from a writer's first acknowledgement to its end
_ROOT = Path(__file__).resolve().parents[1]


@dataclass
class KillReport:
    """``kills`` writers were killed after ``acknowledged`` updates; ``lost``: those of which the log then had neither
    themselves nor a newer one of their item; ``misread``: deaths after which a reader that had followed all along and
    one that began anew did not find the same."""

    kills: int = 0
    acknowledged: int = 0
    lost: int = 0
    misread: int = 0


def kill_writers(
    path: Path, kills: int, seed: int = 0, progress: Callable[[int], object] = lambda count: None
) -> KillReport:
    """Start and kill ``kills`` writers, one after the other, on the log at ``path``."""
    rng = random.Random(seed)
    report = KillReport()
    acknowledged: dict[int, int] = {}
    followed: dict[int, int] = {}
    position = 0
    with LogReader(path, SCHEMA_HASH) as reader:
        for number in range(kills):
            for item, sequence in _killed_writer(path, number, rng.uniform(0, LONGEST_LIFE)):
                acknowledged[item] = max(sequence, acknowledged.get(item, -1))
                report.acknowledged += 1
            for entry in reader.since(position, 10**9):
                position, followed[entry.item] = entry.position, entry.sequence
            with LogReader(path, SCHEMA_HASH) as fresh:
                anew = {entry.item: entry.sequence for entry in fresh.since(0, 10**9)}
            report.kills += 1
            report.misread += anew != followed
            report.lost += sum(anew.get(item, -1) < sequence for item, sequence in acknowledged.items())
            progress(1)
    return report


def _killed_writer(path: Path, seed: int, seconds: float) -> list[tuple[int, int]]:
    """Item and sequence of every update that a writer said was acknowledged, before it was killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hsnn_bench.log_kills", str(path), str(seed)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
    )
    assert process.stdout is not None
    first = process.stdout.readline()  # it writes: from now on any moment will do
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read()
    process.wait()
    # The last line may be cut short: it was not said.
    lines = (first + rest).rpartition("\n")[0].splitlines()
    return [(int(item), int(sequence)) for item, sequence in map(str.split, lines)]


def _write(path: Path, seed: int) -> None:
    rng, parent = random.Random(seed), os.getppid()
    with ItemLog.open(path, SCHEMA_HASH) as log:
        while os.getppid() == parent:  # whoever ends the killer wants no more either
            now = time.time_ns()
            batch = [
                Update(item, now + n, rng.random() < 0.2, {"price": now})
                for n, item in enumerate(rng.choices(range(ITEMS), k=rng.choice([1, 3, 50])))
            ]
            log.append(batch)
            print("\n".join(f"{update.item} {update.sequence}" for update in batch), flush=True)


if __name__ == "__main__":
    _write(Path(sys.argv[1]), int(sys.argv[2]))
