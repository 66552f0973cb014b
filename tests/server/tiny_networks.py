"""Small real ONNX networks with the tensors of a user tower and of a layer's scorer, made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH = 8  # of the hidden layer
BINS = 97  # ids are folded into a table of this many rows
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT32


class _Graph:
    """Nodes and weights of a graph in the making."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(seed)

    def node(self, operator: str, inputs: list[str], output: str | None = None, **attributes: object) -> str:
        output = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def weight(self, *shape: int) -> str:
        return self.constant(self._rng.normal(0, 0.7, shape).astype(np.float32))

    def constant(self, value: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def pooled(self, ids: str, axis: int) -> str:
        """(..., S) int32 ids -> (..., WIDTH) mean of their rows of a table."""
        rows = self.node("Mod", [ids, self.constant(np.array(BINS, np.int32))])
        vectors = self.node("Gather", [self.weight(BINS, WIDTH), rows])
        return self.node("ReduceMean", [vectors, self.constant(np.array([axis], np.int64))], keepdims=0)

    def save(self, path: Path, inputs: dict[str, tuple], outputs: dict[str, tuple]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [_value(name, *spec) for name, spec in inputs.items()],
            [_value(name, *spec) for name, spec in outputs.items()],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model)
        onnx.save(model, str(path))


def _value(name: str, element: int, *shape: object) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, list(shape))


def write_user_tower(path: Path, dense: int, ids: int, layers: int, seed: int) -> None:
    """user_dense (B, dense), user_ids (B, ids) -> user_l1..user_lN (B, WIDTH)."""
    graph = _Graph(seed)
    joined = graph.node("Concat", ["user_dense", graph.pooled("user_ids", 1)], axis=1)
    for layer in range(1, layers + 1):
        hidden = graph.node("MatMul", [joined, graph.weight(dense + WIDTH, WIDTH)])
        graph.node("Tanh", [hidden], f"user_l{layer}")
    graph.save(
        path,
        {"user_dense": (FLOAT, "B", dense), "user_ids": (INT, "B", ids)},
        {f"user_l{layer}": (FLOAT, "B", WIDTH) for layer in range(1, layers + 1)},
    )


def scorer_inputs(
    layer: int, tasks: int, embedding: int, cross_dense: int, cross_ids: int
) -> dict[str, tuple]:
    """Name -> (element type, dims without the batch) of a layer's scorer; -1 is the number of candidates."""
    inputs: dict[str, tuple] = {
        "user": (FLOAT, WIDTH),
        "item": (FLOAT, -1, embedding),
        "cross_dense": (FLOAT, -1, cross_dense),
        "cross_ids": (INT, -1, cross_ids),
    }
    if layer > 1:
        inputs["previous"] = (FLOAT, -1, (layer - 1) * tasks)
    return inputs


def write_scorer(path: Path, inputs: dict[str, tuple], tasks: int, seed: int) -> None:
    """The inputs of ``scorer_inputs`` -> monn, logits (B, C, tasks)."""
    graph = _Graph(seed)
    user = graph.node("Unsqueeze", ["user", graph.constant(np.array([1], np.int64))])
    hidden = graph.node("MatMul", [user, graph.weight(WIDTH, WIDTH)])
    for name in ("item", "cross_dense"):
        part = graph.node("MatMul", [name, graph.weight(inputs[name][-1], WIDTH)])
        hidden = graph.node("Add", [hidden, part])
    hidden = graph.node("Add", [hidden, graph.pooled("cross_ids", 2)])
    graph.node("MatMul", [graph.node("Tanh", [hidden]), graph.weight(WIDTH, tasks)], "monn")
    total = graph.node("MatMul", ["monn", graph.weight(tasks, tasks)])
    if "previous" in inputs:
        carried = graph.node("MatMul", ["previous", graph.weight(inputs["previous"][-1], tasks)])
        total = graph.node("Add", [total, carried])
    graph.node("Add", [total, graph.weight(tasks)], "logits")
    dims = {
        name: (spec[0], "B", *("C" if dim == -1 else dim for dim in spec[1:]))
        for name, spec in inputs.items()
    }
    graph.save(path, dims, dict.fromkeys(("monn", "logits"), (FLOAT, "B", "C", tasks)))
