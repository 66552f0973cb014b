"""NVIDIA's perf_analyzer, one load level at a time.

It ships inside the Linux wheel of tritonclient up to 2.60, and needs libraries that the wheel does not have; `make
perf_analyzer` puts both beside the virtual environment's own packages (see docs/serving.md).
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clients.tls import Tls
from hsnn_core.errors import ServerError
from hsnn_core.files import write_bytes

WINDOWS = 3
REQUESTS, GAPS, TABLE = "requests.json", "gaps", "level.csv"
LATE = 0.01  # of a level's requests may be sent later than they were due
INSTALLED = Path(sys.prefix) / "perf_analyzer"  # where `make perf_analyzer` puts it
HOW = "make perf_analyzer gets one (docs/serving.md), or give its path with --perf-analyzer"
_DELAYED = re.compile(r"([0-9.]+(?:e-?[0-9]+)?)% of the requests were delayed")
_COUNT = re.compile(r"Request count: ([0-9]+)")
_ERROR = re.compile(r"had error: (.*)")


@dataclass(frozen=True)
class Tool:
    """A perf_analyzer that runs here, and the environment in which it does."""

    binary: Path
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Target:
    """What to load: ``model`` at ``url`` (host:port of gRPC), with ``requests`` (of `request_texts`) for ``k`` items
    each; ``tls``: None for plain text."""

    url: str
    model: str
    requests: Sequence[str]
    k: int
    schema_hash: str
    tls: Tls | None = None


@dataclass(frozen=True)
class Level:
    """One load level.

    Attributes:
        kind: "closed" (``load`` requests are always under way) or "open" (``load`` Poisson arrivals a second).
        requests: how many were answered in the windows of measurement.
        throughput: answers a second; latencies: milliseconds by percentile, "p50", "p90", "p95", "p99".
        delayed: share of the requests that were sent later than they were due, open loop only.
        failure: why the level could not be measured, the first refusal for example; the figures are 0 then.
        seconds: for how long it was asked to measure.
        disturbed: it does not count, the machine was busy with something else; see `capacity_search`.
    """

    kind: str
    load: float
    requests: int
    throughput: float
    latency_ms: Mapping[str, float]
    delayed: float
    failure: str | None
    seconds: float = 0.0
    disturbed: bool = False

    def within(self, percentile: str, milliseconds: float) -> bool:
        """Whether it was answered, that fast, and at the load that it says: a client that sends late sends less."""
        return self.failure is None and self.delayed <= LATE and self.latency_ms[percentile] <= milliseconds


def find(path: Path | None = None) -> Tool:
    """The one at ``path``, else in PATH, else where `make perf_analyzer` puts it. ServerError says what is missing."""
    named = str(path) if path else shutil.which("perf_analyzer") or str(INSTALLED / "bin" / "perf_analyzer")
    binary = Path(named).absolute()
    if not binary.is_file():
        raise ServerError(f"perf_analyzer: {binary} is not there; {HOW}")
    cuda = binary.parent.parent / "nvidia" / "cuda_runtime" / "lib"
    libraries = [str(cuda)] if cuda.is_dir() else []
    libraries += [os.environ["LD_LIBRARY_PATH"]] if os.environ.get("LD_LIBRARY_PATH") else []
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    try:
        ran = subprocess.run([binary, "--version"], env=environment, capture_output=True, text=True)
    except OSError as error:
        raise ServerError(f"perf_analyzer: {binary} does not run: {error}; {HOW}") from error
    if "error while loading shared libraries" in ran.stderr:
        raise ServerError(
            f"perf_analyzer: {ran.stderr.strip()}; libb64.so.0d is in Debian's and Ubuntu's package libb64-0d, "
            f"libcudart.so.12 in the pip package nvidia-cuda-runtime-cu12; {HOW}"
        )
    return Tool(binary, environment)


def request_texts(requests: Iterable[Mapping[str, np.ndarray]]) -> list[str]:
    """Requests, each the wire tensors (1, ...) of one user, as perf_analyzer reads them in JSON."""
    return [
        json.dumps({
            name: {"content": values[0].tolist(), "shape": list(values.shape[1:])} for name, values in user.items()
        })
        for user in requests
    ]  # fmt: skip


def measure(tool: Tool, target: Target, kind: str, load: float, seconds: float, seed: int) -> Level:
    """Load the target for about ``seconds``, in `WINDOWS` windows (see `Level`); ``seed``: of the arrivals and of the
    order of the requests. A level at which the server refuses is a result, with a ``failure``; ServerError when
    perf_analyzer itself fails."""
    with tempfile.TemporaryDirectory(prefix="hsnn-perf-") as name:
        folder = Path(name)
        rng = np.random.default_rng(seed)
        _write_requests(folder / REQUESTS, target.requests, rng)
        if kind == "open":
            _write_gaps(folder / GAPS, load, seconds, rng)
        ran = subprocess.run(
            _command(tool, target, kind, load, seconds, folder),
            env=dict(tool.environment), capture_output=True, text=True,
        )  # fmt: skip
        said = ran.stdout + ran.stderr
        if refused := _ERROR.search(said):
            return Level(kind, load, 0, 0.0, {}, 0.0, refused.group(1).strip(), seconds)
        table = folder / TABLE
        if ran.returncode or not table.is_file():
            tail = " ".join(line.strip() for line in ran.stderr.strip().splitlines()[-3:])
            raise ServerError(f"perf_analyzer ended with {ran.returncode} at {kind} load {load:g}: {tail}")
        return read_level(table.read_text(), said, kind, load, seconds)


def read_level(table: str, said: str, kind: str, load: float, seconds: float) -> Level:
    """A level out of perf_analyzer's CSV of one line, and of what it said beside it."""
    (row,) = csv.DictReader(table.strip().splitlines())
    delayed, count = _DELAYED.search(said), _COUNT.search(said)
    return Level(
        kind,
        load,
        int(count.group(1)) if count else 0,
        float(row["Inferences/Second"]),
        {p: float(row[f"{p} latency"]) / 1000 for p in ("p50", "p90", "p95", "p99")},
        float(delayed.group(1)) / 100 if delayed else 0.0,
        None,
        seconds,
    )


def _write_requests(path: Path, requests: Sequence[str], rng: np.random.Generator) -> None:
    """In an order of the level's own: it sends them in turn from the first, and a short level would see no others."""
    texts = (requests[place] for place in rng.permutation(len(requests)))
    write_bytes(path, f'{{"data": [{", ".join(texts)}]}}'.encode())


def _write_gaps(path: Path, rate: float, seconds: float, rng: np.random.Generator) -> None:
    """Exponential gaps for ``seconds``, whose mean is exactly that of the rate: whole microseconds, one a line.
    perf_analyzer's own Poisson schedule is the same at every call and its first hundreds of arrivals came 15% to 20%
    more slowly than asked for."""
    gaps = rng.exponential(size=max(16, round(rate * seconds)))
    microseconds = gaps * (1e6 / rate / gaps.mean())
    write_bytes(path, "\n".join(str(max(1, round(gap))) for gap in microseconds).encode())


def _command(
    tool: Tool, target: Target, kind: str, load: float, seconds: float, folder: Path
) -> list[str | Path]:
    # Asynchronous in open loop, or its few threads would wait for answers when the next request is due.
    loads: list[str | Path] = (
        ["--concurrency-range", f"{load:g}"]
        if kind == "closed"
        else ["--request-intervals", folder / GAPS, "-a"]
    )
    window = str(max(500, round(1000 * seconds / WINDOWS)))
    return [
        tool.binary, "-m", target.model, "-i", "grpc", "-u", target.url, "-b", "1", "--percentile", "99",
        "--input-data", folder / REQUESTS, "--verbose-csv", "-f", folder / TABLE,
        # As many windows as it takes to call a level stable, and a tolerance with which it always does.
        "--measurement-interval", window, "--max-trials", str(WINDOWS), "--stability-percentage", "1000000",
        "--request-parameter", f"k:{target.k}:int", "--request-parameter", f"schema_hash:{target.schema_hash}:string",
        *loads, *_tls(target.tls),
    ]  # fmt: skip


def _tls(tls: Tls | None) -> list[str | Path]:
    if tls is None:
        return []
    files = {"root-certifications": tls.ca, "certificate-chain": tls.certificate, "private-key": tls.key}
    given = [(f"--ssl-grpc-{name}-file", path) for name, path in files.items() if path is not None]
    return ["--ssl-grpc-use-ssl", *(part for option in given for part in option)]
