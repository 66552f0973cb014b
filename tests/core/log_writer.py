"""A process that appends to an item log and says what was acknowledged, and what it takes to kill it and check.

Run as a program (`log_writer.py LOG SEED`): one line `item sequence` on stdout for every acknowledged update.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from hsnn_core.item_log import ItemLog, LogReader
from hsnn_core.item_updates import Update

SCHEMA_HASH = "0123456789abcdef"
ITEMS = 200
ROOT = Path(__file__).parents[2]


def write(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    with ItemLog.open(path, SCHEMA_HASH) as log:
        while True:
            now = time.time_ns()
            batch = [
                Update(item, now + n, rng.random() < 0.2, {"price": now})
                for n, item in enumerate(rng.choices(range(ITEMS), k=rng.choice([1, 3, 50])))
            ]
            log.append(batch)
            print("\n".join(f"{update.item} {update.sequence}" for update in batch), flush=True)


def kill_writers(path: Path, kills: int, seed: int = 0) -> int:
    """Start and kill -9 a writer ``kills`` times, at random moments, with a reader that follows all along; after each
    death every acknowledged update must be in the log, or a newer one of its item. Returns how many were checked."""
    rng = random.Random(seed)
    acknowledged: dict[int, int] = {}
    followed: dict[int, int] = {}
    position = count = 0
    with LogReader(path, SCHEMA_HASH) as reader:
        for number in range(kills):
            process = subprocess.Popen(
                [sys.executable, __file__, str(path), str(number)],
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
            assert process.stdout is not None
            process.stdout.readline()  # it writes: now any moment will do
            time.sleep(rng.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
            lines = process.stdout.read().splitlines(keepends=True)
            process.wait()
            for line in lines:
                if line.endswith("\n"):
                    item, sequence = map(int, line.split())
                    acknowledged[item] = max(sequence, acknowledged.get(item, -1))
                    count += 1
            for entry in reader.since(position, 10**9):
                assert entry.position > position
                assert entry.sequence > followed.get(entry.item, -1)
                assert entry.deleted == (entry.payload is None)
                position, followed[entry.item] = entry.position, entry.sequence
            lost = {item: s for item, s in acknowledged.items() if followed.get(item, -1) < s}
            assert not lost, f"after kill {number}: acknowledged (item: sequence) {lost} and not in the log"
            with LogReader(path, SCHEMA_HASH) as fresh:
                assert {e.item: e.sequence for e in fresh.since(0, 10**9)} == followed
    return count


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
