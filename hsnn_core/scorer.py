"""What a layer's network is fed, defined once (paper Algorithm 2, Fig. 5).

The search asks for scores of <user, node> pairs by node number. `LayerScorer` turns the numbers into tensors
(the user side computed once, the representative's embeddings, the I2IF crossings) and hands them to a
`Runner`, which is all that differs between evaluation (torch), export parity (ONNX Runtime) and serving
(Triton).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Protocol

import numpy as np

from .errors import SearchError
from .features import Encoded
from .i2if import I2IF, Crossings, Postings, Query
from .row_table import RowTable

# <user, node> pairs of one call when the layer declares no buckets: their activations stay in a core's cache, and
# smaller ones pay for the calls (docs/performance.md).
PAIRS_PER_CALL = 2048
# Pairs that are crossed at once: I2IF is a row of small array operations whose overhead many calls share.
PAIRS_PER_PROBE = 1 << 14
# Pairs of one message to another process, which cuts them into calls itself: a message costs about as much as a call.
PAIRS_PER_MESSAGE = PAIRS_PER_PROBE


class Runner(Protocol):
    """Runs the networks of one snapshot."""

    def user_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """user_dense (B, Du) f32, user_ids (B, Su) i32 (those with a width) -> "user_l1".."user_lN": (B, U_l)
        f32.

        Each output is everything of the user that the layer needs, so nothing of the user is computed per
        node.
        """
        ...

    def score(self, layer: int, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """MoNN logits and ensemble logits, (B, C, T) f32 each, of the layer (numbered from 1).

        Inputs: user (B, U_l) f32; item (B, C, E_l), f32 or f16 as the snapshot stores it; cross_dense (B, C, 3P)
        f32 and cross_ids (B, C, M) i32 when the schema has interactions; previous (B, C, (l-1)*T) f32 when l > 1:
        the MoNN logits of layers 1..l-1 of the node's ancestors, layer by layer.
        """
        ...


class ScoredIndex(Protocol):
    """What scoring needs of an index; see `search.SearchIndex`."""

    @property
    def layers(self) -> int: ...

    def nodes(self, layer: int) -> int: ...

    def representatives(self, layer: int) -> np.ndarray: ...

    def node_of(self, layer: int, positions: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class UserState:
    """What is computed once per request: the user tower's outputs and the I2IF queries."""

    batch: int
    towers: tuple[np.ndarray, ...]  # (B, U_l) per layer
    queries: tuple[Query, ...]  # per layer; none without interactions


class LayerScorer:
    """Scores nodes of a layer for B users.

    ``embeddings[l-1]``: (I_l, E_l) float32 or float16, as the layer's network takes it, an array or a table of rows.
    ``buckets[l-1]``: the candidate counts the layer's network takes, ascending; C is padded up to the next one and
    cut into pieces of the largest. An empty list, or no buckets at all, means any count; pieces are then of at most
    ``pairs_per_call`` <user, node> pairs.
    """

    def __init__(
        self,
        index: ScoredIndex,
        i2if: I2IF | None,
        embeddings: Sequence[np.ndarray | RowTable],
        runner: Runner,
        buckets: Sequence[Sequence[int]] | None = None,
        pairs_per_call: int = PAIRS_PER_CALL,
    ) -> None:
        if len(embeddings) != index.layers:
            raise SearchError(
                f"{len(embeddings)} embedding tables, expected {index.layers}: one per layer of the index"
            )
        for layer, table in enumerate(embeddings, start=1):
            if len(table.shape) != 2 or len(table) != index.nodes(layer):
                raise SearchError(
                    f"embeddings of layer {layer}: shape {table.shape}, expected ({index.nodes(layer)}, "
                    "width), one row per node"
                )
        if buckets is None:
            buckets = [()] * index.layers
        if len(buckets) != index.layers:
            raise SearchError(
                f"buckets of {len(buckets)} layers, expected {index.layers}: one list per layer of the index"
            )
        for layer, sizes in enumerate(buckets, start=1):
            if any(low >= high for low, high in zip([0, *sizes], sizes)):
                raise SearchError(
                    f"buckets of layer {layer}: {list(sizes)}, expected ascending candidate counts from 1"
                )
        self.index = index
        self._i2if = i2if
        self._embeddings = [_rows(table) for table in embeddings]
        self._runner = runner
        self._buckets = [tuple(sizes) for sizes in buckets]
        self._pairs_per_call = pairs_per_call
        self._postings: dict[int, tuple[np.ndarray, Postings]] = {}
        self._lock = Lock()

    def over(
        self, index: ScoredIndex, i2if: I2IF | None, embeddings: Sequence[np.ndarray | RowTable]
    ) -> LayerScorer:
        """The same networks over items that have changed; what was built for nodes that did not is shared."""
        changed = copy(self)
        changed.index, changed._i2if = index, i2if
        changed._embeddings = [_rows(table) for table in embeddings]
        return changed

    def open(self, users: Encoded) -> UserState:
        """Run the user tower for B users and build their I2IF query. Raises SearchError on malformed
        outputs."""
        inputs = users.tensors("user")
        batch = len(users.ids)
        outputs = self._runner.user_tower(inputs)
        towers = []
        for layer in range(1, self.index.layers + 1):
            name = f"user_l{layer}"
            if name not in outputs:
                raise SearchError(
                    f"the user tower gave no {name} (it gave {', '.join(sorted(outputs)) or 'nothing'}); "
                    f"expected one output per layer, user_l1..user_l{self.index.layers}"
                )
            value = outputs[name]
            if value.ndim != 2 or len(value) != batch:
                raise SearchError(
                    f"the user tower's {name} has shape {value.shape}, expected ({batch}, width)"
                )
            towers.append(value)
        return UserState(batch, tuple(towers), self._queries(users.ids))

    def _queries(self, user_ids: np.ndarray) -> tuple[Query, ...]:
        if self._i2if is None:
            return ()
        query = self._i2if.query(user_ids)
        of_nodes = (
            self._i2if.query_of_nodes(query, partial(self._stand_in, layer))
            for layer in range(1, self.index.layers)
        )
        return (*of_nodes, query)

    def _stand_in(self, layer: int, positions: np.ndarray) -> np.ndarray:
        return self.index.representatives(layer)[self.index.node_of(layer, positions)]

    def score(
        self, state: UserState, layer: int, nodes: np.ndarray, previous: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """MoNN and ensemble logits, (B, C, T) float32 each, of nodes (B, C) int64.

        ``previous`` (B, C, (l-1)*T) float32: the ancestors' MoNN logits. When the nodes are all of the layer,
        in order, for all users, the crossings come from walking the postings, else from probing the forward
        lists; both give the same bits. Raises SearchError when the network's answer has another shape.
        """
        batch, count = nodes.shape
        if count == 0:
            raise SearchError(f"layer {layer}: no candidates to score")
        everything = count == self.index.nodes(layer) and bool((nodes == np.arange(count)).all())
        walked = self._walk(state, layer) if everything else None
        sizes = self._buckets[layer - 1]
        step = sizes[-1] if sizes else max(1, self._pairs_per_call // batch)
        at_once = step * max(1, PAIRS_PER_PROBE // (step * batch))

        crossings = walked or {}
        monn: list[np.ndarray] = []
        logits: list[np.ndarray] = []
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            inputs = {"user": state.towers[layer - 1]}
            if everything:
                # One block of the table serves all users; for a single user it is a view.
                block = self._embeddings[layer - 1].part(part)
                inputs["item"] = np.broadcast_to(block, (batch, *block.shape))
            else:
                inputs["item"] = self._embeddings[layer - 1].take(nodes[:, part])
            within = part
            if walked is None:
                if start % at_once == 0:
                    crossings = self._probe(state, layer, nodes[:, start : start + at_once])
                within = slice(start % at_once, start % at_once + part.stop - start)
            inputs |= {name: value[:, within] for name, value in crossings.items()}
            if layer > 1:
                inputs["previous"] = previous[:, part]
            size = part.stop - part.start
            answer = self._runner.score(layer, _padded(inputs, _bucket(size, sizes)))
            for name, value, pieces in zip(("monn", "logits"), answer, (monn, logits)):
                if value.ndim != 3 or len(value) != batch or value.shape[1] < size:
                    raise SearchError(
                        f"the scorer of layer {layer} gave {name} of shape {value.shape}, "
                        f"expected ({batch}, {_bucket(size, sizes)}, tasks)"
                    )
                pieces.append(value[:, :size])
        return _joined(monn), _joined(logits)

    def _walk(self, state: UserState, layer: int) -> dict[str, np.ndarray]:
        if self._i2if is None:
            return {}
        # Requests share the scorer: the first one that walks a layer builds its postings for all.
        representatives = self.index.representatives(layer)
        with self._lock:
            built = self._postings.get(layer)
            if built is None or built[0] is not representatives:
                built = (representatives, self._i2if.postings(representatives))
                self._postings[layer] = built
        return _named(self._i2if.walk(state.queries[layer - 1], built[1]))

    def _probe(self, state: UserState, layer: int, nodes: np.ndarray) -> dict[str, np.ndarray]:
        if self._i2if is None:
            return {}
        # A node of the item layer is its own position: no table of V entries per request.
        item_layer = layer == self.index.layers
        positions = nodes if item_layer else self.index.representatives(layer)[nodes]
        return _named(self._i2if.probe(state.queries[layer - 1], positions))


def _rows(table: np.ndarray | RowTable) -> RowTable:
    return table if isinstance(table, RowTable) else RowTable(table)


def _named(crossings: Crossings) -> dict[str, np.ndarray]:
    tensors = {"cross_dense": crossings.dense, "cross_ids": crossings.ids}
    return {name: value for name, value in tensors.items() if value.shape[-1]}


def _bucket(count: int, sizes: tuple[int, ...]) -> int:
    return next((size for size in sizes if size >= count), count)


def _padded(inputs: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Every per-candidate tensor contiguous and grown to ``size`` candidates with zeros."""
    padded = {}
    for name, value in inputs.items():
        if value.ndim == 3 and value.shape[1] < size:
            grown = np.zeros((value.shape[0], size, value.shape[2]), dtype=value.dtype)
            grown[:, : value.shape[1]] = value
            value = grown
        padded[name] = np.ascontiguousarray(value)
    return padded


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
