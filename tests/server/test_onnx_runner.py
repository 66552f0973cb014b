"""The in-process runner: what it refuses, and that what it returns is what the graphs say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_networks import WIDTH, scorer_inputs, write_scorer, write_user_tower

from hsnn_core.errors import FormatError, ServerError
from hsnn_core.onnx_runner import OnnxRunner


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("graphs")
    write_user_tower(root / "user.onnx", dense=2, ids=3, layers=2, seed=0)
    scorers = [root / "l1.onnx", root / "l2.onnx"]
    for layer, path in enumerate(scorers, start=1):
        write_scorer(path, scorer_inputs(layer, 1, 4, 3, 2), tasks=1, seed=layer)
    return root / "user.onnx", scorers


def test_shapes_and_names(graphs: tuple[Path, list[Path]]) -> None:
    runner = OnnxRunner(*graphs)
    towers = runner.user_tower(
        {"user_dense": np.ones((5, 2), np.float32), "user_ids": np.ones((5, 3), np.int32)}
    )
    assert {name: value.shape for name, value in towers.items()} == {
        "user_l1": (5, WIDTH),
        "user_l2": (5, WIDTH),
    }
    inputs = {
        "user": towers["user_l2"],
        "item": np.ones((5, 7, 4), np.float32),
        "cross_dense": np.ones((5, 7, 3), np.float32),
        "cross_ids": np.ones((5, 7, 2), np.int32),
        "previous": np.zeros((5, 7, 1), np.float32),
    }
    monn, logits = runner.score(2, inputs)
    assert monn.shape == logits.shape == (5, 7, 1)
    with pytest.raises(
        ServerError, match=r"the scorer of layer 1 failed on user float32\[5, 8\], .*previous"
    ):
        runner.score(1, inputs)


def test_a_missing_graph_is_named(graphs: tuple[Path, list[Path]], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nowhere.onnx: no such file, expected an ONNX graph"):
        OnnxRunner(graphs[0], [tmp_path / "nowhere.onnx"])


def test_a_file_that_is_no_graph_is_named(graphs: tuple[Path, list[Path]], tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(graphs[0].read_bytes()[:100])
    with pytest.raises(FormatError, match="broken.onnx: ONNX Runtime cannot load it .*; export the snapshot"):
        OnnxRunner(broken, graphs[1])
