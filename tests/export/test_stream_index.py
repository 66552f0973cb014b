from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from untrained import JOINT, TARGETED, untrained_run

from export import stream_index as module
from export.build_index import OnnxItemTower
from export.graphs import serving_graphs
from export.onnx_files import export_graph
from export.stream_index import read_items, stream_index, write_items
from hsnn_core.corpus import build_corpus
from hsnn_core.errors import DataError
from hsnn_core.features import Encoded
from hsnn_train.checkpoint import Run, load_run


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Run, Path, list[Path]]:
    """A run, its item tower, and its 60 items in three files of different sizes."""
    folder = tmp_path_factory.mktemp("stream")
    untrained_run(folder / "run", JOINT, TARGETED)
    run = load_run(folder / "run")
    export_graph(serving_graphs(run.model)[1], folder / "item_tower.onnx")
    files, ends = [], [0, 31, 32, len(run.item_ids)]
    for number, (start, stop) in enumerate(pairwise(ends)):
        files.append(folder / f"items-{number}.hsnn")
        part = Encoded(run.items.dense[start:stop], run.items.ids[start:stop])
        attributes = run.attributes.take(np.arange(start, stop))
        write_items(files[-1], part, run.item_ids[start:stop], attributes)
    return run, folder / "item_tower.onnx", files


def streamed(world, staging: Path, codebooks=None, files=None):
    run, tower, all_files = world
    return stream_index(
        run.schema, run.transform, files or all_files, tower,
        run.model.codebooks() if codebooks is None else codebooks, run.model.codeword_projection(), staging,
        progress=False,
    )  # fmt: skip


def test_it_is_the_corpus_that_is_built_at_once(world, tmp_path):
    run, tower, _ = world
    ours = streamed(world, tmp_path / "staging")
    theirs = build_corpus(
        run.schema, run.transform, run.items, run.item_ids, OnnxItemTower(tower), run.model.codebooks(),
        run.model.codeword_projection(),
    )  # fmt: skip
    for name, array in theirs.index.to_arrays().items():
        np.testing.assert_array_equal(ours.index.to_arrays()[name], array)
    for name, array in theirs.with_attributes(run.attributes).attributes.to_arrays().items():
        np.testing.assert_array_equal(ours.attributes.to_arrays()[name], array)
    for name, array in theirs.i2if.to_arrays().items():
        np.testing.assert_array_equal(ours.i2if.to_arrays()[name], array)
    assert len(ours.embeddings) == len(theirs.embeddings) == 3
    for mine, expected in zip(ours.embeddings, theirs.embeddings):
        np.testing.assert_allclose(mine, expected, atol=1e-5, rtol=1e-5)  # batches of other sizes


def test_a_build_that_was_interrupted_goes_on(world, tmp_path, monkeypatch):
    staging = tmp_path / "staging"
    embed, seen = module.embed, []

    def counted(tower, items, rows, batch, names):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(items))
        yield from embed(tower, items, rows, batch, names)

    monkeypatch.setattr(module, "embed", counted)
    with pytest.raises(KeyboardInterrupt):
        streamed(world, staging)
    assert sorted(os.listdir(staging)) == ["items-0.hsnn", "items-1.hsnn"]
    monkeypatch.setattr(module, "embed", lambda *given: seen.append(len(given[1])) or embed(*given))
    resumed = streamed(world, staging)
    assert seen == [31, 1, 28]
    fresh = streamed(world, tmp_path / "other")
    for mine, expected in zip(resumed.embeddings, fresh.embeddings):
        np.testing.assert_array_equal(mine, expected)


def test_what_another_model_staged_is_refused(world, tmp_path):
    streamed(world, tmp_path)
    run, _, _ = world
    other = [codebook + 1 for codebook in run.model.codebooks()]
    with pytest.raises(
        DataError, match=r"items-0\.hsnn: 31 items by .*another model or corpus was staged here"
    ):
        streamed(world, tmp_path, codebooks=other)
    with pytest.raises(DataError, match="no files, expected at least one"):
        stream_index(run.schema, run.transform, [], world[1], run.model.codebooks(), [], tmp_path)


def test_without_codebooks_it_is_flat(world, tmp_path):
    run, tower, files = world
    flat = stream_index(run.schema, run.transform, files, tower, [], [], tmp_path, progress=False)
    assert (flat.index.layers, flat.index.nodes(1)) == (1, len(run.item_ids))
    rows = flat.index.row_of_position
    np.testing.assert_array_equal(flat.index.item_ids, run.item_ids[rows])
    expected = OnnxItemTower(tower, ["item_l1"])(run.items.tensors("item"))["item_l1"]
    np.testing.assert_allclose(flat.embeddings[0], expected[rows], atol=1e-5, rtol=1e-5)


def test_a_tower_that_is_cut_down_gives_the_same_bits(world):
    _, tower, files = world
    items, _ = read_items(files[0])
    inputs = items.tensors("item")
    whole = OnnxItemTower(tower)(inputs)
    part = OnnxItemTower(tower, ["index", "item_l3"])(inputs)
    assert set(part) == {"index", "item_l3"}
    for name, value in part.items():
        np.testing.assert_array_equal(value, whole[name])
