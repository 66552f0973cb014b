"""Building the index of a corpus that is too large to hold at once, from files of encoded items.

    ITEMS/items-00000.hsnn ...      dense (R, D) float32, ids (R, S) int32, item_ids (R,) int64: what is to be indexed,
                                    and its attributes where the schema declares some
    STAGING/items-00000.hsnn ...    item layer's embeddings, paths and distances of the same rows

The item tower, nearly all of the work, runs file by file; a file that is there is not made again, so an interrupted
build goes on where it stopped. What is held in memory at the end is what the index file holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from export.build_index import OnnxItemTower
from hsnn_core.arrayfile import open_arrays, write_arrays
from hsnn_core.corpus import Corpus, assemble_corpus, embed
from hsnn_core.errors import DataError
from hsnn_core.features import Encoded, FeatureTransform
from hsnn_core.files import file_sha256
from hsnn_core.index import HierarchicalIndex, assign_paths
from hsnn_core.item_attributes import ItemAttributes
from hsnn_core.schema import Schema

BATCH = 1024
ITEMS_KIND, TOWER_KIND = "items", "tower"


def write_items(
    path: Path, items: Encoded, item_ids: np.ndarray, attributes: ItemAttributes | None = None
) -> None:
    """A file of R encoded items with ids (R,) int64 and, where the schema declares some, attributes."""
    arrays = {"dense": items.dense, "ids": items.ids, "item_ids": item_ids}
    write_arrays(path, ITEMS_KIND, arrays | ({} if attributes is None else attributes.to_arrays()))


def read_items(path: Path) -> tuple[Encoded, np.ndarray]:
    """The items of a file, as views of it."""
    arrays = open_arrays(path, ITEMS_KIND, verify=False).arrays
    return Encoded(arrays["dense"], arrays["ids"]), arrays["item_ids"]


def read_attributes(schema: Schema, files: Sequence[Path]) -> ItemAttributes | None:
    """The attributes of the items of all files, None when the schema declares none. Raises FormatError naming the array
    that a file lacks."""
    if not schema.has_attributes:
        return None
    opened = [open_arrays(path, ITEMS_KIND, verify=False).arrays for path in files]
    parts = [ItemAttributes.from_arrays(schema, arrays) for arrays in opened]
    return ItemAttributes.concatenate([part for part in parts if part is not None])


def stream_index(
    schema: Schema,
    transform: FeatureTransform,
    files: Sequence[Path],
    item_tower: Path,
    codebooks: Sequence[np.ndarray],
    codeword_projection: Sequence[tuple[np.ndarray, np.ndarray]],
    staging: Path,
    progress: bool = True,
) -> Corpus:
    """`build_corpus` over the items of ``files``, in their order, by the ONNX graph ``item_tower``; without codebooks a
    flat corpus.

    ``staging``: folder of what is done, a file under the name of each of ``files``; it goes with the graph and the
    codebooks, and DataError refuses another's, and no files at all.
    """
    if not files:
        raise DataError("no files, expected at least one: a corpus needs items")
    layers = len(codebooks) + 1
    last = f"item_l{layers}"
    lean = OnnxItemTower(item_tower, [last, "index"] if codebooks else [last])
    staging.mkdir(parents=True, exist_ok=True)
    made_by: dict[str, object] = {
        "item_tower": file_sha256(item_tower),
        "codebooks": hashlib.sha256(
            b"".join(np.ascontiguousarray(c).tobytes() for c in codebooks)
        ).hexdigest(),
    }
    total = sum(len(read_items(path)[1]) for path in files)
    with tqdm(total=total, desc="item tower", unit="items", unit_scale=True, disable=not progress) as bar:
        for path in files:
            items, ids = read_items(path)
            target = staging / path.name
            if target.exists():
                _check_staged(target, made_by, len(ids))
                bar.update(len(ids))
                continue
            _embed_file(items, target, lean, last, codebooks, made_by, bar)

    done = [open_arrays(staging / path.name, TOWER_KIND, verify=False).arrays for path in files]
    parts = [read_items(path) for path in files]
    ids = np.concatenate([ids for _, ids in parts])
    distances = np.concatenate([part["distances"] for part in done])
    index = HierarchicalIndex.build(ids, np.concatenate([part["paths"] for part in done]), distances)
    position = np.empty(len(ids), dtype=np.int32)
    position[index.row_of_position] = np.arange(len(ids), dtype=np.int32)
    embeddings = np.empty((len(ids), done[0]["last"].shape[1]), dtype=np.float32)
    start = 0
    for part in tqdm(done, desc="order", unit="file", disable=not progress):
        stop = start + len(part["last"])
        embeddings[position[start:stop]] = part["last"]
        start = stop
    items = Encoded(
        np.concatenate([items.dense for items, _ in parts]), np.concatenate([items.ids for items, _ in parts])
    )
    # A flat corpus has no nodes to embed.
    nodes = OnnxItemTower(item_tower, [f"item_l{layer}" for layer in range(1, layers)]) if codebooks else lean
    corpus = assemble_corpus(
        schema, transform, items, index, embeddings, nodes, codebooks, codeword_projection, BATCH, distances
    )
    return corpus.with_attributes(read_attributes(schema, files))


def _embed_file(
    items: Encoded,
    target: Path,
    tower: OnnxItemTower,
    last: str,
    codebooks: Sequence[np.ndarray],
    made_by: dict[str, object],
    bar: tqdm,
) -> None:
    embedded, paths, distances = [], [], []
    wanted = [last, "index"] if codebooks else [last]
    none = np.empty((len(items), 0), np.int32), np.empty((len(items), 0), np.float32)
    for rows, outputs in embed(tower, items, np.arange(len(items)), BATCH, wanted):
        path, distance = (
            assign_paths(codebooks, outputs["index"]) if codebooks else (none[0][rows], none[1][rows])
        )
        embedded.append(outputs[last])
        paths.append(path)
        distances.append(distance)
        bar.update(len(rows))
    arrays = {
        "last": np.concatenate(embedded),
        "paths": np.concatenate(paths),
        "distances": np.concatenate(distances),
    }
    write_arrays(target, TOWER_KIND, arrays, made_by)


def _check_staged(path: Path, made_by: dict[str, object], rows: int) -> None:
    file = open_arrays(path, TOWER_KIND, verify=False)
    if file.meta != made_by or len(file.arrays["last"]) != rows:
        raise DataError(
            f"{path}: {len(file.arrays['last'])} items by {file.meta}, expected {rows} by {made_by}; another model or "
            "corpus was staged here, remove the folder or give another"
        )
