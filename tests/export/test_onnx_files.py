from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from standin import StandIn

from export.graphs import ItemTowerGraph, ScorerGraph, UserTowerGraph, example_inputs, serving_graphs
from export.onnx_files import OPSET, export_graph, read_signature
from hsnn_core.errors import PublishError

MODELS = {
    "three layers": {},
    "flat": {"layers": 1},
    "no interactions": {"layers": 2, "cross": (0, 0)},
    "ids only, dense only": {"layers": 1, "user": (0, 4), "item": (2, 0), "cross": (3, 0)},
}


@pytest.mark.parametrize("kwargs", MODELS.values(), ids=MODELS)
def test_every_graph_computes_what_torch_computes_at_any_size(kwargs: dict, tmp_path: Path) -> None:
    for graph in serving_graphs(StandIn(**kwargs)):
        path = tmp_path / f"{graph.signature.stem}.onnx"
        signature = export_graph(graph, path)
        session = onnxruntime.InferenceSession(str(path))
        for batch, candidates in ((1, 1), (2, 3), (7, 50)):
            inputs = example_inputs(signature, batch, candidates, np.random.default_rng(batch))
            assert set(inputs) == {value.name for value in session.get_inputs()}
            expected = graph.run(inputs)
            for spec, got in zip(signature.outputs, session.run(None, inputs)):
                np.testing.assert_allclose(got, expected[spec.name], atol=1e-5, rtol=1e-5)


def test_names_types_and_dynamic_axes_are_the_contract(tmp_path: Path) -> None:
    signatures = {
        graph.signature.stem: export_graph(graph, tmp_path / f"{graph.signature.stem}.onnx")
        for graph in serving_graphs(StandIn())
    }
    assert list(signatures) == ["user_tower", "item_tower", "scorer_l1", "scorer_l2", "scorer_l3"]
    assert [str(spec) for spec in signatures["item_tower"].outputs] == [
        "item_l1 FP32 [B, 8]",
        "item_l2 FP32 [B, 16]",
        "item_l3 FP32 [B, 24]",
        "index FP32 [B, 6]",
    ]
    assert [str(spec) for spec in signatures["scorer_l3"].inputs] == [
        "user FP32 [B, 32]",
        "item FP32 [B, C, 24]",
        "cross_dense FP32 [B, C, 6]",
        "cross_ids INT32 [B, C, 5]",
        "previous FP32 [B, C, 4]",
    ]
    assert [spec.name for spec in signatures["scorer_l1"].inputs] == [
        "user",
        "item",
        "cross_dense",
        "cross_ids",
    ]
    assert signatures["scorer_l1"].model_name == "hsnn_scorer_l1"
    assert read_signature(tmp_path / "scorer_l3.onnx") == signatures["scorer_l3"]


def test_the_same_weights_give_the_same_bytes_and_no_paths_of_this_machine(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.onnx", "b.onnx")]
    for path in paths:
        export_graph(ScorerGraph(StandIn(seed=3), 2).eval(), path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert b".py" not in first
    model = onnx.load_from_string(first)
    assert [entry.version for entry in model.opset_import] == [OPSET]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


def test_a_graph_holds_only_its_own_weights(tmp_path: Path) -> None:
    model = StandIn(cardinality=5000)
    for graph, most in ((ScorerGraph(model, 1), 200_000), (ItemTowerGraph(model), 200_000)):
        export_graph(graph.eval(), tmp_path / "g.onnx")
        # One table of 5000 x 8 floats is 160 kB; the model has three.
        assert (tmp_path / "g.onnx").stat().st_size < most


class TopK(StandIn):
    def user_tower(self, dense, ids):  # type: ignore[no-untyped-def]
        return tuple(torch.topk(out, out.shape[1])[0] for out in super().user_tower(dense, ids))


class Breaks(StandIn):
    def user_tower(self, dense, ids):  # type: ignore[no-untyped-def]
        raise ValueError("tower on fire")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (TopK, "graph user_tower: operators TopK are not allowed in serving graphs"),
        (Breaks, "graph user_tower: torch could not export it to ONNX: tower on fire"),
    ],
)
def test_refused_graphs_leave_no_file(model: type[StandIn], message: str, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=message):
        export_graph(UserTowerGraph(model()).eval(), tmp_path / "user_tower.onnx")
    assert not list(tmp_path.iterdir())
