"""A Triton's metrics, as its address of that name gives them."""

from __future__ import annotations

import urllib.request
from http.client import HTTPException

from hsnn_core.errors import ServerError


def scrape(address: str | None) -> dict[str, float]:
    """Triton's metrics by name and labels; nothing without an address. ServerError when nobody answers there."""
    if address is None:
        return {}
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}
    except (OSError, HTTPException, ValueError) as error:
        raise ServerError(
            f"metrics at {address}: {error}; give the address of Triton's metrics, or leave it out"
        ) from error


def requests_of(metrics: dict[str, float], version: int) -> tuple[int, int]:
    """Requests that one snapshot's orchestrators, the canary among them, counted so far, and those that failed in the
    server: not the caller's mistakes, and not what was refused for want of room or time."""
    wanted, total, failed = f'version="{version}"', 0, 0
    for name, value in metrics.items():
        if name.startswith("hsnn_requests_total{") and wanted in name:
            total += int(value)
            failed += int(value) if 'outcome="error"' in name else 0
    return total, failed
