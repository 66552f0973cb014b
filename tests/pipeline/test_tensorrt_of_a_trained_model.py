"""Every serving graph of a trained 3-layer HSNN, built ahead of time by tensorrt-rtx without a GPU."""

import shutil

import pytest

from export.exported import open_export
from export.pbtxt import parse
from hsnn_cli.main import main

pytestmark = pytest.mark.tensorrt


def test_all_graphs_build_for_sm80_and_sm89_with_the_profiles_the_repository_declares(shop, tmp_path):
    pytest.importorskip(
        "tensorrt_rtx", reason="tensorrt-rtx is not installed; pip install '.[dev]' brings it"
    )
    run, repository = tmp_path / "run", tmp_path / "repository"
    shutil.copytree(shop / "run", run, ignore=shutil.ignore_patterns("export"))
    targets = ["--target", "SM80", "--target", "SM89"]
    assert main(["export", str(run), "--engine", "tensorrt-rtx", *targets]) == 0
    exported = open_export(run)
    graphs = {graph.signature.stem: graph for graph in exported.graphs}
    assert set(graphs) == {"user_tower", "item_tower", "scorer_l1", "scorer_l2", "scorer_l3"}
    assert all((exported.path / graph.file).stat().st_size > 10_000 for graph in graphs.values())
    assert all(graphs[f"scorer_l{layer}"].buckets for layer in (1, 2, 3))

    assert main(["publish", str(run), "--repository", str(repository)]) == 0
    for stem in graphs:
        model = repository / f"hsnn_{stem}"
        config = parse((model / "config.pbtxt").read_text(), stem)
        assert config.backend == "tensorrt"
        assert (model / "1" / "model.plan").stat().st_size > 10_000
        profiles = list(config.instance_group[0].profile)
        assert len(profiles) == max(1, len(graphs[stem].buckets)), "one declared profile per candidate bucket"
