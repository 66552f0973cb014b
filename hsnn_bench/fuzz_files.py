"""Mutated files of every kind that HSNN reads, each read in a process that may die or hang.

A mutated file must be refused with one of HSNN's own errors, or be something valid all the same. What valid means is
said by each kind's `read`: it raises `Invalid` for what was read and must not have been.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from hsnn_core.errors import HsnnError

from . import fuzz_bundles, fuzz_tables
from .fuzz_kind import Invalid, Kind

PATIENCE = 20.0  # seconds that reading one file may take
KINDS = {kind.name: kind for kind in (*fuzz_tables.KINDS, *fuzz_bundles.KINDS)}


@dataclass
class Outcome:
    """Of the mutations of one kind: ``refused`` by HSNN's errors; ``same``: not changed at all; ``valid``: read, and
    valid; ``findings``: anything else, with the number of the first mutation that showed it."""

    refused: int = 0
    same: int = 0
    valid: int = 0
    findings: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.refused + self.same + self.valid + sum(self.findings.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return vars(self) | {"findings": dict(self.findings)}

    def add(self, number: int, what: str) -> None:
        if what in ("refused", "same", "valid"):
            setattr(self, what, getattr(self, what) + 1)
            return
        self.findings[what] += 1
        self.first.setdefault(what, number)


def fuzz_kind(
    name: str, run: Path, mutations: int, seed: int, progress: Callable[[int], object] = lambda count: None
) -> Outcome:
    """Mutate one kind of file ``mutations`` times. ``run``: an exported run, whose files are the good ones.

    Mutation n depends on ``seed`` and n alone."""
    outcome, number = Outcome(), 0
    context = multiprocessing.get_context("fork")
    while number < mutations:
        here, there = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(there, name, run, number, mutations, seed), daemon=True)
        worker.start()
        there.close()
        for done, what in _answers(worker, here, number, mutations):
            outcome.add(done, what)
            progress(1)
            number = done + 1
        worker.join()
    return outcome


def _answers(worker: Any, answers: Connection, first: int, last: int) -> Iterator[tuple[int, str]]:
    """What the worker says of each mutation; the last one may be the one that ended it."""
    for number in range(first, last):
        try:
            if not answers.poll(PATIENCE if number > first else 3 * PATIENCE):
                worker.kill()
                yield number, f"hang: nothing within {PATIENCE:g} s"
                return
            yield number, answers.recv()
        except EOFError:
            worker.join()
            yield number, f"crash: the process ended with {worker.exitcode}"
            return


def _work(answers: Connection, name: str, run: Path, first: int, last: int, seed: int) -> None:
    kind = KINDS[name]
    with tempfile.TemporaryDirectory(prefix="hsnn-fuzz-") as folder:
        path = kind.make(Path(folder), run)
        good = path.read_bytes()
        with suppress(Invalid):  # of kinds of which nothing but the very bytes is right
            kind.read(path, good)
        for number in range(first, last):
            content = kind.mutate(np.random.default_rng([seed, number]), good)
            answers.send(_read(kind, path, good, content))


def _read(kind: Kind, path: Path, good: bytes, content: bytes) -> str:
    if content == good:
        return "same"
    path.write_bytes(content)
    try:
        kind.read(path, good)
    except HsnnError as error:
        return "refused" if str(error).strip() else "refused without a word"
    except Invalid as error:
        return f"accepted: {error}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(place.filename).name}:{place.name}: {str(error)[:100]}"
    return "valid"
