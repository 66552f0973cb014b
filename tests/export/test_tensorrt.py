from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
from standin import StandIn

from export.engines import engine_named
from export.export_run import Source, export_source
from export.exported import Exported
from export.graphs import Signature, serving_graphs
from export.onnx_files import MAX_BATCH, export_graph
from export.tensorrt import Profile, build_plan, profiles
from hsnn_core.errors import PublishError

BUCKETS = (64, 256, 1024)


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Signature]:
    folder = tmp_path_factory.mktemp("onnx")
    files = {folder / f"{graph.signature.stem}.onnx": graph for graph in serving_graphs(StandIn())}
    return {path: export_graph(graph, path) for path, graph in files.items()}


@pytest.fixture(scope="session")
def tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install tensorrt-rtx")


@pytest.mark.tensorrt
@pytest.mark.usefixtures("tensorrt_rtx")
class TestBuild:
    @pytest.mark.parametrize("target", ["SM80", "SM89"])
    def test_every_serving_graph_builds_without_a_gpu(
        self, target: str, graphs: dict[Path, Signature], tmp_path: Path
    ) -> None:
        engine = engine_named("tensorrt-rtx")
        for path, signature in graphs.items():
            plan = tmp_path / engine.file_for(signature.stem)
            engine.build(path, plan, signature, BUCKETS if signature.has_candidates else (), (target,))
            assert plan.stat().st_size > 10_000
        assert len(list(tmp_path.iterdir())) == len(graphs)

    def test_a_whole_export_with_the_profiles_that_the_repository_declares(
        self, source: Source, tmp_path: Path
    ) -> None:
        exported: Exported = export_source(source, tmp_path / "export", "tensorrt-rtx", progress=False)
        assert [graph.file for graph in exported.graphs] == [
            "user_tower.plan",
            "item_tower.plan",
            "scorer_l1.plan",
            "scorer_l2.plan",
            "scorer_l3.plan",
        ]
        assert all(graph.buckets for graph in exported.graphs[2:])
        assert exported.verify().manifest["buckets"] == [list(graph.buckets) for graph in exported.graphs[2:]]

    def test_an_operator_that_is_unknown_is_named(
        self, graphs: dict[Path, Signature], tmp_path: Path
    ) -> None:
        path, signature = next((p, s) for p, s in graphs.items() if s.stem == "scorer_l1")
        model = onnx.load(path)
        model.graph.node[-1].op_type = "Frobnicate"
        onnx.save(model, tmp_path / "scorer_l1.onnx")
        with pytest.raises(
            PublishError, match=r"graph scorer_l1: tensorrt_rtx can't parse .*\n.*\(Frobnicate\)"
        ):
            build_plan(
                "tensorrt_rtx",
                tmp_path / "scorer_l1.onnx",
                tmp_path / "x.plan",
                signature,
                [Profile(64, 8, 64)],
            )
        assert not (tmp_path / "x.plan").exists()

    def test_an_unknown_target_lists_the_known_ones(
        self, graphs: dict[Path, Signature], tmp_path: Path
    ) -> None:
        path, signature = next(iter(graphs.items()))
        with pytest.raises(
            PublishError, match="target 'SM10' is unknown to tensorrt_rtx, expected some of: .*SM80"
        ):
            engine_named("tensorrt-rtx").build(path, tmp_path / "x.plan", signature, (), ("SM10",))


def test_one_profile_per_bucket_and_one_for_towers(graphs: dict[Path, Signature]) -> None:
    tower, *_, scorer = graphs.values()
    assert profiles(tower, (), MAX_BATCH) == (Profile(1, 8, 64),)
    assert profiles(scorer, (256, 64, 64), MAX_BATCH) == (Profile(64, 8, 64), Profile(256, 8, 64))
    with pytest.raises(PublishError, match="graph scorer_l3: no candidate buckets"):
        profiles(scorer, (), MAX_BATCH)


def test_a_missing_library_says_what_to_install(
    graphs: dict[Path, Signature], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    path, signature = next(iter(graphs.items()))
    with pytest.raises(
        PublishError, match="needs the Python package tensorrt: .*or choose the engine onnxruntime"
    ):
        engine_named("tensorrt").build(path, tmp_path / "x.plan", signature, ())


def test_unknown_engine() -> None:
    with pytest.raises(
        PublishError, match="engine 'tpu' is unknown, expected one of: onnxruntime, tensorrt-rtx"
    ):
        engine_named("tpu")
