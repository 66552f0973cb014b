"""Parity gates: what is exported computes what was trained, or nothing is published.

Three gates: every graph in ONNX Runtime against torch, the layer-wise search over ONNX against the search
over torch, and the bundle's manifest against the graphs. Each gives rows of one report;
`ParityReport.require` refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.graphs import DTYPES, ServingGraph, Signature
from hsnn_core.bundle import Bundle
from hsnn_core.errors import PublishError
from hsnn_core.features import Encoded
from hsnn_core.index import HierarchicalIndex
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import SearchResult, rank_scores, search

# Two float32 programs differ by rounding alone: 1e-7 of the largest term, over sums of some hundred terms.
ATOL = 1e-4
RTOL = 1e-4


@dataclass(frozen=True)
class ParityRow:
    """One comparison. `difference`: the largest absolute one; `worst`: the largest share of the tolerance
    atol + rtol * |expected| that was used up (at most 1 passes)."""

    gate: str
    subject: str
    inputs: str
    difference: float
    worst: float
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class ParityReport:
    """All rows of all gates."""

    rows: tuple[ParityRow, ...]

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(row.passed for row in self.rows)

    def table(self) -> str:
        """The rows as text, one line each."""
        header = ("gate", "subject", "inputs", "max abs diff", "of tolerance", "")
        cells = [
            (
                r.gate,
                r.subject,
                r.inputs,
                f"{r.difference:.2e}",
                f"{r.worst:.1%}",
                "ok" if r.passed else f"FAILED {r.note}",
            )
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in (header, *cells)) for i in range(len(header))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in (header, *cells)
        )

    def summary(self) -> str:
        """One line per gate."""
        lines = []
        for gate in dict.fromkeys(row.gate for row in self.rows):
            rows = [row for row in self.rows if row.gate == gate]
            worst = max(rows, key=lambda row: row.worst)
            lines.append(
                f"{gate}: {len(rows)} comparisons, {sum(not row.passed for row in rows)} failed, "
                f"largest difference {worst.difference:.1e} ({worst.worst:.1%} of the tolerance)"
            )
        return "\n".join(lines)

    def require(self) -> None:
        """PublishError naming every failed comparison, its difference and the tolerance."""
        failed = [row for row in self.rows if not row.passed]
        if failed:
            lines = [
                f"{r.gate}: {r.subject} on {r.inputs}: max abs diff {r.difference:.3e}, {r.worst:.2f} "
                f"times the tolerance {ATOL:g} + {RTOL:g}*|expected|{'; ' + r.note if r.note else ''}"
                for r in failed
            ]
            raise PublishError("\n  ".join(["parity gates failed, nothing is published:", *lines]))


def graph_rows(
    graph: ServingGraph, onnx_file: Path, cases: Mapping[str, Mapping[str, np.ndarray]]
) -> list[ParityRow]:
    """Torch against ONNX Runtime for one graph; one row per output and case (label -> named inputs)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(onnx_file), options, providers=["CPUExecutionProvider"])
    names = [spec.name for spec in graph.signature.outputs]
    rows = []
    for label, inputs in cases.items():
        expected = graph.run(dict(inputs))
        got = dict(zip(names, session.run(names, dict(inputs))))
        for name in names:
            rows.append(
                _row("onnx = torch", f"{graph.signature.stem}.{name}", label, got[name], expected[name])
            )
    return rows


def search_rows(
    index: HierarchicalIndex,
    reference: LayerScorer,
    other: LayerScorer,
    users: Encoded,
    widths: Sequence[int],
    k: int,
    rank: np.ndarray,
) -> list[ParityRow]:
    """The same search over two scorers. Scores at every rank agree within the tolerance; where ids differ,
    or the beams kept other nodes, the reference's scores of the exchanged nodes must be equal within it (a
    tie)."""
    expected = search(index, reference, users, widths, k, rank)
    got = search(index, other, users, widths, k, rank)
    rows = []
    same = np.ones(len(users.ids), dtype=bool)  # users whose beams agree so far
    for layer in range(1, index.layers + 1):
        largest = worst = 0.0
        for user in np.flatnonzero(same):
            left, right = (_kept(result, layer, user) for result in (expected, got))
            swapped = np.setxor1d(left, right)
            if len(swapped):
                same[user] = False
                keys = node_keys(index, reference, _user(users, user), layer, swapped, rank)
                spread = float(np.ptp(keys))
                largest, worst = max(largest, spread), max(worst, spread / float(_tolerance(keys).min()))
        note = f"nodes {'kept' if layer < index.layers else 'returned'} by one search only differ in score"
        rows.append(
            ParityRow(
                "search", f"layer {layer} nodes", f"{len(users.ids)} users", largest, worst, worst <= 1, note
            )
        )
    # Only where no tie was broken differently must every rank agree.
    valid = np.arange(k) < expected.valid[:, None]
    scores = [result.rank_score[same][valid[same]] for result in (got, expected)]
    note = "rank scores of the returned items differ"
    row = _row("search", "rank scores", f"{int(same.sum())} users", scores[0], scores[1], note)
    return [*rows, row]


def node_keys(
    index: HierarchicalIndex,
    scorer: LayerScorer,
    user: Encoded,
    layer: int,
    nodes: np.ndarray,
    rank: np.ndarray,
) -> np.ndarray:
    """Rank scores (C,) of `nodes` (C,) of one layer for one user, scored down from their ancestors."""
    path = [nodes]
    for level in range(layer, 1, -1):
        path.append(index.parents(level)[path[-1]])
    state = scorer.open(user)
    previous = np.zeros((1, len(nodes), 0), dtype=np.float32)
    logits = previous
    for level, at in enumerate(reversed(path), start=1):
        monn, logits = scorer.score(state, level, at[None].astype(np.int64), previous)
        previous = np.concatenate([previous, monn], axis=-1)
    return rank_scores(logits, rank)[0]


def manifest_rows(bundle: Bundle, signatures: Sequence[Signature]) -> list[ParityRow]:
    """The manifest names every graph, once, and its sizes are those of the graphs and the index."""
    manifest, index = bundle.manifest, bundle.index
    by_stem = {signature.stem: signature for signature in signatures}
    scorers = [by_stem.get(f"scorer_l{n}") for n in range(1, index.layers + 1)]
    checks = {
        "models": (
            [
                manifest["models"]["user_tower"],
                manifest["models"]["item_tower"],
                *manifest["models"]["scorers"],
            ],
            [signature.model_name for signature in signatures],
        ),
        "layers": (manifest["layers"], index.layers),
        "schema_hash": (manifest["schema_hash"], bundle.schema.hash),
        "tasks": (manifest["tasks"], [task.name for task in bundle.schema.tasks]),
        "embedding widths": (
            [table.shape[1] for table in bundle.embeddings],
            [_dim(scorer, "item") if scorer else None for scorer in scorers],
        ),
        "embedding types": (
            [str(table.dtype) for table in bundle.embeddings],
            [np.dtype(_dtype(scorer, "item")).name if scorer else None for scorer in scorers],
        ),
    }
    return [
        ParityRow(
            "manifest", name, "bundle", 0.0, 0.0, got == expected, f"manifest has {got}, expected {expected}"
        )
        for name, (got, expected) in checks.items()
    ]


def _row(
    gate: str, subject: str, inputs: str, got: np.ndarray, expected: np.ndarray, note: str = ""
) -> ParityRow:
    if got.shape != expected.shape:
        return ParityRow(
            gate, subject, inputs, np.inf, np.inf, False, f"shape {got.shape}, expected {expected.shape}"
        )
    if not got.size:
        return ParityRow(gate, subject, inputs, 0.0, 0.0, True, note)
    difference = np.abs(got.astype(np.float64) - expected)
    if not np.isfinite(difference).all():
        return ParityRow(gate, subject, inputs, np.inf, np.inf, False, "values that are not finite")
    worst = float((difference / _tolerance(expected)).max())
    return ParityRow(gate, subject, inputs, float(difference.max()), worst, worst <= 1, note)


def _tolerance(expected: np.ndarray) -> np.ndarray:
    tolerance: np.ndarray = ATOL + RTOL * np.abs(expected.astype(np.float64))
    return tolerance


def _kept(result: SearchResult, layer: int, user: int) -> np.ndarray:
    trace = result.layers[layer - 1]
    return trace.nodes[user, : trace.kept[user]]


def _user(users: Encoded, user: int) -> Encoded:
    return Encoded(users.dense[user : user + 1], users.ids[user : user + 1])


def _dim(signature: Signature, name: str) -> int | str | None:
    return next((spec.dims[-1] for spec in signature.inputs if spec.name == name), None)


def _dtype(signature: Signature, name: str) -> type[np.generic]:
    return next(DTYPES[spec.datatype] for spec in signature.inputs if spec.name == name)
