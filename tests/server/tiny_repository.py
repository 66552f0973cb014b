"""A model repository of one-node ONNX networks for the tests of the local server: y = scale * x, total =
sum of y."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CONFIG = """
name: "{name}"
backend: "{backend}"
max_batch_size: 8
version_policy {{ latest {{ num_versions: 2 }} }}
input [ {{ name: "x" data_type: {datatype} dims: [ -1 ] }} ]
output [
  {{ name: "y" data_type: TYPE_FP32 dims: [ -1 ] }},
  {{ name: "total" data_type: TYPE_FP32 dims: [ 1 ] }}
]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
"""


def write_model(
    repository: Path,
    name: str,
    scale: float = 2.0,
    version: int = 1,
    more: str = "",
    datatype: str = "TYPE_FP32",
) -> Path:
    """Model ``name`` with x (B, C) -> y (B, C), total (B, 1), ``more`` in its config.

    Returns the path of its graph.
    """
    text = CONFIG.format(name=name, backend="onnxruntime", datatype=datatype) + more
    write_config(repository, name, text)
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "scale"], ["y"]),
            helper.make_node("ReduceSum", ["y", "axis"], ["total"], keepdims=1),
        ],
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "C"])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "C"]),
            helper.make_tensor_value_info("total", TensorProto.FLOAT, ["B", 1]),
        ],
        [
            numpy_helper.from_array(np.float32(scale), "scale"),
            numpy_helper.from_array(np.array([1], np.int64), "axis"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = repository / name / str(version) / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(model, str(path))
    return path


def write_config(repository: Path, name: str, text: str) -> None:
    (repository / name).mkdir(parents=True, exist_ok=True)
    (repository / name / "config.pbtxt").write_text(text)
