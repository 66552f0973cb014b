"""The short form of `hsnn bench fuzz`: some of every malformed request and of every mutated file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hsnn_bench.fuzz import findings, render, run_fuzz, write_report
from hsnn_bench.fuzz_bytes import mutated, mutated_json
from hsnn_bench.fuzz_files import KINDS, Kind, fuzz_kind
from hsnn_bench.fuzz_http_requests import kills
from hsnn_core.errors import DataError, FormatError


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
    report = run_fuzz(shop / "run", 300, 0, seed=3, progress=False)
    assert report["wire_findings"] == [], render(report)
    assert sum(report["sent"].values()) == 300
    assert report["good"] > 7
    text = write_report(report, tmp_path).read_text()
    assert "0 findings" in text and "| missing |" in text


FAST = [name for name in KINDS if "impressions" not in name and not name.startswith(("items.", "updates"))]


def test_some_files_of_every_kind(shop: Path) -> None:
    """Tables, which are the simulated world's, are left to the long form."""
    report = run_fuzz(shop / "run", 0, 6, seed=4, kinds=FAST, progress=False)
    assert findings(report) == 0, render(report)
    assert all(
        sum(outcome[n] for n in ("refused", "valid", "same")) == 6 for outcome in report["files"].values()
    )


def test_unknown_kinds_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="kinds .'nosuch'. are unknown, expected among schema.yaml"):
        run_fuzz(tmp_path, 0, 1, seed=1, kinds=["nosuch"])
