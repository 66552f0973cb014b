from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from standin_world import SCHEMA, standin_source
from untrained import FLAT, HIERARCHY, JOINT, TARGETED, TWO_TOWER, untrained_run

from export.export_run import export_run, sample_users
from export.exported import open_export
from export.graphs import ScorerGraph, example_inputs
from export.publish import publish, versions
from export.sample_users import padded_at_the_end
from hsnn_core.errors import FormatError, PublishError


@pytest.mark.parametrize(
    "model", [JOINT, HIERARCHY, FLAT, TWO_TOWER], ids=["joint", "hierarchy", "flat", "two tower"]
)
def test_a_run_is_exported_and_published(model: dict, tmp_path: Path) -> None:
    recipe = untrained_run(tmp_path / "run", model)
    users = sample_users(SCHEMA, standin_source().transform, 20, seed=3)
    exported = export_run(tmp_path / "run", users=users, progress=False)
    assert exported.report.passed
    bundle = exported.verify()
    assert bundle.index.layers == len(model["layers"])
    assert (bundle.manifest["k"], bundle.manifest["max_k"]) == (5, 40)
    assert bundle.manifest["widths"] == list(recipe.search.widths)
    np.testing.assert_array_equal(bundle.smoke().users["history"], users["history"][:4])
    assert publish(tmp_path / "run", tmp_path / "repository") == 1
    assert versions(tmp_path / "repository") == [1]


def test_half_precision_embeddings_take_half_the_bytes(tmp_path: Path) -> None:
    untrained_run(tmp_path / "run", JOINT)
    whole = export_run(tmp_path / "run", progress=False).verify()
    exact, answers = whole.embeddings, whole.smoke().item_ids
    exported = export_run(tmp_path / "run", progress=False, embeddings="float16")
    assert exported.report.passed, "the gates compare with torch on the same rounded embeddings"
    half = exported.verify()
    for table, expected in zip(half.embeddings, exact):
        assert table.nbytes == expected.nbytes // 2
        np.testing.assert_array_equal(table, expected.astype(np.float16))
    assert np.isin(half.smoke().item_ids, answers).mean() > 0.9
    publish(tmp_path / "run", tmp_path / "repository")
    export_run(tmp_path / "run", progress=False)
    with pytest.raises(PublishError, match=r"input item: FP16 \[-1, \d+\] would become FP32"):
        publish(tmp_path / "run", tmp_path / "repository")


def test_embeddings_that_an_engine_does_not_take(tmp_path: Path) -> None:
    untrained_run(tmp_path / "run", FLAT)
    with pytest.raises(PublishError, match="embeddings float16 with engine tensorrt: expected float32"):
        export_run(tmp_path / "run", "tensorrt", embeddings="float16")
    with pytest.raises(
        PublishError, match="embeddings 'int8' are unknown, expected one of: float32, float16"
    ):
        export_run(tmp_path / "run", embeddings="int8")


def test_the_items_attributes_reach_the_bundle_by_position(tmp_path: Path) -> None:
    untrained_run(tmp_path / "run", HIERARCHY, TARGETED)
    bundle = export_run(tmp_path / "run", progress=False).verify()
    assert bundle.attributes is not None
    ids = bundle.index.item_ids
    np.testing.assert_array_equal(bundle.attributes.keys["shop"], ids)
    np.testing.assert_array_equal(bundle.attributes.flags["paused"], ids % 3 == 0)
    np.testing.assert_array_equal(bundle.attributes.bids, ids.astype(np.float32))
    markets = bundle.attributes.sets["market"]
    np.testing.assert_array_equal(np.diff(markets.ptr), 2 * (ids % 2))
    np.testing.assert_array_equal(markets.keys[markets.ptr[:-1][ids % 2 > 0]], ids[ids % 2 > 0] % 4)


@pytest.mark.tensorrt
def test_every_graph_of_a_three_layer_hsnn_builds_for_both_targets(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install tensorrt-rtx")
    untrained_run(tmp_path, JOINT)
    exported = export_run(tmp_path, "tensorrt-rtx", targets=("SM80", "SM89"), progress=False)
    assert [graph.file for graph in open_export(tmp_path).graphs] == [graph.file for graph in exported.graphs]
    assert all((exported.path / graph.file).suffix == ".plan" for graph in exported.graphs)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no recipe\.yaml there; expected a folder that hsnn train wrote"):
        export_run(tmp_path)


def test_random_ids_have_no_gaps() -> None:
    graph = ScorerGraph(standin_source().model, 2).signature
    drawn = example_inputs(graph, 5, 33, np.random.default_rng(0))
    towers = {f"{owner}_ids": np.arange(4 * SCHEMA.layout(owner).ids_width) % 3 for owner in ("user", "item")}
    drawn |= {name: ids.reshape(4, -1).astype(np.int32) for name, ids in towers.items()}
    closed = padded_at_the_end(SCHEMA, drawn)
    start = 0
    for spec in SCHEMA.interactions:
        part = closed["cross_ids"][..., start : start + spec.matches]
        assert (np.diff((part == 0).astype(int), axis=-1) >= 0).all()
        start += spec.matches
    for owner in ("user", "item"):
        for slot in SCHEMA.layout(owner).slots:
            part = closed[f"{owner}_ids"][:, slot.start : slot.stop]
            assert (np.diff((part == 0).astype(int), axis=1) >= 0).all()
            np.testing.assert_array_equal(
                np.sort(part, axis=1), np.sort(drawn[f"{owner}_ids"][:, slot.start : slot.stop], axis=1)
            )
    np.testing.assert_array_equal(closed["item"], drawn["item"])
