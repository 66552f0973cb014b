"""The layer-wise search (paper Algorithm 2), for a batch of users.

    user tower once -> for l = 1..N: candidates (all nodes of layer 1; then the children of the nodes kept)
    -> score -> keep the best W_l -> at layer N the best K items

It knows neither torch nor Triton: a scorer does the networks. So the search that serves is the search that
evaluation measures. `hsnn_core.exhaustive` is its slow twin, which it must equal at full width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter_ns
from typing import Any, Protocol

import numpy as np

from .errors import SearchError
from .features import Encoded
from .item_filter import ItemFilter


class SearchIndex(Protocol):
    """What the search needs of an index: an immutable one (`index.HierarchicalIndex`) or one that changes
    (`live_view.LiveView`). Nodes of layer N are positions."""

    @property
    def layers(self) -> int: ...

    @property
    def items(self) -> int: ...

    def nodes(self, layer: int) -> int: ...

    def children(self, layer: int, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def parents(self, layer: int) -> np.ndarray: ...

    def present(self, layer: int, nodes: np.ndarray) -> np.ndarray | None: ...

    def counts(self, layer: int, nodes: np.ndarray) -> np.ndarray: ...

    def ids(self, positions: np.ndarray) -> np.ndarray: ...


class Bids(Protocol):
    """What items are worth: a factor of the rank score."""

    def log(self, layer: int, nodes: np.ndarray) -> np.ndarray:
        """float32, by node of any shape: the logarithm of an item's bid; of a node an upper bound of its items'."""
        ...


class Scorer(Protocol):
    """What the search needs of `scorer.LayerScorer`."""

    def open(self, users: Encoded) -> Any: ...

    def score(
        self, state: Any, layer: int, nodes: np.ndarray, previous: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class LayerTrace:
    """What one layer did: candidates and kept (B,) int64 counts, and the kept node numbers.

    ``nodes`` (B, max kept) int64, in the order of the candidates, -1 beyond a user's count.
    """

    candidates: np.ndarray
    kept: np.ndarray
    nodes: np.ndarray
    microseconds: int


@dataclass(frozen=True)
class SearchResult:
    """K items per user, best first; of fixed shape, with the number of valid rows.

    ``item_ids`` (B, K) int64, ``probabilities`` (B, K, T) float32 and ``positions`` (B, K) int64 are 0 beyond
    ``valid`` (B,) int32, ``rank_score`` (B, K) float32 is -inf there.
    """

    item_ids: np.ndarray
    probabilities: np.ndarray
    rank_score: np.ndarray
    valid: np.ndarray
    positions: np.ndarray
    layers: tuple[LayerTrace, ...]
    user_microseconds: int
    total_microseconds: int


def search(
    index: SearchIndex,
    scorer: Scorer,
    users: Encoded,
    widths: Sequence[int],
    k: int,
    rank: np.ndarray,
    item_filter: ItemFilter | None = None,
    bids: Bids | None = None,
    adapt: bool = True,
    deadline: Callable[[], None] | None = None,
) -> SearchResult:
    """The best K items of each of B users, by beams of ``widths`` (N-1 of them) nodes.

    Items and nodes are ordered by the rank score of their layer (`rank_scores`, plus the logarithm of the bid with
    ``bids``); ties go to the first in the order of the candidates, which is that of node numbers (of items: positions)
    where no item was added. ``rank`` (T,): exponent of each task's probability.

    ``item_filter`` says which items each user may get; a node without one is dropped before pruning. With ``adapt`` a
    beam takes more nodes than its width, the next best ones, until they hold K of these items, and the geometric mean
    of what the best ``width`` nodes hold of them and of all items: K items come back whenever there are K, and a
    filter costs about what no filter does. Without it widths are exact, as an evaluation of them needs. ``deadline``
    is called before the user tower and before every layer and may raise DeadlineExceeded.

    Raises SearchError: k or a width below 1, wrong number of widths, rank of another shape, scores that are
    not finite (naming the layer).
    """
    began = perf_counter_ns()
    batch = len(users.ids)
    rank = checked_request(batch, k, rank)
    _check_widths(index, widths)
    if deadline is not None:
        deadline()
    state = scorer.open(users)
    user_done = perf_counter_ns()

    beam: _Beam | None = None
    traces = []
    for layer in range(1, index.layers + 1):
        start = perf_counter_ns()
        if deadline is not None:
            deadline()
        found = _candidates(index, layer, beam, batch, item_filter)
        monn, logits = _score(scorer, state, layer, found, len(rank))
        keys = rank_scores(logits, rank)
        if bids is not None:
            keys = keys + bids.log(layer, found.nodes)
        keys = np.where(found.alive, keys, -np.inf)
        chosen = best(keys, k if layer == index.layers else widths[layer - 1])
        kept, rows = _kept(chosen)
        if adapt and layer < index.layers and _widen(index, layer, keys, chosen, kept, rows, k, found):
            kept, rows = _kept(chosen)
        best_nodes = found.nodes.take(kept)
        beam = _Beam(rows, best_nodes, np.concatenate([_at(found.carried, kept), _at(monn, kept)], axis=1))
        took = (perf_counter_ns() - start) // 1000
        traces.append(LayerTrace(found.alive.sum(axis=1), rows.counts, rows.fill(best_nodes, empty=-1), took))

    # Stable by descending score within each user: equal scores stay in order of position.
    scores = keys.take(kept)
    order = falling(scores) if batch == 1 else np.lexsort((-scores, rows.user))
    kept, positions = kept[order], best_nodes[order]
    return SearchResult(
        item_ids=rows.fill(index.ids(positions), k),
        probabilities=rows.fill(sigmoid(_at(logits, kept)), k),
        rank_score=rows.fill(keys.take(kept), k, empty=-np.inf),
        valid=rows.counts.astype(np.int32),
        positions=rows.fill(positions, k),
        layers=tuple(traces),
        user_microseconds=(user_done - began) // 1000,
        total_microseconds=(perf_counter_ns() - began) // 1000,
    )


def rank_scores(logits: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Sum over tasks of rank_t * log sigmoid(logits_t), float32: logits (..., T), rank (T,) -> (...).

    The logarithm of the product of the tasks' probabilities, each to the power of its rank. A task of rank 0
    is left out. Tasks are added in order, so equal logits give equal bits whatever the shape of the batch.
    """
    total = np.zeros(logits.shape[:-1], dtype=np.float32)
    for task in np.flatnonzero(rank):
        logit = np.ascontiguousarray(logits[..., task], dtype=np.float32)
        total += np.float32(rank[task]) * (np.minimum(logit, 0) - np.log1p(np.exp(-np.abs(logit))))
    return total


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """float32 probabilities, without overflow for large logits of either sign."""
    small = np.exp(-np.abs(logits, dtype=np.float32))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small))


def best(keys: np.ndarray, width: int) -> np.ndarray:
    """(B, C) bool: the ``width`` largest of every row of keys (B, C); ties: the smaller column; never
    -inf."""
    columns = keys.shape[1]
    if width >= columns:
        return keys > -np.inf
    threshold = np.partition(keys, columns - width, axis=1)[:, columns - width, None]
    reached = keys >= threshold
    if np.count_nonzero(reached) == width * len(keys):  # no row has more at its threshold than fit
        return reached
    above = keys > threshold
    level = (keys == threshold) & (keys > -np.inf)
    room = width - above.sum(axis=1, keepdims=True)
    return above | (level & (level.cumsum(axis=1) <= room))


def falling(keys: np.ndarray) -> np.ndarray:
    """The order (n,) int64 of keys (n,) float32, none NaN, from the largest; equal ones as they stand.

    A sort of whole numbers, of the key's bits above the place, takes a fraction of a stable sort of floats.
    """
    bits = (np.float32(0) - keys).view(np.int32)  # of equal keys the same: no zero is left negative
    rising = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))  # negative floats rise as their bits fall
    numbers = (rising.astype(np.int64) << 32) | np.arange(len(keys))
    numbers.sort()
    order: np.ndarray = numbers & 0xFFFFFFFF
    return order


def checked_request(batch: int, k: int, rank: np.ndarray) -> np.ndarray:
    """The rank exponents as (T,) float32; SearchError on a request that cannot be answered."""
    if batch < 1:
        raise SearchError("no users, expected at least one row of user features")
    if k < 1:
        raise SearchError(f"k is {k}, expected at least 1")
    rank = np.asarray(rank, dtype=np.float32)
    if rank.ndim != 1 or len(rank) == 0 or not np.isfinite(rank).all():
        raise SearchError(f"rank exponents {rank.tolist()}, expected one finite number per task")
    return rank


def checked_scores(
    layer: int, monn: np.ndarray, logits: np.ndarray, alive: np.ndarray, tasks: int
) -> tuple[np.ndarray, np.ndarray]:
    """The scorer's answer, refused (SearchError) when of another shape or not finite for a live candidate."""
    for name, value in (("monn", monn), ("logits", logits)):
        if value.shape != (*alive.shape, tasks):
            raise SearchError(
                f"the scorer of layer {layer} gave {name} of shape {value.shape}, "
                f"expected {(*alive.shape, tasks)}: users, candidates, tasks"
            )
    finite = np.isfinite(logits)
    # All of them first: looking at each candidate's few tasks takes ten times as long.
    bad = None if finite.all() else ~finite.all(axis=2) & alive
    if bad is not None and bad.any():
        raise SearchError(
            f"the scorer of layer {layer} gave scores that are not finite for {bad.sum()} of {alive.sum()} "
            "candidates; check the model and the item embeddings of this snapshot"
        )
    return monn, logits


class _Rows:
    """Entries that belong to users, as flat arrays: ``user`` (n,) ascending."""

    def __init__(self, user: np.ndarray, batch: int) -> None:
        self.user = user
        self.counts = np.array([len(user)]) if batch == 1 else np.bincount(user, minlength=batch)  # (B,)

    @cached_property
    def _column(self) -> np.ndarray:
        return np.arange(len(self.user)) - np.repeat(self.counts.cumsum() - self.counts, self.counts)

    def fill(self, values: np.ndarray, width: int | None = None, empty: float = 0) -> np.ndarray:
        """values (n, ...) -> (B, width, ...), each user's entries from column 0, then ``empty``."""
        width = int(self.counts.max()) if width is None else width
        if len(self.counts) == 1 and len(values) == width:
            return values[None]
        filled = np.full((len(self.counts), width, *values.shape[1:]), empty, dtype=values.dtype)
        filled[self.user, self._column] = values
        return filled


def _kept(chosen: np.ndarray) -> tuple[np.ndarray, _Rows]:
    """Flat places (n,) of those chosen (B, C), and whose they are."""
    kept = np.flatnonzero(chosen)
    user = np.zeros(len(kept), dtype=np.int64) if len(chosen) == 1 else kept // chosen.shape[1]
    return kept, _Rows(user, len(chosen))


@dataclass(frozen=True)
class _Beam:
    """The kept nodes, flat: entry e is node nodes[e] for user rows.user[e], nodes ascending within a user."""

    rows: _Rows
    nodes: np.ndarray  # (n,)
    carried: np.ndarray  # (n, l*T)


@dataclass(frozen=True)
class _Candidates:
    """The candidates of a layer: ``nodes`` (B, C) int64, ``alive`` (B, C) bool, ``carried`` (B, C, (l-1)*T) float32;
    above the items with a filter ``counts`` (B, C) int64 of the items under them. Padded to the longest user."""

    nodes: np.ndarray
    alive: np.ndarray
    carried: np.ndarray
    counts: np.ndarray | None


def _candidates(
    index: SearchIndex, layer: int, beam: _Beam | None, batch: int, item_filter: ItemFilter | None
) -> _Candidates:
    """All nodes of layer 1, then the children of the kept ones; never one without an item that the user may get."""
    if beam is None:
        count = index.nodes(1)
        nodes = np.tile(np.arange(count), (batch, 1))
        carried = np.zeros((batch, count, 0), dtype=np.float32)
        if item_filter is None:
            present = index.present(1, nodes)
            return _Candidates(
                nodes, np.ones(nodes.shape, dtype=bool) if present is None else present, carried, None
            )
        user = np.repeat(np.arange(batch), count)
        if index.layers == 1:
            passes = item_filter.passes(user, nodes.reshape(-1)).reshape(nodes.shape)
            return _Candidates(nodes, passes, carried, None)
        counts = item_filter.counts(1, user, nodes.reshape(-1)).reshape(nodes.shape)
        return _Candidates(nodes, counts > 0, carried, counts)

    nodes, parent = index.children(layer, beam.nodes)
    user = np.zeros(len(nodes), dtype=np.int64) if batch == 1 else beam.rows.user.take(parent)
    held = None
    if item_filter is None:
        present = index.present(layer, nodes)
    elif layer == index.layers:
        present = item_filter.passes(user, nodes)
    else:
        held = item_filter.counts(layer, user, nodes)
        present = held > 0
    if present is not None and not present.all():
        stay = np.flatnonzero(present)
        nodes, parent, user = nodes.take(stay), parent.take(stay), user.take(stay)
        held = None if held is None else held.take(stay)
    rows = _Rows(user, batch)
    filled = rows.fill(nodes)
    alive = np.arange(filled.shape[1]) < rows.counts[:, None]
    carried = rows.fill(beam.carried.take(parent, axis=0))
    return _Candidates(filled, alive, carried, None if held is None else rows.fill(held))


def _widen(
    index: SearchIndex,
    layer: int,
    keys: np.ndarray,
    chosen: np.ndarray,
    kept: np.ndarray,
    rows: _Rows,
    k: int,
    found: _Candidates,
) -> bool:
    """Add the next best candidates to those ``chosen`` (B, C), which `_kept` lists, in a layer above the items, where
    they hold too few items (see `search`); returns whether it did."""

    def in_beam(counts: np.ndarray) -> np.ndarray:
        return np.bincount(rows.user, counts, minlength=len(keys)).astype(np.int64)

    held = in_beam(index.counts(layer, found.nodes.take(kept)))
    needed = np.full(len(keys), k)
    if found.counts is not None:
        every, held = held, in_beam(found.counts.take(kept))
        needed = np.maximum(needed, np.sqrt(held * every).astype(np.int64))
    more = rows.counts < found.alive.sum(axis=1)
    short = np.flatnonzero((held < needed) & more)
    for user in short:
        counts = index.counts(layer, found.nodes[user]) if found.counts is None else found.counts[user]
        order = falling(keys[user])[: np.count_nonzero(keys[user] > -np.inf)]
        reached = counts.take(order).cumsum()
        chosen[user, order[: int(np.searchsorted(reached, needed[user])) + 1]] = True
    return len(short) > 0


def _at(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """values (B, C, w) at flat places (n,) of (B, C): (n, w)."""
    return values.reshape(values.shape[0] * values.shape[1], values.shape[2]).take(kept, axis=0)


def _score(
    scorer: Scorer, state: Any, layer: int, found: _Candidates, tasks: int
) -> tuple[np.ndarray, np.ndarray]:
    if not found.alive.any():
        empty = np.zeros((*found.nodes.shape, tasks), dtype=np.float32)
        return empty, empty
    return checked_scores(layer, *scorer.score(state, layer, found.nodes, found.carried), found.alive, tasks)


def _check_widths(index: SearchIndex, widths: Sequence[int]) -> None:
    if len(widths) != index.layers - 1:
        raise SearchError(
            f"{len(widths)} widths, expected {index.layers - 1}: one for each layer above the items"
        )
    for layer, width in enumerate(widths, start=1):
        if width < 1:
            raise SearchError(f"the width of layer {layer} is {width}, expected at least 1")
