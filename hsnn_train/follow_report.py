"""What a run that follows a stream reports: a line of JSON per file, written before the checkpoint that counts it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsnn_core.files import write_bytes

from .checkpoint import without_nan

REPORT = "follow.jsonl"


def append_rows(run: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put rows behind those that are there, through to the disk. Raises OSError."""
    if not rows:
        return
    with (run / REPORT).open("a") as file:
        file.write("".join(json.dumps(without_nan(row)) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def keep_rows(run: Path, count: int) -> None:
    """Cut what was written after the last checkpoint, which counts ``count`` rows: those files are read again."""
    lines = _lines(run)
    if len(lines) > count:
        write_bytes(run / REPORT, "".join(line + "\n" for line in lines[:count]).encode())


def read_rows(run: Path) -> list[dict[str, Any]]:
    """All rows, oldest first."""
    return [json.loads(line) for line in _lines(run)]


def _lines(run: Path) -> list[str]:
    path = run / REPORT
    return path.read_text().splitlines() if path.exists() else []
