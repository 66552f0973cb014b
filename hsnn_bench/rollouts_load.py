"""Load beside rollouts: every answer is kept, and afterwards compared with what its snapshot answers offline."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from clients.load import METHOD, Fates, poisson_load
from export.open_items import OpenTargeting
from hsnn_core.bundle import Bundle
from hsnn_core.onnx_runner import OnnxRunner
from hsnn_core.search import search

TOLERANCE = 1e-4  # of a probability
_HEAD = struct.Struct("<qq")
_DTYPES = {"INT64": np.int64, "FP32": np.float32, "INT32": np.int32}


def load_until(
    stop: Path, url: str, messages: Sequence[bytes], rate: float, deadline: float, spool: Path
) -> Fates:
    """Poisson arrivals until the file ``stop`` exists, at most a day; the answers go to the file ``spool``."""
    with spool.open("wb") as file:

        def keep(number: int, answer: bytes) -> None:
            file.write(_HEAD.pack(number, len(answer)))
            file.write(answer)

        return poisson_load(url, messages, rate, 86400.0, deadline, stop=stop.exists, answered=keep)


def closed_loop(url: str, messages: Sequence[bytes], under_way: int, seconds: float) -> float:
    """Answers a second with so many requests always under way: what the server takes."""

    async def run() -> float:
        async with grpc.aio.insecure_channel(url) as channel:
            call = channel.unary_unary(METHOD)
            until = time.perf_counter() + seconds

            async def ask(first: int) -> int:
                count = 0
                while time.perf_counter() < until:
                    await call(messages[(first + count * under_way) % len(messages)])
                    count += 1
                return count

            counts = await asyncio.gather(*(ask(first) for first in range(under_way)))
        return sum(counts) / seconds

    return asyncio.run(run())


@dataclass(frozen=True)
class Expected:
    """What one export answers to R requests of one user each: item ids (R, K), probabilities (R, K, T), valid (R,)."""

    item_ids: np.ndarray
    probabilities: np.ndarray
    valid: np.ndarray

    @classmethod
    def of(cls, export: Path, wire: Mapping[str, np.ndarray], k: int) -> Expected:
        """Search offline with the export's own bundle and ONNX files, request by request."""
        bundle = Bundle.open(export / "bundle", verify=False)
        scorers = [export / f"scorer_l{layer}.onnx" for layer in range(1, bundle.index.layers + 1)]
        scorer = bundle.scorer(OnnxRunner(export / "user_tower.onnx", scorers))
        targeting = OpenTargeting(bundle)
        found = []
        for row in range(len(next(iter(wire.values())))):
            users = bundle.transform.encode_users({name: v[row : row + 1] for name, v in wire.items()})
            widths, rank = bundle.manifest["widths"], bundle.schema.rank
            found.append(search(bundle.index, scorer, users, widths, k, rank, targeting.filter(len(users))))
        parts = ([f.item_ids for f in found], [f.probabilities for f in found], [f.valid for f in found])
        return cls(*(np.concatenate(part) for part in parts))

    def gap(self, row: int, item_ids: np.ndarray, probabilities: np.ndarray) -> float:
        """How far an answer, items (n,) and their probabilities (n, T), is from the expected one of request ``row``:
        the greatest difference of a probability, infinite for other items.

        An item that is not expected counts by its distance from the last expected one, with which it may tie."""
        valid = int(self.valid[row])
        if len(item_ids) != valid:
            return float("inf")
        place = {int(item): n for n, item in enumerate(self.item_ids[row, :valid])}
        places = [place.get(int(item), valid - 1) for item in item_ids]
        return float(np.abs(self.probabilities[row, places] - probabilities).max(initial=0.0))

    def apart(self, other: Expected) -> np.ndarray:
        """(R,) how far the other export's answers are from these."""
        return np.array([
            self.gap(row, other.item_ids[row, :valid], other.probabilities[row, :valid])
            for row, valid in enumerate(other.valid)
        ])  # fmt: skip


@dataclass(frozen=True)
class Check:
    """Answers compared. ``own``: those that are their version's own; ``foreign``: those of another snapshot than they
    name; ``mixed``: of none; ``by_version``: answers by version; ``worst``: the greatest difference among ``own``."""

    own: int
    foreign: int
    mixed: int
    by_version: dict[int, int]
    worst: float


def check(
    spool: Path, requests: int, export_of: Mapping[int, str], expected: Mapping[str, Expected]
) -> Check:
    """Compare every kept answer with that of the export its version was published from."""
    own = foreign = mixed = 0
    worst = 0.0
    by_version: dict[int, int] = {}
    for number, answer in _answers(spool):
        version, tensors = _parse(answer)
        by_version[version] = by_version.get(version, 0) + 1
        count = int(tensors["valid"][0, 0])
        row, items, scores = (
            number % requests,
            tensors["item_ids"][0, :count],
            tensors["probabilities"][0, :count],
        )
        gaps = {name: answers.gap(row, items, scores) for name, answers in expected.items()}
        gap = gaps[export_of[version]]
        if gap <= TOLERANCE:
            own += 1
            worst = max(worst, gap)
        elif min(gaps.values()) <= TOLERANCE:
            foreign += 1
        else:
            mixed += 1
    return Check(own, foreign, mixed, dict(sorted(by_version.items())), worst)


def _answers(spool: Path) -> Iterator[tuple[int, bytes]]:
    with spool.open("rb") as file:
        while head := file.read(_HEAD.size):
            number, length = _HEAD.unpack(head)
            yield number, file.read(length)


def _parse(answer: bytes) -> tuple[int, dict[str, np.ndarray]]:
    message = service_pb2.ModelInferResponse.FromString(answer)
    tensors = {
        output.name: np.frombuffer(raw, _DTYPES[output.datatype]).reshape(output.shape)
        for output, raw in zip(message.outputs, message.raw_output_contents)
    }
    return int(message.model_version), tensors
