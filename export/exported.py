"""What an export leaves in its directory, and that it is still what was checked.

    export/{user_tower,item_tower,scorer_l1..}.onnx   the graphs; beside them .plan files for TensorRT
    export/bundle/                                    index, transform, schema, smoke request (hsnn_core.bundle)
    export/export.json                                engine, signatures, sha256 of the graphs' files, parity report

export.json is written last: a directory without it is an export that did not pass its gates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.engines import Engine, engine_named
from export.graphs import Signature, TensorSpec
from export.parity import ParityReport, ParityRow
from hsnn_core.bundle import Bundle
from hsnn_core.errors import FormatError, PublishError
from hsnn_core.files import file_sha256, read_text, write_bytes
from hsnn_core.manifest import inside

EXPORT_FILE = "export.json"
BUNDLE_DIR = "bundle"
FORMAT_VERSION = 1
DATATYPES = ["FP16", "FP32", "FP64", "INT32", "INT64"]


@dataclass(frozen=True)
class ExportedGraph:
    """One serving graph: its signature, the engine's file, and the candidate buckets it was built for
    (none for towers)."""

    signature: Signature
    file: str
    sha256: str
    buckets: tuple[int, ...]


@dataclass(frozen=True)
class Exported:
    """A finished export: towers first, then scorers 1..N."""

    path: Path
    engine: Engine
    graphs: tuple[ExportedGraph, ...]
    report: ParityReport

    @property
    def bundle(self) -> Path:
        """The bundle's directory."""
        return self.path / BUNDLE_DIR

    def write(self) -> None:
        """Write export.json (aside, then renamed)."""
        value = {
            "format": "hsnn-export",
            "format_version": FORMAT_VERSION,
            "engine": self.engine.name,
            "graphs": [asdict(graph) for graph in self.graphs],
            "parity": [asdict(row) for row in self.report.rows],
        }
        write_bytes(self.path / EXPORT_FILE, (json.dumps(value, indent=1) + "\n").encode())

    def verify(self) -> Bundle:
        """Check every file against its recorded sha256 and open the bundle. FormatError names the file and
        both hashes."""
        for graph in self.graphs:
            check_sha256(inside(self.path, graph.file), graph.sha256)
        return Bundle.open(self.bundle, verify=True)


def exported_graph(path: Path, signature: Signature, buckets: Sequence[int]) -> ExportedGraph:
    """Record a graph's engine file at `path`."""
    return ExportedGraph(signature, path.name, file_sha256(path), tuple(buckets))


def open_export(source: Path) -> Exported:
    """The export at `source`: a run directory or its export folder. PublishError when there is no finished
    one."""
    path = next((p for p in (source, source / "export") if (p / EXPORT_FILE).is_file()), None)
    if path is None:
        raise PublishError(
            f"{source}: no {EXPORT_FILE} there nor in its export folder; "
            "expected a run that `hsnn export` finished"
        )
    try:
        value = json.loads(read_text(path / EXPORT_FILE))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path / EXPORT_FILE}: not JSON ({error}); export the run again") from error
    version = value.get("format_version") if isinstance(value, dict) else None
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path / EXPORT_FILE}: format version {version!r}, expected {FORMAT_VERSION}; export the run again"
        )
    try:
        graphs = tuple(_graph(graph) for graph in value["graphs"])
        report = ParityReport(tuple(ParityRow(**row) for row in value["parity"]))
        return Exported(path, engine_named(value["engine"]), graphs, report)
    except (KeyError, TypeError) as error:
        raise FormatError(
            f"{path / EXPORT_FILE}: edited or cut short ({error!r}); export the run again"
        ) from error


def check_sha256(path: Path, expected: str) -> None:
    """FormatError when `path` is missing or does not have this sha256."""
    if not path.is_file():
        raise FormatError(f"{path}: missing; export the run again")
    got = file_sha256(path)
    if got != expected:
        raise FormatError(f"{path}: sha256 {got}, expected {expected}; export the run again")


def _graph(value: dict[str, Any]) -> ExportedGraph:
    signature, buckets = value["signature"], value["buckets"]
    texts = (signature["stem"], value["file"], value["sha256"])
    if not all(isinstance(text, str) for text in texts) or not all(
        type(size) is int and size > 0 for size in buckets
    ):
        raise TypeError(f"graph {texts!r:.120} with buckets {buckets!r:.80}")
    return ExportedGraph(
        Signature(signature["stem"], _specs(signature["inputs"]), _specs(signature["outputs"])),
        value["file"],
        value["sha256"],
        tuple(buckets),
    )


def _specs(values: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    for value in values:
        dims = value["dims"]
        right = isinstance(dims, list) and bool(dims) and all(map(_is_dim, dims))
        if not right or not isinstance(value["name"], str) or value["datatype"] not in DATATYPES:
            raise TypeError(f"tensor {value!r:.120}")
    return tuple(TensorSpec(value["name"], value["datatype"], tuple(value["dims"])) for value in values)


def _is_dim(dim: Any) -> bool:
    return dim in ("B", "C") if isinstance(dim, str) else type(dim) is int and (dim == -1 or 0 < dim < 2**31)
