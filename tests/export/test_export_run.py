from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from standin_world import SCHEMA, standin_source
from untrained import FLAT, HIERARCHY, JOINT, TARGETED, TWO_TOWER, untrained_run

from export.export_run import export_run, sample_users
from export.exported import open_export
from export.publish import publish, versions
from hsnn_core.errors import FormatError


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


def test_the_items_attributes_reach_the_bundle_by_position(tmp_path: Path) -> None:
    untrained_run(tmp_path / "run", HIERARCHY, TARGETED)
    bundle = export_run(tmp_path / "run", progress=False).verify()
    assert bundle.attributes is not None
    ids = bundle.index.item_ids
    np.testing.assert_array_equal(bundle.attributes.keys["shop"], ids)
    np.testing.assert_array_equal(bundle.attributes.flags["paused"], ids % 3 == 0)
    np.testing.assert_array_equal(bundle.attributes.bids, ids.astype(np.float32))
    np.testing.assert_array_equal(bundle.attributes.sets["market"].keys.reshape(-1, 2)[:, 0], ids % 4)


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
