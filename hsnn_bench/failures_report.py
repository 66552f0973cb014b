"""The report of `hsnn bench failures`: JSON and a Markdown page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hsnn_core.files import write_bytes
from hsnn_train.checkpoint import write_json

TARGET = 5.0  # seconds, after a killed stub


def write_report(report: Mapping[str, Any], stem: Path) -> Path:
    """Write stem.json and stem.md (the folder is made when missing); returns the page."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_json(stem.with_name(f"{stem.name}.json"), dict(report))
    page = stem.with_name(f"{stem.name}.md")
    write_bytes(page, render(report).encode())
    return page


def render(report: Mapping[str, Any]) -> str:
    """The Markdown page."""
    by_failure: dict[str, list[Mapping[str, Any]]] = {}
    for outcome in report["outcomes"]:
        by_failure.setdefault(outcome["failure"], []).append(outcome)
    lines = [
        f"# What breaks, and what clients see: {report['recipe']}, V = {report['items']:,}, K = {report['k']:,}, "
        f"{report['mode']}",
        "",
        f"`{report['command']}`",
        "",
        f"Poisson arrivals at {report['load']:g} of a closed-loop throughput of {report['capacity']:.1f} requests/s "
        f"through the asyncio client, each call allowed {1000 * report['timeout']:.0f} ms and two more attempts when a "
        "connection is lost, 20 item "
        f"updates/s; each failure {report['rounds']} times, under the supervisor of `hsnn serve`. Load and server "
        f"share the machine. Commit {report['commit']}; {report['machine']}; {report['date']}."
        f"{' **The data are simulated.**' if report['simulated'] else ''}",
        "",
        "| failure | serves again after, s: median (most) | after it was undone, s | answered | refused | "
        "failed, by gRPC status | longest call, ms | calls beyond their timeout | item updates failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, outcomes in by_failure.items():
        total = {key: sum(o[key] for o in outcomes) for key in ("answered", "refused", "outlived")}
        longest = 1000 * max(o["longest"] for o in outcomes)
        lines.append(
            f"| {name}{_unneeded(outcomes)} | {_recovery(outcomes)} | {_after_undone(outcomes)} | "
            f"{total['answered']:,} | {total['refused']:,} | {_counts(outcomes, 'failed')} | {longest:,.0f} | "
            f"{total['outlived']:,} | {sum(sum(o['updates_failed'].values()) for o in outcomes):,} |"
        )
    if report["left_out"]:
        lines += [
            "",
            f"Left out, for this process may not mount file systems (it takes root): {', '.join(report['left_out'])}.",
        ]
    lines += [
        "",
        f"Target: {TARGET:g} s after a killed stub. *Serves again*: from the failure to the first answer after which "
        "all calls are answered; 0 when none failed. *After it was undone*: the part of that after the end of what "
        "something ends: the room is back, the process goes on. *Refused*: at once, by a server that had too much to "
        "do at that moment. Calls are those sent from the failure until all had been answered for three seconds; full "
        "disks are small ones that only the bench sees.",
        "",
        "| failure | what the supervisor did, and what the bench asked besides |",
        "|---|---|",
    ]
    for name, outcomes in by_failure.items():
        for line, count in Counter(line for o in outcomes for line in o["supervisor"]).items():
            lines.append(f"| {name} | {' '.join(line.split())}{f' ({count} times)' if count > 1 else ''} |")
        if not any(o["supervisor"] for o in outcomes):
            lines.append(f"| {name} | nothing |")
    lines += ["", "| what clients were told, the first of each kind | |", "|---|---|"]
    told: dict[str, str] = {}
    for outcome in report["outcomes"]:
        for status, message in outcome["messages"].items():
            told.setdefault(status, message)
        for message in outcome["updates_failed"]:
            kind = message.partition(":")[0]
            told.setdefault(f"item update: {'failed' if '/' in kind else kind}", message)
    lines += [f"| {status} | {' '.join(message.split())} |" for status, message in sorted(told.items())]
    return "\n".join(lines) + "\n"


def _recovery(outcomes: list[Mapping[str, Any]]) -> str:
    seconds = [o["recovered"] for o in outcomes if o["recovered"] is not None]
    never = len(outcomes) - len(seconds)
    text = f"{np.median(seconds):.2f} ({max(seconds):.2f})" if seconds else "never"
    return f"{text}; {never} never" if seconds and never else text


def _after_undone(outcomes: list[Mapping[str, Any]]) -> str:
    seconds = [max(0.0, o["recovered"] - o["held"]) for o in outcomes if o["recovered"] is not None]
    if not outcomes[0]["undone"] or not seconds:
        return "–"
    return f"{np.median(seconds):.2f} ({max(seconds):.2f})"


def _unneeded(outcomes: list[Mapping[str, Any]]) -> str:
    idle = sum(not o["exercised"] for o in outcomes)
    times = "" if idle == len(outcomes) else f" in {idle} of {len(outcomes)} rounds"
    return f" (**nothing needed the room**{times})" if idle else ""


def _counts(outcomes: list[Mapping[str, Any]], key: str) -> str:
    total: Counter[str] = Counter()
    for outcome in outcomes:
        total.update(outcome[key])
    return ", ".join(f"{what} {count:,}" for what, count in total.most_common()) or "none"
