from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from standin import StandIn
from untrained import untrained_run

from export import column_scorer
from export.column_scorer import has_column_form
from export.export_run import id_limits
from export.graphs import ColumnScorerGraph, ScorerGraph, example_inputs, scorer_graph
from export.onnx_files import export_graph
from hsnn_train.checkpoint import load_run
from hsnn_train.hsnn import HSNN
from hsnn_train.overarch import DHENOverArch

# Every module of an OverArch, fields mixed down and not, node layers and the item layer, alignments of widths.
PRESETS = ["cpu_s", "cpu_m", "cpu_l", "medium"]
CODEBOOKS = [6, 3]


def model_of(layers: list[str], folder: Path) -> tuple[HSNN, dict[str, np.ndarray]]:
    """A model whose every parameter matters, and the limits of its random ids."""
    untrained_run(folder, {"layers": layers, "index": "joint", "codebooks": CODEBOOKS[: len(layers) - 1]})
    run = load_run(folder)
    with torch.no_grad():
        for parameter in run.model.parameters():
            if parameter.ndim < 2:
                torch.nn.init.normal_(parameter, std=0.5)
        for ensemble in run.model.ensemble:
            ensemble.crossing.normal_(std=0.5)
        for layer in range(1, len(layers) + 1):
            over = run.model.layer(layer).over
            if isinstance(over, DHENOverArch):
                over.head[-1].weight.mul_(30.0)  # begins so small that nothing below it would show
    return run.model, id_limits(run.schema, run.transform)


@pytest.mark.parametrize("preset", PRESETS)
def test_it_computes_the_models_scores_as_a_node_layer_and_as_the_item_layer(
    preset: str, tmp_path: Path
) -> None:
    model, limits = model_of([preset, preset], tmp_path)
    for layer in (1, 2):
        graph = scorer_graph(model, layer).eval()
        assert isinstance(graph, ColumnScorerGraph)
        export_graph(graph, tmp_path / "scorer.onnx")
        session = onnxruntime.InferenceSession(str(tmp_path / "scorer.onnx"))
        for batch, candidates in ((1, 1), (3, 20)):
            inputs = example_inputs(
                graph.signature, batch, candidates, np.random.default_rng(candidates), limits
            )
            expected = ScorerGraph(model, layer).run(inputs)
            assert graph.run(inputs).keys() == expected.keys()
            for name, got in zip(expected, session.run(None, inputs)):
                assert np.std(expected[name]) > 0 or expected[name].size <= 2
                np.testing.assert_allclose(got, expected[name], atol=2e-5, rtol=2e-5)


def test_a_gate_that_differs_would_be_seen(tmp_path: Path) -> None:
    """The reference is the model, not the form under test."""
    model, limits = model_of(["cpu_s"], tmp_path)
    graph = scorer_graph(model, 1)
    assert isinstance(graph, ColumnScorerGraph) and graph.columns.interaction is not None
    inputs = example_inputs(graph.signature, 1, 4, np.random.default_rng(0), limits)
    expected = graph.run(inputs)
    graph.columns.interaction.bias[0] += 1.0
    np.testing.assert_array_equal(graph.run(inputs)["logits"], expected["logits"])
    with torch.inference_mode():
        tensors = [torch.from_numpy(inputs[spec.name]) for spec in graph.signature.inputs]
        assert np.abs(graph(*tensors)[1].numpy() - expected["logits"]).max() > 1e-4


def test_more_ids_than_row_numbers_in_float32_keep_the_models_own_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = model_of(["cpu_s"], tmp_path)
    assert has_column_form(model, 1)
    monkeypatch.setattr(column_scorer, "MOST_ROWS", 60)
    assert type(scorer_graph(model, 1)) is ScorerGraph


@pytest.mark.parametrize("preset", ["two_tower_xs", "cpu_mol"])
def test_other_scorers_keep_the_models_own_form(preset: str, tmp_path: Path) -> None:
    model, _ = model_of([preset], tmp_path)
    assert not has_column_form(model, 1)
    assert type(scorer_graph(model, 1)) is ScorerGraph


def test_models_that_are_no_hsnn_keep_their_form() -> None:
    assert type(scorer_graph(StandIn(layers=1), 1)) is ScorerGraph
