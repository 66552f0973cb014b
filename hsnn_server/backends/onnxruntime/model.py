"""Triton backend ``onnxruntime`` in Python: model.onnx of a version through ONNX Runtime, as NVIDIA's C++
one does.

Understood of config.pbtxt: inputs, outputs, max_batch_size, default_model_filename, KIND_CPU and KIND_GPU,
and the parameters intra_op_thread_count, inter_op_thread_count and pairs_per_call.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from responses import respond

_TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(double)": "TYPE_FP64",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(bool)": "TYPE_BOOL",
}


class TritonPythonModel:
    """One instance of one version of a model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        self._batched = config["max_batch_size"] > 0
        self._pairs = _integer(config.get("parameters", {}), "pairs_per_call", "0")
        self._per_candidate = {tensor["name"] for tensor in config["input"] if int(tensor["dims"][0]) == -1}
        model = f"{args['model_name']} version {args['model_version']}"
        file = Path(args["model_repository"], args["model_version"], _file_name(config))
        if not file.is_file():
            raise pb_utils.TritonModelException(f"{model}: {file} is missing, expected an ONNX graph")
        device = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        try:
            self._session = onnxruntime.InferenceSession(
                str(file), _session_options(config), providers=_providers(device)
            )
        except Exception as error:  # a dozen unrelated classes
            raise pb_utils.TritonModelException(
                f"{model}: ONNX Runtime can't load {file}: {error}"
            ) from error
        self._check(model, "input", config["input"], self._session.get_inputs())
        self._check(model, "output", config["output"], self._session.get_outputs())

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return respond(requests, self._run, self._batched)

    def _run(self, inputs: dict[str, np.ndarray], outputs: list[str]) -> Sequence[np.ndarray]:
        if not self._pairs:
            return self._session.run(outputs, inputs)
        return in_pieces(
            lambda part: self._session.run(outputs, part), inputs, self._per_candidate, self._pairs
        )

    def _check(self, model: str, kind: str, declared: Sequence[Any], graph: Sequence[Any]) -> None:
        """Refuse at load what would otherwise fail at every request."""
        found = {tensor.name: tensor for tensor in graph}
        names = {tensor["name"] for tensor in declared}
        problems = [
            f"{kind} {name} is not in config.pbtxt" for name in found if name not in names and kind == "input"
        ]
        for tensor in declared:
            name = tensor["name"]
            if name not in found:
                problems.append(f"{kind} {name} is not in the graph, which has {', '.join(found)}")
                continue
            dims = [int(dim) for dim in tensor["dims"]]
            expected = [-1, *dims] if self._batched else dims
            if _TYPES.get(found[name].type) != tensor["data_type"]:
                problems.append(
                    f"{kind} {name} is {tensor['data_type']}, but {found[name].type} in the graph"
                )
            elif not _fits(expected, found[name].shape):
                problems.append(f"{kind} {name} has shape {expected}, but {found[name].shape} in the graph")
        if problems:
            raise pb_utils.TritonModelException(
                f"{model}: config.pbtxt and graph disagree: {'; '.join(problems)}"
            )


def in_pieces(
    network: Callable[[dict[str, np.ndarray]], Sequence[np.ndarray]],
    inputs: dict[str, np.ndarray],
    per_candidate: set[str],
    pairs: int,
) -> Sequence[np.ndarray]:
    """``network`` over at most ``pairs`` <row, candidate> pairs at a time, whose activations stay in a core's cache.

    The inputs ``per_candidate`` and all outputs are (B, C, ...), other inputs (B, ...).
    """
    batch, count = next(value.shape for name, value in inputs.items() if name in per_candidate)[:2]
    step = max(1, pairs // max(1, batch))
    pieces = []
    for start in range(0, max(1, count), step):  # the shapes of no candidates are the network's to say
        part = {
            name: np.ascontiguousarray(value[:, start : start + step]) if name in per_candidate else value
            for name, value in inputs.items()
        }
        pieces.append(network(part))
    return pieces[0] if len(pieces) == 1 else [np.concatenate(piece, axis=1) for piece in zip(*pieces)]


def _file_name(config: Mapping[str, Any]) -> str:
    return config.get("default_model_filename") or "model.onnx"


def _session_options(config: Mapping[str, Any]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    parameters = config.get("parameters", {})
    # 0 leaves the choice to ONNX Runtime: all cores, which several models on one machine can't each have.
    limit = os.environ.get("OMP_NUM_THREADS", "0")
    options.intra_op_num_threads = _integer(parameters, "intra_op_thread_count", limit)
    options.inter_op_num_threads = _integer(parameters, "inter_op_thread_count", limit)
    return options


def _integer(parameters: Mapping[str, Any], name: str, default: str) -> int:
    text = parameters.get(name, {}).get("string_value", default)
    if not text.isdecimal():
        raise pb_utils.TritonModelException(f"parameter {name} is {text!r}, expected a number of threads")
    return int(text)


def _providers(device: int | None) -> list[Any]:
    available = onnxruntime.get_available_providers()
    if device is not None and "CUDAExecutionProvider" in available:
        return [("CUDAExecutionProvider", {"device_id": device}), "CPUExecutionProvider"]
    if device is not None:
        pb_utils.Logger.log_warn(
            f"this ONNX Runtime has only {', '.join(available)}: GPU instances run on the CPU"
        )
    return ["CPUExecutionProvider"]


def _fits(declared: Sequence[int], graph: Sequence[Any]) -> bool:
    """Equal up to what either side leaves open (-1, a name or None)."""
    return len(declared) == len(graph) and all(
        mine == -1 or not isinstance(theirs, int) or mine == theirs for mine, theirs in zip(declared, graph)
    )
