from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from standin import StandIn
from standin_world import StandInRunner, standin_source

from export import export_run
from export.export_run import Source, export_source
from export.exported import Exported, open_export
from export.graphs import ScorerGraph, example_inputs
from export.onnx_files import export_graph
from export.parity import ParityReport, graph_rows, manifest_rows, search_rows
from hsnn_core.bundle import Bundle
from hsnn_core.errors import FormatError, PublishError
from hsnn_core.onnx_runner import OnnxRunner
from hsnn_core.scorer import LayerScorer, Runner
from hsnn_core.search import search


def test_an_export_passes_every_gate_and_keeps_its_report(exported: Exported) -> None:
    rows = exported.report.rows
    assert exported.report.passed
    assert {row.gate for row in rows} == {"onnx = torch", "search", "manifest"}
    outputs = {row.subject for row in rows if row.gate == "onnx = torch" and row.inputs == "real"}
    assert {"user_tower.user_l3", "item_tower.index", "scorer_l1.logits", "scorer_l3.monn"} <= outputs
    assert open_export(exported.path) == exported == open_export(exported.path.parent)
    assert "scorer_l2.logits" in exported.report.table()
    assert "onnx = torch: 39 comparisons" in exported.report.summary()


def test_the_smoke_request_is_answered_as_recorded(exported: Exported) -> None:
    bundle = exported.verify()
    smoke = bundle.smoke()
    files = [exported.path / f"{stem}.onnx" for stem in ("user_tower", "scorer_l1", "scorer_l2", "scorer_l3")]
    users = bundle.transform.encode_users(smoke.users)
    rank = bundle.schema.rank
    found = search(
        bundle.index,
        bundle.scorer(OnnxRunner(files[0], files[1:])),
        users,
        bundle.manifest["widths"],
        10,
        rank,
    )
    np.testing.assert_array_equal(found.item_ids, smoke.item_ids)
    np.testing.assert_allclose(found.probabilities, smoke.probabilities, atol=1e-6)
    assert (smoke.item_ids[:, 0] > 0).all()


def test_other_weights_are_refused_by_graph_output_difference_and_tolerance(tmp_path: Path) -> None:
    path = tmp_path / "scorer_l2.onnx"
    export_graph(ScorerGraph(StandIn(seed=1), 2).eval(), path)
    graph = ScorerGraph(StandIn(seed=2), 2).eval()
    inputs = example_inputs(graph.signature, 2, 5, np.random.default_rng(0))
    report = ParityReport(tuple(graph_rows(graph, path, {"random 2x5": inputs})))
    assert not report.passed
    with pytest.raises(
        PublishError,
        match=r"nothing is published:\n  onnx = torch: scorer_l2\.monn on random 2x5: max abs diff "
        r"\d\.\d+e[+-]\d+, \d+\.\d+ times the tolerance 0\.0001 \+ 0\.0001\*\|expected\|\n"
        r"  .*scorer_l2\.logits",
    ):
        report.require()
    assert "FAILED" in report.table()


class Drifts(StandIn):
    """Takes another branch for one pair than for many: what a trace can't see."""

    def score(self, layer, user, item, *rest):  # type: ignore[no-untyped-def]
        monn, logits = super().score(layer, user, item, *rest)
        return (monn, logits) if item.shape[1] < 30 else (monn, logits + 1)


def test_a_failing_gate_keeps_the_earlier_export(source: Source, tmp_path: Path) -> None:
    directory = tmp_path / "export"
    before = export_source(standin_source(layers=1), directory, progress=False)
    model = Drifts(3, user=(3, 5), item=(1, 3), cross=(6, 3), cardinality=62)
    drifting = dataclasses.replace(source, model=model, runner=StandInRunner(model))
    with pytest.raises(PublishError, match=r"scorer_l1\.logits on random 5x33: max abs diff 1\.0"):
        export_source(drifting, directory, progress=False)
    assert open_export(directory) == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_no_space_keeps_the_earlier_export(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = export_source(standin_source(layers=1), tmp_path / "export", progress=False)
    monkeypatch.setattr(export_run, "write_bundle", full)
    with pytest.raises(
        PublishError, match="No space left on device; nothing was exported, an earlier export is kept"
    ):
        export_source(source, tmp_path / "export", progress=False)
    assert open_export(tmp_path / "export") == before


def test_a_swap_that_fails_puts_the_earlier_export_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "export"
    before = export_source(standin_source(layers=1), directory, progress=False)
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == ".export.tmp":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PublishError, match="an earlier export is kept"):
        export_source(standin_source(layers=1, seed=2), directory, progress=False)
    assert open_export(directory) == before
    before.verify()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


class Shifted:
    """Every logit of one layer moved by noise of a given size, the same for the same user and item."""

    def __init__(self, runner: Runner, layer: int, size: float) -> None:
        self.runner, self.layer, self.size = runner, layer, size

    def user_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.runner.user_tower(inputs)

    def score(self, layer: int, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        monn, logits = self.runner.score(layer, inputs)
        if layer == self.layer:
            seed = inputs["item"].sum(-1, keepdims=True) * inputs["user"].sum(-1)[:, None, None]
            noise = np.sin(1e4 * seed).astype(np.float32)
            logits = logits + np.float32(self.size) * noise
        return monn, logits


class Coarse:
    """Logits rounded to a grid, so that many nodes tie."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def user_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.runner.user_tower(inputs)

    def score(self, layer: int, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        monn, logits = self.runner.score(layer, inputs)
        return monn, np.round(logits / 8) * 8


def search_gate(source: Source, exported: Exported, reference: Runner, other: Runner) -> ParityReport:
    bundle = Bundle.open(exported.bundle)
    users = source.transform.encode_users(
        export_run.sample_users(source.schema, source.transform, 32, seed=5)
    )
    scorers = [
        LayerScorer(bundle.index, bundle.i2if, bundle.embeddings, runner) for runner in (reference, other)
    ]
    rank = np.array([1.0, 0.5], np.float32)
    return ParityReport(tuple(search_rows(bundle.index, *scorers, users, source.widths, 3, rank)))


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_ties_broken_differently_pass_and_real_differences_do_not(
    layer: int, source: Source, exported: Exported
) -> None:
    coarse = Coarse(source.runner)
    rounding = search_gate(source, exported, coarse, Shifted(coarse, layer, 1e-6))
    rounding.require()
    compared = next(row for row in rounding.rows if row.subject == "rank scores")
    assert compared.inputs != "32 users"  # some users' beams did break ties differently
    different = search_gate(source, exported, source.runner, Shifted(source.runner, layer, 5.0))
    assert not different.passed
    assert f"layer {layer} nodes" in {row.subject for row in different.rows if not row.passed}
    with pytest.raises(PublishError, match=rf"search: layer {layer} nodes on 32 users: .*by one search only"):
        different.require()


def test_equal_ids_with_other_scores_are_refused(source: Source, exported: Exported) -> None:
    class Halved(Shifted):
        def score(self, layer: int, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
            monn, logits = self.runner.score(layer, inputs)
            return monn, logits - np.float32(0.01) * (layer == 3)

    report = search_gate(source, exported, source.runner, Halved(source.runner, 3, 0))
    with pytest.raises(
        PublishError, match="search: rank scores on .* users: .*rank scores of the returned items differ"
    ):
        report.require()


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    graph = ScorerGraph(StandIn(), 1).eval()
    export_graph(graph, tmp_path / "scorer_l1.onnx")
    inputs = example_inputs(graph.signature, 1, 2, np.random.default_rng(0))
    inputs["item"][0, 0, 0] = np.nan
    with pytest.raises(PublishError, match="values that are not finite"):
        ParityReport(tuple(graph_rows(graph, tmp_path / "scorer_l1.onnx", {"nan": inputs}))).require()


def test_a_manifest_that_names_other_graphs_is_refused(exported: Exported) -> None:
    bundle = exported.verify()
    signatures = [graph.signature for graph in exported.graphs]
    assert all(row.passed for row in manifest_rows(bundle, signatures))
    report = ParityReport(tuple(manifest_rows(bundle, signatures[:-1])))
    with pytest.raises(PublishError, match="manifest: models .*hsnn_scorer_l3"):
        report.require()


def test_an_edited_graph_file_is_noticed(source: Source, tmp_path: Path) -> None:
    exported = export_source(standin_source(layers=1), tmp_path / "export", progress=False)
    path = tmp_path / "export" / "scorer_l1.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(FormatError, match=r"scorer_l1\.onnx: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        exported.verify()


def test_a_directory_without_a_finished_export(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"no export\.json there nor in its export folder"):
        open_export(tmp_path)
