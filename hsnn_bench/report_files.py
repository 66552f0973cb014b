"""What a measurement leaves: its figures with where they come from, a page and a plot."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from hsnn_cli.provenance import commit, machine
from hsnn_core.files import write_bytes
from hsnn_train.checkpoint import write_json


def write_report(
    found: dict[str, Any],
    stem: Path,
    command: str,
    simulated: bool,
    page: Callable[[dict[str, Any]], str],
    draw: Callable[[dict[str, Any], Path], object],
) -> Path:
    """Write ``stem``.json, .md and .png of what was ``found``, with command, commit, machine and date; returns the
    .md."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "command": command,
        "commit": commit(),
        "machine": machine(),
        "date": date.today().isoformat(),
        "simulated": simulated,
        **found,
    }
    write_json(stem.with_suffix(".json"), found)
    write_bytes(stem.with_suffix(".md"), (page(found) + "\n").encode())
    draw(found, stem.with_suffix(".png"))
    return stem.with_suffix(".md")
