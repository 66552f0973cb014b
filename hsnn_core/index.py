"""The hierarchical index (paper §3.2): which items lie under which node, for any number of layers.

Items are numbered by *position*: the items of one leaf node are neighbours and the leaf nodes are ordered by
their path, so the children of every node of every layer are one slice and need no list. Layer N is the items
themselves: its node numbers are the positions. Only nodes that hold an item exist, so an empty node cannot be
scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .errors import DataError, FormatError

ASSIGN_CHUNK = 8192


@dataclass(frozen=True, eq=False)
class HierarchicalIndex:
    """A corpus of V items under N-1 layers of nodes; layers are numbered from 1 (coarsest) to N (items).

    ``item_ids``          (V,) int64, by position.
    ``child_ptr``         for l = 1..N-1 (I_l + 1,) int64: the children of node i of layer l are the nodes
                          ``child_ptr[l-1][i]:child_ptr[l-1][i+1]`` of layer l+1.
    ``representative``    for l = 1..N-1 (I_l,) int32: position of the node's representative item.
    ``codes``             for l = 1..N-1 (I_l, l) int32: the path (m_1..m_l) of every node (Eq. 5-7).
    ``built_from``        (V,) int32: row of the item at each position in the table that the index was built from; of an
                          index that was opened, whose tables stand by position, None.

    Raises FormatError when the arrays contradict each other.
    """

    item_ids: np.ndarray
    child_ptr: tuple[np.ndarray, ...]
    representative: tuple[np.ndarray, ...]
    codes: tuple[np.ndarray, ...]
    built_from: np.ndarray | None = None

    def __post_init__(self) -> None:
        _validate(self)

    @classmethod
    def build(cls, item_ids: np.ndarray, paths: np.ndarray, distances: np.ndarray) -> HierarchicalIndex:
        """Index of V items from their paths.

        ``item_ids`` (V,) int64, unique; ``paths`` (V, N-1) int codes from 0; ``distances`` (V, N-1) float,
        the distance of the item to its node's codeword at each layer. N-1 = 0 gives a flat index.

        The representative of a node is its item with the smallest distance *among the items mapped to it*
        (Algorithm 1; ties: the smaller item id). Raises DataError on wrong shapes, repeated ids, negative
        codes and distances that are not finite.
        """
        ids, paths, distances = _checked_input(item_ids, paths, distances)
        depth = paths.shape[1]
        order = np.lexsort((ids, *(paths[:, layer] for layer in reversed(range(depth)))))
        ids, paths, distances = ids[order], paths[order], distances[order]

        node_of, starts = [], []
        new = np.zeros(len(ids), dtype=bool)
        new[0] = True
        for layer in range(depth):
            new[1:] |= paths[1:, layer] != paths[:-1, layer]
            node_of.append(np.cumsum(new) - 1)
            starts.append(np.flatnonzero(new))
        node_of.append(np.arange(len(ids)))

        child_ptr, representative, codes = [], [], []
        for layer in range(depth):
            below = node_of[layer + 1]
            child_ptr.append(np.append(below[starts[layer]], below[-1] + 1).astype(np.int64))
            nearest = np.lexsort((ids, distances[:, layer], node_of[layer]))
            representative.append(nearest[starts[layer]].astype(np.int32))
            codes.append(np.ascontiguousarray(paths[starts[layer], : layer + 1], dtype=np.int32))
        return cls(ids, tuple(child_ptr), tuple(representative), tuple(codes), order.astype(np.int32))

    @property
    def layers(self) -> int:
        """N, the item layer included."""
        return len(self.child_ptr) + 1

    @property
    def items(self) -> int:
        """V."""
        return len(self.item_ids)

    @property
    def row_of_position(self) -> np.ndarray:
        """(V,) int32 row of the item in the corpus's table: the one the index was built from, or the opened one."""
        return self._every_position if self.built_from is None else self.built_from

    def nodes(self, layer: int) -> int:
        """I_l; for layer N the number of items."""
        self._check_layer(layer)
        return self.items if layer == self.layers else len(self.child_ptr[layer - 1]) - 1

    def representatives(self, layer: int) -> np.ndarray:
        """(I_l,) position of the item whose features stand for each node; an item stands for itself."""
        self._check_layer(layer)
        return self._every_position if layer == self.layers else self.representative[layer - 1]

    def parents(self, layer: int) -> np.ndarray:
        """(I_l,) int32 node of layer l-1 above each node of layer l > 1."""
        if layer < 2:
            raise ValueError(f"layer {layer} has no parents; expected a layer of 2..{self.layers}")
        self._check_layer(layer)
        return np.repeat(
            np.arange(self.nodes(layer - 1), dtype=np.int32),
            np.diff(self.child_ptr[layer - 2]),
        )

    def ancestors(self, layer: int) -> np.ndarray:
        """(V,) int32 node of the layer above each position; for layer N the position itself."""
        self._check_layer(layer)
        return np.repeat(np.arange(self.nodes(layer), dtype=np.int32), self.occupancy(layer))

    def node_of(self, layer: int, positions: np.ndarray) -> np.ndarray:
        """The nodes of a layer that positions (n,) lie in, int64."""
        self._check_layer(layer)
        if layer == self.layers:
            return positions.astype(np.int64)
        return np.searchsorted(self._item_ptrs[layer - 1], positions, side="right") - 1

    def item_ptr(self, layer: int) -> np.ndarray:
        """(I_l + 1,) int64: the items of node i are the positions item_ptr[i]:item_ptr[i+1]."""
        self._check_layer(layer)
        if layer == self.layers:
            return np.arange(self.items + 1, dtype=np.int64)
        return self._item_ptrs[layer - 1]

    def occupancy(self, layer: int) -> np.ndarray:
        """(I_l,) int64 number of items under each node."""
        return np.diff(self.item_ptr(layer))

    def children(self, layer: int, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What lies in ``layer`` (from 2) under ``nodes`` (n,) of the layer above it: the children (m,) int64,
        ascending under each node, and for each of them (m,) int64 which of the ``nodes`` it lies under, ascending."""
        ptr = self.child_ptr[layer - 2]
        return slices(ptr[nodes], ptr[nodes + 1] - ptr[nodes])

    def present(self, layer: int, nodes: np.ndarray) -> np.ndarray | None:
        """Which of the nodes hold an item: all of them, said as None."""
        return None

    def counts(self, layer: int, nodes: np.ndarray) -> np.ndarray:
        """Number of items under each of ``nodes`` (any shape), int64."""
        if layer == self.layers:
            return np.ones(nodes.shape, dtype=np.int64)
        ptr = self._item_ptrs[layer - 1]
        return ptr[nodes + 1] - ptr[nodes]

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """Item ids, int64, at positions of any shape."""
        return self.item_ids[positions]

    @cached_property
    def _every_position(self) -> np.ndarray:
        """One array, not an equal one each time: what is built for a layer is kept under it."""
        return np.arange(self.items, dtype=np.int32)

    @cached_property
    def _item_ptrs(self) -> tuple[np.ndarray, ...]:
        """Of the layers above the items; the items' own would be as long as the corpus and say nothing."""
        pointers: list[np.ndarray] = []
        for child_ptr in reversed(self.child_ptr):
            pointers.append(pointers[-1][child_ptr] if pointers else child_ptr)
        return tuple(reversed(pointers))

    def _check_layer(self, layer: int) -> None:
        if not 1 <= layer <= self.layers:
            raise ValueError(f"layer {layer} does not exist; expected 1..{self.layers}")

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Named arrays for an array file, which knows nothing of the table that the index was built from."""
        arrays = {"item_ids": self.item_ids}
        for number, (ptr, representative, codes) in enumerate(
            zip(self.child_ptr, self.representative, self.codes), start=1
        ):
            arrays[f"layer{number}_child_ptr"] = ptr
            arrays[f"layer{number}_representative"] = representative
            arrays[f"layer{number}_codes"] = codes
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> HierarchicalIndex:
        """The inverse of `to_arrays`; views, no copies. Raises FormatError on missing or contradicting
        arrays."""
        depth = sum(1 for name in arrays if name.startswith("layer") and name.endswith("_child_ptr"))
        wanted: list[tuple[str, type[np.generic], int]] = [("item_ids", np.int64, 1)]
        for number in range(1, depth + 1):
            wanted.append((f"layer{number}_child_ptr", np.int64, 1))
            wanted.append((f"layer{number}_representative", np.int32, 1))
            wanted.append((f"layer{number}_codes", np.int32, 2))
        found = {}
        for name, dtype, ndim in wanted:
            if name not in arrays:
                raise FormatError(f"index: array {name} is missing; got {', '.join(sorted(arrays))}")
            array = np.asarray(arrays[name])
            if array.dtype != dtype or array.ndim != ndim:
                raise FormatError(
                    f"index: array {name} is {array.dtype} with {array.ndim} axes, "
                    f"expected {np.dtype(dtype)} with {ndim}"
                )
            found[name] = array
        numbers = range(1, depth + 1)
        return cls(
            found["item_ids"],
            tuple(found[f"layer{number}_child_ptr"] for number in numbers),
            tuple(found[f"layer{number}_representative"] for number in numbers),
            tuple(found[f"layer{number}_codes"] for number in numbers),
        )


def slices(first: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers first[i]..first[i]+counts[i]-1 of every i, one after the other (m,), and their i (m,)."""
    before = counts.cumsum() - counts
    numbers = np.repeat(first - before, counts) + np.arange(counts.sum())
    return numbers, np.repeat(np.arange(len(counts)), counts)


def assign_paths(codebooks: Sequence[np.ndarray], vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hard residual chain that serving uses (Eq. 5-7 with the argmin of Algorithm 1).

    r_1 = v; m_l = argmin_k ||r_l - c_lk||^2; r_{l+1} = r_l - c_{l, m_l}.

    ``codebooks``: for each index layer (K_l, d) float32; ``vectors`` (R, d) float32. Returns paths (R, N-1)
    int32 and squared distances (R, N-1) float32. Raises DataError on shapes that do not fit or vectors not
    finite.
    """
    codebooks, vectors = _checked_vectors(codebooks, vectors)
    paths = np.empty((len(vectors), len(codebooks)), dtype=np.int32)
    distances = np.empty((len(vectors), len(codebooks)), dtype=np.float32)
    for part, residual in _chunks(vectors):
        for layer, codebook in enumerate(codebooks):
            # ||r||^2 is the same for every k, so the argmin does not need it.
            nearest = ((codebook**2).sum(axis=1) - 2.0 * (residual @ codebook.T)).argmin(axis=1)
            residual = residual - codebook[nearest]
            paths[part, layer] = nearest
            distances[part, layer] = (residual**2).sum(axis=1)
    return paths, distances


def centroid_distances(vectors: np.ndarray, paths: np.ndarray) -> np.ndarray:
    """Squared distances (R, N-1) float32 of vectors (R, d) to the mean of their node, for given paths (R,
    N-1).

    What stands in for the distance to a codeword when the hierarchy comes with the data (spec §3a).
    """
    distances = np.empty(paths.shape, dtype=np.float32)
    node = np.zeros(len(paths), dtype=np.int64)
    for layer in range(paths.shape[1]):
        _, node = np.unique(np.stack([node, paths[:, layer]], axis=1), axis=0, return_inverse=True)
        node = node.reshape(-1)
        order = np.argsort(node, kind="stable")
        counts = np.bincount(node)
        starts = counts.cumsum() - counts
        total = np.add.reduceat(vectors[order].astype(np.float64), starts, axis=0)
        distances[:, layer] = ((vectors - (total / counts[:, None])[node]) ** 2).sum(axis=1)
    return distances


def _chunks(vectors: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(vectors), ASSIGN_CHUNK):
        part = slice(start, start + ASSIGN_CHUNK)
        yield part, vectors[part].astype(np.float64)


def _checked_vectors(
    codebooks: Sequence[np.ndarray], vectors: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    vectors = np.asarray(vectors)
    if vectors.ndim != 2:
        raise DataError(f"index vectors: shape {vectors.shape}, expected (items, width)")
    if not np.isfinite(vectors).all():
        bad = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise DataError(f"index vectors: row {bad} is not finite; the item tower must give finite vectors")
    checked = []
    for number, codebook in enumerate(codebooks, start=1):
        codebook = np.asarray(codebook, dtype=np.float64)
        if codebook.ndim != 2 or len(codebook) == 0 or codebook.shape[1] != vectors.shape[1]:
            raise DataError(
                f"codebook of layer {number}: shape {codebook.shape}, expected (K, {vectors.shape[1]}) "
                "with K > 0, the width of the index vectors"
            )
        if not np.isfinite(codebook).all():
            raise DataError(f"codebook of layer {number}: values that are not finite")
        checked.append(codebook)
    return checked, vectors


def _checked_input(
    item_ids: np.ndarray, paths: np.ndarray, distances: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids, paths, distances = np.asarray(item_ids), np.asarray(paths), np.asarray(distances)
    if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"item ids: {ids.dtype} of shape {ids.shape}, expected integers (V,) with V > 0")
    if len(ids) > np.iinfo(np.int32).max:
        raise DataError(f"item ids: {len(ids)} items, expected at most {np.iinfo(np.int32).max}")
    if paths.ndim != 2 or len(paths) != len(ids) or distances.shape != paths.shape:
        raise DataError(
            f"paths {paths.shape} and distances {distances.shape}: expected both ({len(ids)}, N-1), "
            "one row per item"
        )
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        twice = int(np.argmax(counts > 1))
        raise DataError(f"item ids: {unique[twice]} occurs {counts[twice]} times, expected every id once")
    if paths.size and (not np.issubdtype(paths.dtype, np.integer) or paths.min() < 0):
        raise DataError(f"paths: {paths.dtype} with minimum {paths.min()}, expected integers from 0")
    if not np.isfinite(distances).all():
        raise DataError("distances: values that are not finite, expected a finite one per item and layer")
    return ids.astype(np.int64), paths, distances


def _validate(index: HierarchicalIndex) -> None:
    depth, items = len(index.child_ptr), len(index.item_ids)
    if items == 0:
        raise FormatError("index: no items, expected at least one")
    if len(index.representative) != depth or len(index.codes) != depth:
        raise FormatError(
            f"index: {depth} child pointers, {len(index.representative)} representatives and "
            f"{len(index.codes)} codes, expected the same number of each"
        )
    ordered = np.sort(index.item_ids)
    if (ordered[1:] == ordered[:-1]).any():
        raise FormatError("index: item_ids holds an id twice, expected every id once")
    for number in range(1, depth + 1):
        ptr = index.child_ptr[number - 1]
        below = items if number == depth else len(index.child_ptr[number]) - 1
        if len(ptr) < 2 or ptr[0] != 0 or ptr[-1] != below or (np.diff(ptr) < 1).any():
            raise FormatError(
                f"index: child pointers of layer {number} must rise strictly from 0 to {below}, the nodes "
                f"below; got {len(ptr)} values from {ptr[:1].tolist()} to {ptr[-1:].tolist()}"
            )
    for number in range(1, depth + 1):
        nodes, span = index.nodes(number), index.item_ptr(number)
        representative, codes = index.representative[number - 1], index.codes[number - 1]
        if representative.shape != (nodes,) or codes.shape != (nodes, number):
            raise FormatError(
                f"index: layer {number} has {nodes} nodes but representatives {representative.shape} and "
                f"codes {codes.shape}, expected ({nodes},) and ({nodes}, {number})"
            )
        outside = np.flatnonzero((representative < span[:-1]) | (representative >= span[1:]))
        if len(outside):
            node = int(outside[0])
            raise FormatError(
                f"index: the representative of node {node} of layer {number} is position "
                f"{representative[node]}, expected one of its own items {span[node]}..{span[node + 1] - 1}"
            )
        if number > 1 and (codes[:, :-1] != index.codes[number - 2][index.parents(number)]).any():
            raise FormatError(f"index: the paths of layer {number} do not continue layer {number - 1}'s")
