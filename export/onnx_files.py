"""Serving graphs as ONNX files: written deterministically, checked, and read back as signatures."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto

from export.graphs import AnchoredGraph, Datatype, ServingGraph, Signature, TensorSpec, example_inputs
from hsnn_core.errors import PublishError
from hsnn_core.files import write_bytes

OPSET = 20  # the newest that torch's tracing exporter writes; ONNX Runtime >= 1.17 and TensorRT >= 10 read it
MAX_BATCH = 64
# EmbeddingBag has no ONNX operator; TopK in TensorRT stops at 3840, and choosing is the search's work.
FORBIDDEN_OPS = frozenset({"TopK", "EmbeddingBag", "NonZero", "Loop", "If", "Scan"})
_PROTOBUF_LIMIT = 2**31 - 1
_DATATYPES: dict[int, Datatype] = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.INT32: "INT32",
}


def export_graph(graph: ServingGraph, path: Path) -> Signature:
    """Write one serving graph to `path` with B (and C) dynamic; return its signature as read from the file.

    The same weights give the same bytes. Raises PublishError when the graph can't be exported, holds an
    operator that the engines don't take, lost or renamed an input, or fixed an axis that must stay
    dynamic."""
    stem = graph.signature.stem
    try:
        model = _trace(graph)
        read = {value.name for value in model.graph.input}
        unused = tuple(spec.name for spec in graph.signature.inputs if spec.name not in read)
        if unused:
            model = _trace(AnchoredGraph(graph, unused).eval())
    except Exception as error:
        raise PublishError(f"graph {stem}: torch could not export it to ONNX: {error}") from error
    _clean(model)
    _check_operators(stem, model)
    signature = _signature(stem, model)
    _check_signature(graph.signature, signature)
    if model.ByteSize() > _PROTOBUF_LIMIT:
        raise PublishError(
            f"graph {stem}: {model.ByteSize()} bytes, but one ONNX file holds at most {_PROTOBUF_LIMIT}; "
            "use smaller vocabularies or hash sizes in the schema, or a smaller width"
        )
    onnx.checker.check_model(model, full_check=True)
    write_bytes(path, model.SerializeToString(deterministic=True))
    return signature


def read_signature(path: Path) -> Signature:
    """Inputs and outputs of an ONNX file, the letters B and C for its dynamic axes."""
    return _signature(path.stem, onnx.load(path, load_external_data=False))


def _trace(graph: ServingGraph) -> onnx.ModelProto:
    """Trace the graph. The tracing exporter writes in 0.3 s what the one over torch.export takes 6 s for,
    with the same operators; what a trace can't see (a branch on a size) the parity gates do, at other
    sizes than these."""
    signature = graph.signature
    inputs = example_inputs(signature, batch=2, candidates=3, rng=np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        file = Path(folder) / "graph.onnx"
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            tuple(torch.from_numpy(inputs[spec.name]) for spec in signature.inputs),
            str(file),
            dynamo=False,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            dynamic_axes={
                spec.name: {axis: dim for axis, dim in enumerate(spec.dims) if isinstance(dim, str)}
                for spec in (*signature.inputs, *signature.outputs)
            },
            opset_version=OPSET,
        )
        model = onnx.load(file)
    _declare_outputs(model, graph.run(inputs), signature)
    return model


def _declare_outputs(model: onnx.ModelProto, outputs: dict[str, np.ndarray], signature: Signature) -> None:
    """Tracing leaves some widths of outputs open; what a run gave is what config.pbtxt has to say."""
    letters = {spec.name: spec.dims for spec in signature.outputs}
    for value in model.graph.output:
        sizes = zip(value.type.tensor_type.shape.dim, letters[value.name], outputs[value.name].shape)
        for dim, letter, size in sizes:
            if not isinstance(letter, str):
                dim.dim_value = size


def _clean(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes (stack traces with file paths): they differ between machines and mean
    nothing here."""
    graph = model.graph
    del model.metadata_props[:]
    del graph.metadata_props[:]
    del graph.value_info[:]
    model.doc_string = ""
    graph.doc_string = ""
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.input, *graph.output):
        del value.metadata_props[:]
    for weight in graph.initializer:
        del weight.metadata_props[:]


def _check_operators(stem: str, model: onnx.ModelProto) -> None:
    found = sorted({node.op_type for node in model.graph.node} & FORBIDDEN_OPS)
    if found:
        raise PublishError(f"graph {stem}: operators {', '.join(found)} are not allowed in serving graphs")
    if model.functions:
        raise PublishError(f"graph {stem}: {len(model.functions)} local functions were not inlined")


def _signature(stem: str, model: onnx.ModelProto) -> Signature:
    return Signature(stem, _specs(stem, model.graph.input), _specs(stem, model.graph.output))


def _specs(stem: str, values: list[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        if tensor.elem_type not in _DATATYPES:
            got = TensorProto.DataType.Name(tensor.elem_type)
            raise PublishError(
                f"graph {stem}: tensor {value.name} is {got}, expected FLOAT, FLOAT16 or INT32"
            )
        dims = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        specs.append(TensorSpec(value.name, _DATATYPES[tensor.elem_type], dims))
    return tuple(specs)


def _check_signature(expected: Signature, got: Signature) -> None:
    for kind, ours, theirs in (
        ("input", expected.inputs, got.inputs),
        ("output", expected.outputs, got.outputs),
    ):
        same = len(ours) == len(theirs) and all(map(_matches, ours, theirs))
        if not same:
            raise PublishError(
                f"graph {expected.stem}: {kind}s of the ONNX file are [{_text(theirs)}], "
                f"expected [{_text(ours)}]"
            )


def _matches(expected: TensorSpec, got: TensorSpec) -> bool:
    if (expected.name, expected.datatype, len(expected.dims)) != (got.name, got.datatype, len(got.dims)):
        return False
    return all(
        have == want or (want == -1 and isinstance(have, int)) for want, have in zip(expected.dims, got.dims)
    )


def _text(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(str(spec) for spec in specs)
