"""From a trained item tower to a searchable corpus: embed the items, assign paths, build the index and its
I2IF.

The same code serves evaluation (torch item tower) and export (ONNX item tower).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .errors import DataError
from .features import Encoded, FeatureTransform
from .i2if import I2IF
from .index import HierarchicalIndex, assign_paths, centroid_distances
from .item_attributes import ItemAttributes
from .item_records import ItemRecords
from .schema import Schema

ItemTower = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Corpus:
    """All that the search needs besides the networks.

    ``embeddings[l-1]`` (I_l, E_l) float32 or float16: what the layer's scorer knows of each node; for layer N of each
    item, by position. ``i2if`` is None when the schema has no interactions. ``codebooks[l-1]`` (K_l, d)
    float32, empty when the hierarchy came with the data. ``records``: what changing the items needs, if asked for.
    ``attributes``: the items' eligibility and bids by position, None when the schema declares none.
    """

    index: HierarchicalIndex
    i2if: I2IF | None
    embeddings: list[np.ndarray]
    codebooks: list[np.ndarray]
    records: ItemRecords | None = None
    attributes: ItemAttributes | None = None

    def with_attributes(self, attributes: ItemAttributes | None) -> Corpus:
        """The corpus with attributes that are given by row of the table it was built from."""
        if attributes is None:
            return self
        return replace(self, attributes=attributes.take(self.index.row_of_position))

    def with_embeddings(self, dtype: np.dtype[Any]) -> Corpus:
        """The corpus with its embeddings rounded to ``dtype``. Raises DataError when one is too large for it."""
        return replace(self, embeddings=[rounded(table, dtype, "embeddings") for table in self.embeddings])


def build_corpus(
    schema: Schema,
    transform: FeatureTransform,
    items: Encoded,
    item_ids: np.ndarray,
    item_tower: ItemTower,
    codebooks: Sequence[np.ndarray],
    codeword_projection: Sequence[tuple[np.ndarray, np.ndarray]],
    batch_size: int = 1024,
    progress: Callable[[int], object] | None = None,
    paths: np.ndarray | None = None,
    records: bool = False,
) -> Corpus:
    """Run the item tower over all V items and build the index.

    ``items`` V encoded rows, ``item_ids`` (V,) int64; ``item_tower``: {item_dense, item_ids} -> {"item_l1" ..
    "item_lN": (R, E_l) f32, "index": (R, d) f32}, the vector v that is indexed. ``codebooks`` [(K_l, d)] for
    l < N give the paths (the hard residual chain); or ``paths`` (V, N-1) gives them, without codebooks.

    A node of layer l < N is embedded as its representative's item_l{l} row plus, where there is a
    ``codeword_projection`` (W (d, E_l), b (E_l,)), the sum of its path's codewords @ W + b.
    ``progress`` is called with the number of items just embedded. Raises DataError on shapes that do not fit
    and on embeddings that are not finite.
    """
    _check_arguments(items, item_ids, codebooks, codeword_projection, paths)
    depth = len(codebooks) if paths is None else paths.shape[1]
    layers = depth + 1
    wanted = [f"item_l{layers}", *(["index"] if depth else [])]
    tables: dict[str, np.ndarray] = {}
    for rows, outputs in embed(item_tower, items, np.arange(len(item_ids)), batch_size, wanted):
        for name, value in outputs.items():
            table = tables.setdefault(name, np.empty((len(item_ids), value.shape[1]), dtype=np.float32))
            table[rows] = value
        if progress is not None:
            progress(len(rows))

    if not depth:
        paths = np.empty((len(item_ids), 0), dtype=np.int32)
        distances = np.empty((len(item_ids), 0), dtype=np.float32)
    elif paths is None:
        paths, distances = assign_paths(codebooks, tables["index"])
    else:
        distances = centroid_distances(tables["index"], paths)
    index = HierarchicalIndex.build(item_ids, paths, distances)
    last = tables[f"item_l{layers}"][index.row_of_position]
    return assemble_corpus(
        schema, transform, items, index, last, item_tower, codebooks, codeword_projection, batch_size,
        distances if records else None,
    )  # fmt: skip


def assemble_corpus(
    schema: Schema,
    transform: FeatureTransform,
    items: Encoded,
    index: HierarchicalIndex,
    last: np.ndarray,
    item_tower: ItemTower,
    codebooks: Sequence[np.ndarray],
    codeword_projection: Sequence[tuple[np.ndarray, np.ndarray]],
    batch_size: int = 1024,
    distances: np.ndarray | None = None,
) -> Corpus:
    """The corpus of an index that is built, as `build_corpus`; ``last`` (V, E_N): the item layer's embeddings, by
    position, float32 or float16, as those of nodes shall be; ``distances`` (V, N-1) of the items by corpus row: with
    them it has `ItemRecords`."""
    embeddings = _node_embeddings(index, item_tower, items, batch_size)
    for layer, projection in enumerate(codeword_projection, start=1):
        embeddings[layer - 1] += codeword_term(codebooks, projection, index.codes[layer - 1])
    embeddings = [*(rounded(table, last.dtype, "embeddings") for table in embeddings), last]
    return Corpus(
        index,
        _interactions(schema, transform, items, index),
        embeddings,
        [np.asarray(codebook, dtype=np.float32) for codebook in codebooks],
        None if distances is None else ItemRecords.build(index, items, distances, codeword_projection),
    )


def rounded(values: np.ndarray, dtype: np.dtype[Any], what: str) -> np.ndarray:
    """values (n, E) float32 as ``dtype``. Raises DataError when one is too large for it."""
    most = np.finfo(dtype).max
    if dtype != values.dtype and values.size and np.abs(values).max() > most:
        raise DataError(
            f"{what}: got values up to {np.abs(values).max():.3g}, {dtype} holds at most {most:.6g}; export with "
            "--embeddings float32"
        )
    return values.astype(dtype, copy=False)


def codeword_term(
    codebooks: Sequence[np.ndarray], projection: tuple[np.ndarray, np.ndarray], codes: np.ndarray
) -> np.ndarray:
    """What the paths ``codes`` (I_l, l) add to the embeddings of layer l, (I_l, E_l); ``projection``: W (d, E_l), b."""
    weight, bias = projection
    # One row at a time gives the same bits however many rows there are, which a matrix product does not.
    chain = sum(codebooks[step][codes[:, step]] for step in range(codes.shape[1]))
    return np.einsum("nd,de->ne", chain, weight) + bias


def _check_arguments(
    items: Encoded,
    item_ids: np.ndarray,
    codebooks: Sequence[np.ndarray],
    codeword_projection: Sequence[tuple[np.ndarray, np.ndarray]],
    paths: np.ndarray | None,
) -> None:
    if paths is not None and len(codebooks):
        raise DataError(
            f"{len(codebooks)} codebooks and paths as well, expected one of them to define the index"
        )
    if len(items.ids) != len(item_ids):
        raise DataError(
            f"{len(items.ids)} encoded items and {len(item_ids)} item ids, expected as many of each"
        )
    if codeword_projection and len(codeword_projection) != len(codebooks):
        raise DataError(
            f"{len(codeword_projection)} codeword projections, expected {len(codebooks)}: one per codebook"
        )


def _node_embeddings(
    index: HierarchicalIndex, item_tower: ItemTower, items: Encoded, batch_size: int
) -> list[np.ndarray]:
    """(I_l, E_l) rows of the representatives for l < N: a second run of the tower, over these few items only.

    Keeping item_l1..item_l{N-1} of all items from the first run would hold V rows per layer for I_l << V.
    """
    of_layer = [index.row_of_position[nodes] for nodes in index.representative]
    if not of_layer:
        return []
    needed = np.unique(np.concatenate(of_layer))
    names = [f"item_l{layer}" for layer in range(1, index.layers)]
    parts = [outputs for _, outputs in embed(item_tower, items, needed, batch_size, names)]
    return [
        np.concatenate([part[name] for part in parts]).astype(np.float32)[np.searchsorted(needed, rows)]
        for name, rows in zip(names, of_layer)
    ]


def embed(
    item_tower: ItemTower, items: Encoded, rows: np.ndarray, batch_size: int, names: Sequence[str]
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The item tower over ``rows`` (n,) of the items, a batch at a time: the batch's rows and the outputs ``names``,
    checked: DataError when one is missing, has another shape or is not finite."""
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        outputs = item_tower(Encoded(items.dense[part], items.ids[part]).tensors("item"))
        checked = {}
        for name in names:
            if name not in outputs:
                raise DataError(
                    f"the item tower gave no {name}, expected {', '.join(names)}; got {', '.join(outputs)}"
                )
            value = outputs[name]
            if value.ndim != 2 or len(value) != len(part):
                raise DataError(
                    f"the item tower's {name} has shape {value.shape}, expected ({len(part)}, width)"
                )
            broken = np.flatnonzero(~np.isfinite(value).all(axis=1))
            if len(broken):
                raise DataError(
                    f"the item tower's {name} is not finite for the item of row {part[broken[0]]}; "
                    "check the item's features and the model"
                )
            checked[name] = value
        yield part, checked


def _interactions(
    schema: Schema, transform: FeatureTransform, items: Encoded, index: HierarchicalIndex
) -> I2IF | None:
    if not schema.interactions:
        return None
    order = index.row_of_position
    position_of_id = np.full(transform.cardinality("item"), -1, dtype=np.int32)
    known = transform.vocabularies["item"].encode(index.item_ids)
    position_of_id[known] = np.arange(index.items)
    position_of_id[:2] = -1  # padding and unknown ids stand for no item
    return I2IF.build(schema, transform, Encoded(items.dense[order], items.ids[order]), position_of_id)
