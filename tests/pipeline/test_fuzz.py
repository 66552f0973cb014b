"""The short form of `hsnn bench fuzz`: some of every malformed request and of every mutated file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hsnn_bench.fuzz import findings, render, run_fuzz, served, write_report
from hsnn_bench.fuzz_bytes import mutated, mutated_json
from hsnn_bench.fuzz_files import KINDS, Kind, fuzz_kind
from hsnn_bench.fuzz_http_requests import kills
from hsnn_bench.fuzz_wire import Fuzzer
from hsnn_cli.main import main
from hsnn_core.errors import DataError, FormatError, ServerError


def test_mutations_follow_from_the_seed() -> None:
    text = b'{"a": [1, {"b": "c"}], "d": null}'
    for mutate in (mutated, mutated_json):
        once, twice = ([mutate(np.random.default_rng(n), text) for n in range(200)] for _ in range(2))
        assert once == twice
        assert len(set(once)) > 100


def test_requests_that_end_triton_are_known() -> None:
    assert kills(b'{"inputs": [{"shape": [5550646892591772461, 1]}]}')
    assert kills(b'{"inputs": [{"shape": [1]}, {"shape": [-4294967296, 65536]}]}')
    assert not kills(b'{"inputs": [{"shape": [1, 20]}, 7, {}]}')
    for body in (b"[", b"[]", b'{"inputs": 3}', b'{"inputs": [{"shape": "x"}]}', b"\xff"):
        assert not kills(body)


def test_what_dies_hangs_or_accepts_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader with four mistakes, one for each first byte."""

    def make(folder: Path, run: Path) -> Path:
        (folder / "file").write_bytes(b"J")
        return folder / "file"

    def read(path: Path, good: bytes) -> None:
        import os
        import time

        match path.read_bytes()[0] % 5:
            case 0:
                os._exit(7)
            case 1:
                time.sleep(30)
            case 2:
                raise KeyError("x")
            case 3:
                raise FormatError("no")

    def mutate(rng: np.random.Generator, good: bytes) -> bytes:
        return bytes([65 + counted.pop(0)])

    counted = list(range(5))
    monkeypatch.setitem(KINDS, "bad", Kind("bad", make, mutate, read))
    monkeypatch.setattr("hsnn_bench.fuzz_files.PATIENCE", 0.5)
    outcomes = []
    for number in range(5):
        counted = [number]
        outcomes.append(fuzz_kind("bad", tmp_path, 1, seed=number))
    assert [list(outcome.findings) for outcome in outcomes] == [
        ["crash: the process ended with 7"], ["hang: nothing within 0.5 s"], ["KeyError at test_fuzz.py:read: 'x'"],
        [], [],
    ]  # fmt: skip
    assert (outcomes[3].refused, outcomes[4].valid) == (1, 1)


@pytest.mark.triton
def test_some_of_everything(shop: Path, tmp_path: Path) -> None:
    """By a server of its own, then by one that runs already, and at last by none."""
    with served(shop / "run") as target:
        tally = Fuzzer(target, seed=5).run(100)
        assert (tally.malformed, dict(tally.findings)) == (100, {})
        elsewhere = target.server.urls
        report = run_fuzz(shop / "run", 200, 0, seed=3, progress=False, elsewhere=elsewhere)
    assert report["wire_findings"] == [], render(report)
    assert report["malformed"] == 200
    assert sum(report["sent"].values()) == 200 + report["harmless"] == report["refused"] + report["answered"]
    assert report["harmless"] > 0
    assert report["good"] > 7
    with pytest.raises(ServerError, match=elsewhere.grpc):
        run_fuzz(shop / "run", 1, 0, seed=3, progress=False, elsewhere=elsewhere)
    text = write_report(report, tmp_path).read_text()
    assert "0 findings" in text and "| missing |" in text


TABLES = [name for name in KINDS if name.startswith(("impressions.", "items.", "updates."))]


@pytest.mark.parametrize(
    ("kinds", "mutations"),
    [([name for name in KINDS if name not in TABLES], 6), (TABLES, 3)],
    ids=["files", "tables"],
)
def test_some_files_of_every_kind(shop: Path, kinds: list[str], mutations: int) -> None:
    report = run_fuzz(shop / "run", 0, mutations, seed=4, kinds=kinds, progress=False)
    assert findings(report) == 0, render(report)
    for outcome in report["files"].values():
        assert sum(outcome[n] for n in ("refused", "valid", "same")) == mutations


def test_a_server_is_named_by_both_its_addresses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "fuzz", "nowhere", "--url", "h:8001"]) == 1
    assert "--url: got h:8001, --http: got None, expected both or neither" in capsys.readouterr().err


def test_unknown_kinds_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="kinds .'nosuch'. are unknown, expected among schema.yaml"):
        run_fuzz(tmp_path, 0, 1, seed=1, kinds=["nosuch"])
