"""TensorRT plans from ONNX files: strongly typed, one optimisation profile per candidate bucket.

`tensorrt_rtx` builds ahead of time for several compute capabilities and needs no GPU; `tensorrt` builds
for the GPU of the machine. Both share one API, so one function drives either.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.graphs import Signature
from hsnn_core.errors import PublishError
from hsnn_core.files import write_bytes

DEFAULT_TARGETS = ("SM80", "SM89")
_INSTALL = {"tensorrt_rtx": "pip install tensorrt-rtx", "tensorrt": "pip install 'hsnn-triton[tensorrt]'"}


@dataclass(frozen=True)
class Profile:
    """Range of shapes that one optimisation profile covers: B from 1 to `max_batch`, best at `best_batch`;
    C fixed."""

    candidates: int
    best_batch: int
    max_batch: int


def profiles(signature: Signature, buckets: Sequence[int], max_batch: int) -> tuple[Profile, ...]:
    """The profiles that config.pbtxt declares for a graph: one per candidate bucket for scorers (the
    search pads C to a bucket), one for towers."""
    if not signature.has_candidates:
        return (Profile(1, min(8, max_batch), max_batch),)
    if not buckets:
        raise PublishError(f"graph {signature.stem}: no candidate buckets, expected at least one")
    return tuple(Profile(bucket, min(8, max_batch), max_batch) for bucket in sorted(set(buckets)))


def build_plan(
    library: str,
    onnx_file: Path,
    plan: Path,
    signature: Signature,
    shapes: Sequence[Profile],
    targets: Sequence[str] = (),
) -> None:
    """Parse `onnx_file` and write the serialised engine to `plan` (aside, then renamed).

    `library`: "tensorrt_rtx" or "tensorrt"; `targets`: names of compute capabilities, tensorrt_rtx only
    (default: SM80 and SM89). Raises PublishError with the parser's or builder's messages."""
    trt = _load(library)
    messages: list[str] = []
    logger = _logger(trt, messages)
    builder = trt.Builder(logger)
    if builder is None:
        raise PublishError(f"graph {signature.stem}: {library} could not start a builder{_list(messages)}")
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_file.read_bytes()):
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        raise PublishError(f"graph {signature.stem}: {library} can't parse {onnx_file.name}{_list(errors)}")
    config = builder.create_builder_config()
    for shape in shapes:
        config.add_optimization_profile(_profile(builder, network, signature, shape))
    _set_targets(trt, library, config, targets)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise PublishError(f"graph {signature.stem}: {library} can't build {onnx_file.name}{_list(messages)}")
    write_bytes(plan, memoryview(serialized).tobytes())


def _load(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise PublishError(
            f"engine {library.replace('_', '-')} needs the Python package {library}: {error}; "
            f"{_INSTALL[library]}, or choose the engine onnxruntime"
        ) from error


def _logger(trt: Any, messages: list[str]) -> Any:
    class Collector(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(message)

    return Collector()


def _profile(builder: Any, network: Any, signature: Signature, shape: Profile) -> Any:
    profile = builder.create_optimization_profile()
    specs = {spec.name: spec for spec in signature.inputs}
    for i in range(network.num_inputs):
        name = network.get_input(i).name
        sizes = [
            specs[name].shape(batch, shape.candidates) for batch in (1, shape.best_batch, shape.max_batch)
        ]
        profile.set_shape(name, *sizes)
    return profile


def _set_targets(trt: Any, library: str, config: Any, targets: Sequence[str]) -> None:
    if library != "tensorrt_rtx":
        if targets:
            raise PublishError(
                f"engine {library}: builds for this machine's GPU, but got targets {', '.join(targets)}; "
                "leave them out, or choose the engine tensorrt-rtx"
            )
        return
    known = trt.ComputeCapability.__members__
    names = [target.upper() for target in targets or DEFAULT_TARGETS]
    for name in names:
        if name not in known or name == "NONE":
            choices = ", ".join(key for key in known if key != "NONE")
            raise PublishError(f"target {name!r} is unknown to {library}, expected some of: {choices}")
    config.num_compute_capabilities = len(names)
    for i, name in enumerate(names):
        config.set_compute_capability(known[name], i)


def _parser_error(error: Any) -> str:
    return f"node {error.node_name()} ({error.node_operator()}): {error.desc()}"


def _list(messages: Sequence[str]) -> str:
    return "".join(f"\n  {message}" for message in messages) or " (it gave no reason)"
