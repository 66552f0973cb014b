"""`hsnn bench gpu`: a MoNN of Table 5 scores the nodes of a layer on a GPU, set against what the card can do at all.

The nodes' embeddings stay on the card; a request brings its user embedding and crossings, which are there already
when the clock runs. One call scores all nodes of every user of a batch and keeps the best. Weights are random, which
changes no time; Triton and the transfer of a request are not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsnn_cli.provenance import commit
from hsnn_core.files import write_bytes
from hsnn_train.checkpoint import write_json
from hsnn_train.device import device_name, find_device
from hsnn_train.flops import count, reference_schema
from hsnn_train.monn import MoNN, cross_layout
from hsnn_train.presets import PAPER_FEATURES, preset
from hsnn_train.trunk import Trunk

from .report import markdown

KEPT = 64  # nodes that go on to the next layer
#: name -> (dtype of weights and activations, whether float32 products may round their inputs to TF32)
PRECISIONS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
}
WARM_UP, ROUNDS = 3, 20
#: The MoNNs of Table 5; its two towers have no network above an inner product.
MONNS = tuple(name for name in PAPER_FEATURES if name != "two_tower_xs")
SECONDS = 4.0  # per row, at most
MATRIX, COPY_BYTES = 8192, 4 << 30


@dataclass(frozen=True)
class Ceiling:
    """What the card does on its best day: FLOP/s of a large matrix product per precision, bytes/s of a large copy
    (bytes read plus bytes written)."""

    flops: dict[str, float]
    bytes: float


@dataclass(frozen=True)
class GpuOptions:
    """presets, batches: there is a row for each of them and each of PRECISIONS; nodes: scored per user; device: a CUDA
    device."""

    presets: Sequence[str] = ("small", "medium", "large")
    batches: Sequence[int] = (1, 32)
    nodes: int = 1000
    device: str = "cuda"


class Scorer:
    """One layer of nodes on the device: random weights, ``nodes`` embeddings, requests of ``batch`` users.

    ``__call__`` returns the best KEPT nodes of every user: logits float32 and nodes int64, both (B, KEPT).
    """

    def __init__(self, name: str, nodes: int, batch: int, precision: str, device: torch.device) -> None:
        dtype = PRECISIONS[precision][0]
        schema = reference_schema(*PAPER_FEATURES[name])
        cardinality = {feature.space: 8 for feature in schema.features}
        cross = cross_layout(schema)
        torch.manual_seed(1)
        with torch.device(device):
            trunk = Trunk(
                preset(name).trunk,
                schema.layout("user"),
                schema.layout("item"),
                cardinality,
                len(schema.tasks),
            )
            self.monn = MoNN(preset(name), trunk, cardinality, cross, node=True).eval().to(dtype)
            self.user = torch.randn(batch, self.monn.user_width).to(dtype)
            table = torch.randn(nodes, self.monn.item_width).to(dtype)
            self.item = table.expand(batch, -1, -1)
            self.dense = torch.rand(batch, nodes, cross.dense_width).to(dtype) if cross.specs else None
            self.ids = (
                torch.randint(2, 8, (batch, nodes, cross.ids_width), dtype=torch.int32)
                if cross.specs
                else None
            )
        self.users = batch
        self.parts = 1

    def __call__(self) -> tuple[Tensor, Tensor]:
        logits = torch.cat([self._logits(part) for part in torch.arange(self.users).chunk(self.parts)])
        best = torch.topk(logits, min(KEPT, logits.shape[1]), dim=1)
        return best.values, best.indices

    def _logits(self, part: Tensor) -> Tensor:
        rows = slice(int(part[0]), int(part[-1]) + 1)
        user, item = self.user[rows], self.item[rows]
        dense = None if self.dense is None else self.dense[rows]
        ids = None if self.ids is None else self.ids[rows]
        return self.monn.logits(user, item, self.monn.interact(user, item, dense, ids))[..., 0].float()

    def weight_bytes(self) -> int:
        """Bytes of the networks that a call reads: all but the towers that ran before it."""
        used = (self.monn.over, self.monn.interaction, self.monn.cross_align, self.monn.user_align)
        return sum(
            p.numel() * p.element_size() for part in used if part is not None for p in part.parameters()
        )

    def request_bytes(self) -> int:
        """Bytes of the users, nodes (once) and crossings that a call reads."""
        tensors = (self.user, self.item[0], self.dense, self.ids)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def milliseconds(run: Callable[[], object], seconds: float = SECONDS) -> float:
    """Median time of a call on the card, by its own clock, over up to ROUNDS calls."""
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    began = time.monotonic()
    times: list[float] = []
    while len(times) < ROUNDS and (len(times) < 3 or time.monotonic() - began < seconds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return float(torch.tensor(times).median())


def ceiling(device: torch.device) -> Ceiling:
    """Measure the card."""
    flops = {}
    for name, (dtype, tf32) in PRECISIONS.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
        flops[name] = 2 * MATRIX**3 / (milliseconds(lambda a=a, b=b: a @ b, 1.0) / 1e3)  # type: ignore[misc]
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = milliseconds(lambda: target.copy_(source), 1.0)
    return Ceiling(flops, 2 * COPY_BYTES / (took / 1e3))


def fitting(scorer: Scorer) -> Scorer:
    """The scorer with its batch in as few parts as the card's memory allows; raises OutOfMemoryError when one user is
    too many."""
    while True:
        try:
            scorer()
            torch.cuda.synchronize()
            return scorer
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            if scorer.parts == scorer.users:
                raise
            scorer.parts = min(scorer.users, scorer.parts * 2)


def captured(scorer: Scorer) -> Callable[[], None]:
    """The call as a CUDA graph: one launch instead of one per operation."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            scorer()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scorer()
    return graph.replay


@torch.inference_mode()
def measure(options: GpuOptions) -> dict[str, Any]:
    """The report: the card, its ceilings, and a row per preset, batch and precision. Raises SchemaError without a
    GPU."""
    device = find_device(options.device)
    top = ceiling(device)
    rows = []
    for name in options.presets:
        flops = count(preset(name), reference_schema(*PAPER_FEATURES[name]), node=True)
        for batch in options.batches:
            exact: tuple[Tensor, Tensor] | None = None
            for precision, (_, tf32) in PRECISIONS.items():
                torch.backends.cuda.matmul.allow_tf32 = tf32
                scorer = fitting(Scorer(name, options.nodes, batch, precision, device))
                logits, kept = scorer()
                exact = exact or (logits, kept)
                eager = milliseconds(scorer)
                graph = milliseconds(captured(scorer))
                work = batch * options.nodes * flops.pair
                read = scorer.weight_bytes() + scorer.request_bytes()
                floor = 1e3 * max(work / top.flops[precision], read / top.bytes)
                best = min(eager, graph)
                rows.append(
                    {
                        "preset": name,
                        "batch": batch,
                        "precision": precision,
                        "parts": scorer.parts,
                        "eager_ms": eager,
                        "graph_ms": graph,
                        "ms_per_user": best / batch,
                        "flops": work,
                        "bytes": read,
                        "tflops": work / best / 1e9,
                        "floor_ms": floor,
                        "of_roofline": floor / best,
                        "bound": "arithmetic" if work / top.flops[precision] > read / top.bytes else "memory",
                        "kept_as_float32": _overlap(kept, exact[1]),
                    }
                )
                del scorer
                torch.cuda.empty_cache()
    return {
        "card": device_name(device),
        "torch": torch.__version__,
        "nodes": options.nodes,
        "kept": KEPT,
        "ceiling": {"flops": top.flops, "bytes": top.bytes},
        "rows": rows,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _overlap(kept: Tensor, exact: Tensor) -> float:
    """Share of the nodes that float32 keeps which are kept."""
    return float((kept.unsqueeze(-1) == exact.unsqueeze(-2)).any(-1).float().mean())


def render(found: dict[str, Any], command: str) -> str:
    """The report as Markdown."""
    top = found["ceiling"]
    header = ["MoNN", "users", "precision", "ms, eager", "ms, CUDA graph", "ms per user", "TFLOP/s", "floor, ms",
              "of the roofline", "bound by", f"top {found['kept']} as float32"]  # fmt: skip
    lines = [
        [row["preset"], str(row["batch"]), row["precision"], f"{row['eager_ms']:.3f}", f"{row['graph_ms']:.3f}",
         f"{row['ms_per_user']:.4f}", f"{row['tflops']:.1f}", f"{row['floor_ms']:.4f}",
         f"{row['of_roofline']:.0%}", row["bound"], f"{row['kept_as_float32']:.3f}"]
        for row in found["rows"]
    ]  # fmt: skip
    rates = ", ".join(f"{name} {value / 1e12:.0f} TFLOP/s" for name, value in top["flops"].items())
    parts = [
        f"# One layer of nodes on a GPU: {found['card']}",
        f"`{command}`",
        f"{found['nodes']} nodes per user, presets and feature counts of the paper's Table 5, random weights; torch "
        f"{found['torch']}, commit {found['commit']}, {found['date']}.",
        f"Measured ceilings of this card: {rates} ({MATRIX}³ matrix product); {top['bytes'] / 1e12:.2f} TB/s (copy, "
        "bytes read plus bytes written).",
        markdown(header, lines),
        "- Medians of the card's own clock. User and node embeddings and crossings are on the card when it starts; the "
        "towers ran before. Triton and transfers are not in it.\n"
        "- Floor: the larger of the matrix products' FLOPs over the matrix ceiling and the bytes of weights, nodes and "
        "requests, each read once, over the copy ceiling.\n"
        "- A batch that does not fit the card's memory at once is scored in parts; the JSON says in how many.\n"
        "- Random weights make the scores of nodes close to each other, so the last column is a harder test of a "
        "precision than a trained model's.",
    ]
    return "\n\n".join(parts) + "\n"


def run_gpu(options: GpuOptions, command: str, results: Path) -> Path:
    """Measure and write <results>/gpu-<card>.{json,md}; returns the Markdown's path."""
    found = measure(options)
    name = "-".join(found["card"].lower().split()[:2])
    path = results / f"gpu-{name}.json"
    results.mkdir(parents=True, exist_ok=True)
    write_json(path, {"command": command, **found})
    write_bytes(path.with_suffix(".md"), render(found, command).encode())
    return path.with_suffix(".md")
