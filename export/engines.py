"""Engines: what runs the networks, which file goes into a Triton version directory, which backend serves
it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from export import tensorrt
from export.graphs import Signature
from export.onnx_files import MAX_BATCH
from hsnn_core.errors import PublishError
from hsnn_core.files import copy_file, sync_directory

DEFAULT_ENGINE = "onnxruntime"


@dataclass(frozen=True)
class Engine:
    """`backend` is the name in config.pbtxt, `filename` the file of a version directory, `kind` where
    instances run.

    Plans of tensorrt-rtx need the TensorRT-RTX runtime: the local server's Python backend has it, the C++
    backend of NGC images has not (it reads plans of `tensorrt` only)."""

    name: str
    backend: str
    filename: str
    kind: Literal["KIND_CPU", "KIND_GPU"]
    library: str | None = None

    def build(
        self,
        onnx_file: Path,
        target: Path,
        signature: Signature,
        buckets: Sequence[int],
        targets: Sequence[str] = (),
    ) -> None:
        """Write the engine's file for one graph. `buckets`: the candidate counts C of a scorer; `targets`:
        compute capabilities ("SM80") to build for, TensorRT only. Raises PublishError with the builder's
        own messages."""
        if self.library is None:
            if onnx_file != target:
                copy_file(onnx_file, target)
                sync_directory(target.parent)
            return
        tensorrt.build_plan(
            self.library,
            onnx_file,
            target,
            signature,
            tensorrt.profiles(signature, buckets, MAX_BATCH),
            targets,
        )

    def file_for(self, stem: str) -> str:
        """Name of a graph's engine file in the export directory."""
        return stem + Path(self.filename).suffix


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("onnxruntime", "onnxruntime", "model.onnx", "KIND_CPU"),
        Engine("tensorrt-rtx", "tensorrt", "model.plan", "KIND_GPU", "tensorrt_rtx"),
        Engine("tensorrt", "tensorrt", "model.plan", "KIND_GPU", "tensorrt"),
    )
}


def engine_named(name: str) -> Engine:
    """The engine of that name, or PublishError with the names there are."""
    if name not in ENGINES:
        raise PublishError(f"engine {name!r} is unknown, expected one of: {', '.join(ENGINES)}")
    return ENGINES[name]
