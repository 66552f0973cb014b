"""The corpus through the exported item tower: index, node embeddings, interaction postings (spec §3, §4).

The item tower that builds the index is the file that is published, not the torch model, so items that are
added later by the same file land where training's would.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.utils
import onnxruntime
from tqdm import tqdm

from hsnn_core.corpus import Corpus, build_corpus
from hsnn_core.features import Encoded, FeatureTransform
from hsnn_core.index import HierarchicalIndex
from hsnn_core.schema import Schema

LARGEST_BUCKET = 4096
SMALLEST_BUCKET = 64


class OnnxItemTower:
    """item_dense, item_ids -> item_l1..item_lN (R, E_l), index (R, d), by ONNX Runtime on the CPU.

    ``outputs``: only these, from a graph cut down to them: ONNX Runtime computes every output of a graph, whichever
    are asked for.
    """

    def __init__(self, path: Path, outputs: Sequence[str] | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        graph: str | bytes = str(path)
        if outputs is not None:
            model = onnx.load(path)
            inputs = [value.name for value in model.graph.input]
            graph = onnx.utils.Extractor(model).extract_model(inputs, list(outputs)).SerializeToString()
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._names, self._session.run(self._names, inputs)))


def build_index(
    schema: Schema,
    transform: FeatureTransform,
    items: Encoded,
    item_ids: np.ndarray,
    item_tower: OnnxItemTower,
    codebooks: Sequence[np.ndarray],
    codeword_projection: Sequence[tuple[np.ndarray, np.ndarray]],
    paths: np.ndarray | None = None,
    progress: bool = True,
) -> Corpus:
    """`hsnn_core.corpus.build_corpus` over V items in batches, with a progress bar."""
    with tqdm(total=len(item_ids), desc="index", unit="items", disable=not progress) as bar:
        return build_corpus(
            schema, transform, items, item_ids, item_tower, codebooks, codeword_projection,
            progress=lambda count: bar.update(count) and None, paths=paths, records=True,
        )  # fmt: skip


def candidate_buckets(
    index: HierarchicalIndex, widths: Sequence[int], codewords: Sequence[int]
) -> list[list[int]]:
    """Candidate counts per layer that engines with fixed shapes are built for: powers of two up to what a beam of
    `widths` (N-1) can reach, at most 4096 (the search cuts longer lists). Layer 1 always scores all nodes, so it
    has one.

    They follow from the recipe, `codewords` (K_1..K_{N-1}, empty where the hierarchy came with the data), and
    from V, and not from how full this snapshot's nodes are: all versions of a repository share one list."""
    most = [codewords[0] if codewords else index.nodes(1)]
    for layer in range(2, index.layers + 1):
        fixed = len(codewords) >= layer
        most.append(widths[layer - 2] * codewords[layer - 1] if fixed else index.nodes(layer))
    ladders = [_ladder(count) for count in most]
    return [ladders[0][-1:], *ladders[1:]]


def _ladder(most: int) -> list[int]:
    sizes = [SMALLEST_BUCKET]
    while sizes[-1] < min(most, LARGEST_BUCKET):
        sizes.append(sizes[-1] * 2)
    return sizes
