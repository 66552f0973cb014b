"""Malformed requests to a real server, and mutated files of every kind, with a report of what was found.

Both are made from an exported run, which should be small: its server answers thousands of good requests in between.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from clients.retrieval import RetrievalClient
from export.exported import open_export
from export.pbtxt import ServingOptions
from export.publish import publish
from export.repository import orchestrator_directory
from export.rollout import promote
from hsnn_cli.provenance import commit, machine, run_name
from hsnn_core.bundle import Bundle
from hsnn_core.errors import DataError
from hsnn_core.files import write_bytes
from hsnn_server.state import Urls
from hsnn_server.triton import TritonServer
from hsnn_train.checkpoint import write_json

from .fuzz_files import KINDS, fuzz_kind
from .fuzz_wire import DEADLINE, Elsewhere, Fuzzer, Tally, Target

NOW = 1.7e9  # of every good request, or ads would begin and end while it runs


@contextmanager
def served(run: Path) -> Iterator[Target]:
    """A server of its own of an exported run, its networks in the orchestrator, and its smoke users to ask for."""
    with tempfile.TemporaryDirectory(prefix="hsnn-fuzz-") as folder:
        repository = Path(folder) / "repository"
        publish(run, repository, options=ServingOptions(mode="in_process"))
        with TritonServer(repository, log_file=Path(folder) / "triton.log") as server:
            version = promote(repository, server.admin)
            bundle = Bundle.open(orchestrator_directory(repository, version))
            yield _target(server, bundle, lambda: promote(repository, server.admin))


@contextmanager
def serving_elsewhere(run: Path, urls: Urls) -> Iterator[Target]:
    """A server that runs already and serves the export of ``run``, unchanged. ServerError when it does not answer."""
    yield _target(Elsewhere(urls), Bundle.open(open_export(run).bundle), lambda: None)


def _target(server: TritonServer | Elsewhere, bundle: Bundle, load: Callable[[], object]) -> Target:
    with RetrievalClient(server.urls.grpc, timeout=DEADLINE) as client:
        model = client.connect()
    context = {
        tensor.name: np.full((1, *tensor.shape), NOW)
        for tensor in model.schema.context_wire()
        if tensor.datatype == "FP64"
    }
    items = frozenset(bundle.index.item_ids.tolist())
    return Target(server, model, bundle.smoke().users, context, items, load)


def run_fuzz(
    run: Path,
    requests: int,
    mutations: int,
    seed: int,
    kinds: Sequence[str] = (),
    command: str = "",
    progress: bool = True,
    earlier: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], object] = lambda report: None,
    elsewhere: Urls | None = None,
) -> dict[str, Any]:
    """Send ``requests`` malformed requests and read ``mutations`` mutated files of each of ``kinds`` (default: all);
    returns the report. ``elsewhere``: a server that runs already and serves ``run``, instead of one of its own.
    ``save`` is given the report after every part; what an ``earlier`` one of the same commit, seed and numbers has is
    not done again. Raises DataError for an unknown kind."""
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise DataError(f"kinds {unknown} are unknown, expected among {', '.join(KINDS)}")
    asked: dict[str, Any] = {
        "run": run_name(run), "command": command, "commit": commit(), "machine": machine(), "seed": seed,
        "requests": requests, "mutations": mutations,
    }  # fmt: skip
    same = earlier is not None and all(earlier.get(name) == value for name, value in asked.items())
    report = dict(earlier) if same and earlier else asked | {"date": date.today().isoformat(), "files": {}}
    if "sent" not in report:
        tally = Tally()
        if requests:
            serving = served(run) if elsewhere is None else serving_elsewhere(run, elsewhere)
            with serving as target, _bar(requests, "requests", progress) as step:
                tally = Fuzzer(target, seed).run(requests, step)
        report |= _wire(tally)
        save(report)
    for name in (kinds or KINDS) if mutations else ():
        if name not in report["files"]:
            with _bar(mutations, name, progress) as step:
                report["files"][name] = fuzz_kind(name, run.absolute(), mutations, seed, step).to_dict()
            save(report)
    return report


def _wire(tally: Tally) -> dict[str, Any]:
    found = [
        {
            "why": why,
            "what": what,
            "detail": detail,
            "times": times,
            "example": tally.examples[why, what, detail],
        }
        for (why, what, detail), times in tally.findings.most_common()
    ]
    return {
        "seconds": tally.seconds, "sent": dict(tally.sent.most_common()), "malformed": tally.malformed,
        "harmless": tally.harmless, "refused": tally.refused, "answered": tally.answered, "good": tally.good,
        "left_out": tally.left_out, "restarts": tally.restarts, "tritons": dict(tally.tritons.most_common()),
        "wire_findings": found,
    }  # fmt: skip


def findings(report: dict[str, Any]) -> int:
    """How many things were found that must not be."""
    files = sum(sum(outcome["findings"].values()) for outcome in report["files"].values())
    return files + sum(finding["times"] for finding in report["wire_findings"])


def earlier_report(run: Path, directory: Path) -> dict[str, Any] | None:
    """The report that is there already, None without one."""
    path = directory / f"fuzz-{run_name(run)}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found


def write_report(report: dict[str, Any], directory: Path) -> Path:
    """fuzz-RUN.json and .md; returns the path of the latter."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / f"fuzz-{report['run']}.json", report)
    path = directory / f"fuzz-{report['run']}.md"
    write_bytes(path, render(report).encode())
    return path


def render(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    sent = sum(report["sent"].values())
    lines = [
        f"# Malformed requests and files: {report['run']}", "",
        f"`{report['command']}`, seed {report['seed']}, {report['date']}, commit {report['commit']}, "
        f"{json.dumps(report['machine'])[1:-1]}.", "",
        f"{findings(report)} findings.", "", "## Requests", "",
    ]  # fmt: skip
    if sent:
        lines += [
            f"{report['malformed']:,} malformed requests over gRPC and HTTP, and {report['harmless']:,} whose change "
            f"left a good one, in {report['seconds']:.0f} s ({sent / max(report['seconds'], 1e-9):.0f} a second): "
            f"{report['refused']:,} refused, {report['answered']:,} answered. Between them {report['good']:,} good "
            f"requests, each with its own user's items, as before. {report['left_out']:,} more were not sent: Triton "
            f"2.51 ends at them (docs/security.md). The server was started anew {report['restarts']} times.", "",
            "| changed | requests |", "|---|--:|",
            *(f"| {what} | {count:,} |" for what, count in report["sent"].items()), "",
        ]  # fmt: skip
    if report["tritons"]:
        lines += [
            "Triton's own, before or after any code of HSNN:",
            "",
            "| what it does | times |",
            "|---|--:|",
        ]
        lines += [f"| {what} | {count:,} |" for what, count in report["tritons"].items()] + [""]
    for finding in report["wire_findings"]:
        lines.append(
            f"- **{finding['why']}** {finding['what']}: {finding['detail']} ({finding['times']} times)"
        )
    lines += [
        "",
        "## Files",
        "",
        "| file | mutations | refused | valid | unchanged | findings |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, outcome in report["files"].items():
        counts = [outcome["refused"], outcome["valid"], outcome["same"], sum(outcome["findings"].values())]
        lines.append(f"| {name} | {sum(counts):,} | {' | '.join(f'{count:,}' for count in counts)} |")
    lines += [""]
    for name, outcome in report["files"].items():
        for what, times in outcome["findings"].items():
            lines.append(f"- **{name}**: {what} ({times} times, first mutation {outcome['first'][what]})")
    return "\n".join(lines) + "\n"


@contextmanager
def _bar(total: int, what: str, show: bool) -> Iterator[Callable[[int], object]]:
    with tqdm(total=total, desc=what, disable=not show, mininterval=0.5) as bar:
        yield bar.update
