"""The runbook says what is there: commands parse, files and metrics exist, the worked example is the formula's."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hsnn_cli.main import parser
from hsnn_core.item_log import ItemLog, LogReader
from hsnn_core.item_updates import Update

ROOT = Path(__file__).resolve().parents[2]
GUIDES = {name: (ROOT / name).read_text() for name in ("docs/operations.md", "docker/README.md")}
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
OPERATIONS = GUIDES["docs/operations.md"]


def fenced_commands() -> list[str]:
    blocks = "\n".join(body for text in GUIDES.values() for body in FENCE.findall(text)).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if line.startswith("hsnn ")]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", FENCE.sub("", text).replace("\n", " "))


def choices(words: list[str]) -> argparse.ArgumentParser:
    """The parser of the sub-command that ``words`` begin with; KeyError when there is none."""
    found = parser()
    for word in words:
        if found._subparsers is None or word.startswith("-"):
            break
        found = found._subparsers._group_actions[0].choices[word]  # type: ignore[index]
    return found


@pytest.mark.parametrize("line", fenced_commands())
def test_every_command_shown_parses(line: str) -> None:
    try:
        options = parser().parse_args(shlex.split(line, comments=True)[1:])
    except SystemExit:
        pytest.fail(f"does not parse: {line}")
    assert callable(options.run_command)


@pytest.mark.parametrize("name", GUIDES)
def test_commands_in_prose_are_sub_commands_with_their_options(name: str) -> None:
    commands = [shlex.split(text) for text in quoted(GUIDES[name]) if text.startswith("hsnn ")]
    assert commands
    for _, *words in commands:
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        known = {option for action in choices(words)._actions for option in action.option_strings}
        assert options <= known, words


@pytest.mark.parametrize("name", GUIDES)
def test_files_that_are_named_exist(name: str) -> None:
    text = GUIDES[name]
    paths = [q for q in quoted(text) if re.fullmatch(r"(docker|docs|tests|hsnn_\w+|clients)/[\w./-]+", q)]
    assert paths
    for path in paths:
        assert (ROOT / path).exists() or path.startswith("docker/secrets/"), path
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in link or (ROOT / name).parent.joinpath(link).exists(), link


def test_metrics_and_alerts_that_are_named_exist() -> None:
    sources = [*(ROOT / "model_repository").rglob("*.py")]
    defined = "\n".join(path.read_text() for path in sources)
    metrics = {q for q in quoted(OPERATIONS) if re.fullmatch(r"hsnn_[a-z_]+", q)} - {
        "hsnn_core",
        "hsnn_index",
    }
    assert metrics
    for metric in metrics:
        assert f'"{metric}"' in defined, metric
    groups = yaml.safe_load((ROOT / "docker" / "prometheus" / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"]}
    assert {q for q in quoted(OPERATIONS) if q.startswith("Hsnn")} <= alerts
    for section in re.split(r"^### ", OPERATIONS, flags=re.M)[1:]:
        for part in ("Means", "Look", "Do", "Roll back"):
            assert f"- **{part}**" in section, section.split("\n")[0]


def test_a_backup_is_a_log_with_all_that_was_acknowledged(tmp_path: Path) -> None:
    (script,) = re.findall(r'python3 -c "(import sqlite3; [^"]+)"', OPERATIONS)
    script = script.replace("/items/", f"{tmp_path}/").replace("/tmp/log.db", f"{tmp_path}/copy.db")
    log = ItemLog.open(tmp_path / "log.db", "0" * 64)
    log.append([Update(item, item) for item in range(100)])
    subprocess.run([sys.executable, "-c", script], check=True)
    log.append([Update(1, 1000)])
    log.close()
    with LogReader(tmp_path / "copy.db", "0" * 64) as reader:
        assert reader.identity() == log.identity
        assert [entry.item for entry in reader.since(0, 1000)] == list(range(100))


def test_the_worked_example_is_the_formulas_and_the_committed_measurements() -> None:
    results = json.loads((ROOT / "docs" / "results" / "capacity-synthetic-6000-in_process.json").read_text())
    price = float(re.search(r"\$([\d.]+) per core-hour", OPERATIONS)[1])  # type: ignore[index]
    cores = int(re.search(r"servers of (\d+) cores", OPERATIONS)[1])  # type: ignore[index]
    assert f"{cores} cores" in results["machine"]
    rows = re.findall(r"^\| .+ \| ([\d.]+) \| (\d+) \| (\d+) \| (\d+) \|$", OPERATIONS, re.M)
    assert [float(row[0]) for row in rows] == [
        round(results["capacity"], 1),
        round(results["closed"]["saturation"], 1),
    ]
    for c, p, servers, dollars in rows:
        assert int(servers) == math.ceil(int(p) / (0.7 * float(c))) + 1
        assert int(dollars) == round(int(servers) * cores * price * 730)
