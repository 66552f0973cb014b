"""The report of `hsnn bench rollouts`: JSON, a Markdown page, and where its answers came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hsnn_core.files import write_bytes
from hsnn_train.checkpoint import write_json

STEM = "rollouts"


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write rollouts.json and rollouts.md into ``folder`` (made when missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{STEM}.{ending}" for ending in ("json", "md")]
    write_json(paths[0], dict(report))
    write_bytes(paths[1], render(report).encode())
    return paths


def render(report: Mapping[str, Any]) -> str:
    """The Markdown page."""
    asked, answers, steps, fresh = (report[name] for name in ("requests", "answers", "steps", "to_serving"))
    lines = [
        f"# Rollouts under load: {report['recipe']}, V = {report['items']:,}, K = {report['k']:,}, {report['mode']}",
        "",
        f"`{report['command']}`",
        "",
        f"Poisson arrivals at {report['load']:g} of a closed-loop throughput of {report['capacity']:.1f} requests/s "
        f"for {asked['seconds']:.0f} s, each allowed {asked['deadline_ms']:.0f} ms, while {report['rollouts']} "
        "snapshots were published and promoted "
        f"and {report['rollbacks']} rolled back; {report['workers']} workers, a queue of {report['queue']}, one "
        f"snapshot served at a time. Load and rollouts share the machine with the server. Commit {report['commit']}; "
        f"{report['machine']}; {report['date']}.{' **The data are simulated.**' if report['simulated'] else ''}",
        "",
        "| figure | target | measured |",
        "|---|---|---|",
        f"| requests sent | | {asked['sent']:,} |",
        f"| requests without an answer (refused {asked['refused']:,}, expired {asked['expired']:,}, failed "
        f"{asked['failed']:,}) | 0 | {asked['not_answered']:,} |",
        f"| answers that are not the named snapshot's own | 0 | {answers['foreign'] + answers['mixed']:,} |",
        f"| from checkpoint to serving, {report['items']:,} items, s | 60 (100k items) | {fresh['total']:.1f} |",
        f"| latency p50 / p99 / most, ms | | {asked['p50_ms']:.1f} / {asked['p99_ms']:.1f} / {asked['most_ms']:.0f} |",
        "",
        "| seconds of | median | most |",
        "|---|---|---|",
    ]
    for kind, part, label in (
        ("rollout", "publish", "publish: staged, verified, networks loaded, smoke request replayed"),
        ("rollout", "promote", "promote: until the new snapshot serves"),
        ("rollback", "rollback", "rollback: until the earlier snapshot serves and the networks are in order"),
    ):
        seconds = [step[part] for step in steps if step["kind"] == kind]
        if seconds:
            lines.append(f"| {label} | {np.median(seconds):.1f} | {max(seconds):.1f} |")
    parts = ", ".join(f"{name} {fresh[name]:.1f}" for name in ("load", "export", "publish", "promote"))
    apart = answers["apart"]
    lines += [
        "",
        f"From checkpoint to serving (s, without other load): {parts}.",
        "",
        f"Two exports were published in turns: the run as trained, and with its weights changed a little. The "
        f"probabilities of their answers to one request differ by {apart['median']:.3f} at the median and at least by "
        f"{apart['least']:.1e}; {apart['alike']} of {answers['distinct_requests']} requests can't tell them apart. "
        f"Every answer was compared with what its version's export answers offline: {answers['own']:,} agree to "
        f"{answers['worst']:.1e} (allowed {answers['tolerance']:g}), {answers['foreign']:,} are another snapshot's, "
        f"{answers['mixed']:,} nobody's. {len(answers['by_version'])} versions answered between "
        f"{min(answers['by_version'].values()):,} and {max(answers['by_version'].values()):,} requests each.",
    ]
    if asked["failures"]:
        lines += ["", "Failures, different ones:", "", *(f"- `{text}`" for text in asked["failures"])]
    return "\n".join(lines) + "\n"
