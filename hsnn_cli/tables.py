"""Plain-text tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 100_000 else str(value)
    return str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> str:
    """Rows under a header, columns aligned: text to the left, numbers to the right."""
    texts = [[cell(v) for v in row] for row in rows]
    widths = [max(len(h), *(len(row[i]) for row in texts)) if texts else len(h) for i, h in enumerate(header)]
    right = [
        bool(rows) and all(isinstance(row[i], int | float) or row[i] is None for row in rows)
        for i in range(len(header))
    ]

    def line(parts: Sequence[str]) -> str:
        return "  ".join(p.rjust(w) if r else p.ljust(w) for p, w, r in zip(parts, widths, right)).rstrip()

    out = [title] if title else []
    out += [line(header), line(["─" * w for w in widths]), *(line(row) for row in texts)]
    return "\n".join(out)
