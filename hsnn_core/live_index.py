"""Items that come and go: an index that one writer changes while searches go on (paper §3.3: new items are indexed at
once, old ones deleted).

A change embeds its items by the snapshot's own item tower, assigns their paths by its codebooks, and elects a node's
representative anew where the nearest live item is another one. What it gives is what a build over the live items would:
the same nodes, the same representatives and embeddings, in another order. The base stays as it is; `compact` makes the
next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .corpus import Corpus, ItemTower, assemble_corpus, codeword_term, embed, rounded
from .errors import DataError
from .features import Encoded, FeatureTransform
from .i2if import I2IF, forward_lists
from .index import HierarchicalIndex, assign_paths
from .item_attributes import ItemAttributes
from .live_attributes import AttributeState, GrowingAttributes
from .live_view import LiveView, bits_at, with_bits
from .node_growth import NodeGrowth
from .place_table import Places, PositionTable
from .row_table import GrowingRows, RowTable
from .schema import ID_FIRST, ITEM_SPACE, Schema

TOWER_BATCH = 1024


@dataclass(frozen=True)
class LiveState:
    """What searches read until the next change: all of one moment.

    ``embeddings[l-1]``: rows (I_l, E_l) by node. ``attributes``: None when the schema declares none. ``log_position``:
    how much of the log of updates is in it.
    """

    view: LiveView
    i2if: I2IF | None
    embeddings: tuple[RowTable, ...]
    attributes: AttributeState | None
    log_position: int

    @classmethod
    def of(cls, corpus: Corpus, attributes: AttributeState | None, log_position: int) -> LiveState:
        """A corpus with nothing changed."""
        rows = tuple(RowTable(table) for table in corpus.embeddings)
        records = corpus.records
        by_id = np.argsort(corpus.index.item_ids, kind="stable") if records is None else records.by_id
        return cls(LiveView.of(corpus.index, by_id), corpus.i2if, rows, attributes, log_position)


class LiveIndex:
    """A base corpus and its changes. One thread may call `apply`; any may read ``state``, at any time.

    ``item_tower``: as `corpus.build_corpus`. Raises DataError when the corpus cannot change: it has no records, or its
    hierarchy came with the data, so that nobody knows a new item's place.
    """

    def __init__(
        self,
        schema: Schema,
        transform: FeatureTransform,
        corpus: Corpus,
        item_tower: ItemTower,
        log_position: int = 0,
    ) -> None:
        if corpus.records is None:
            raise DataError(
                "this snapshot has no item records, so its items cannot change; export it with this release"
            )
        depth = corpus.index.layers - 1
        if depth and not corpus.codebooks:
            raise DataError(
                "the hierarchy of this snapshot came with the data, so a new item's nodes are not known; "
                "items can change under a learnt index (model.index: joint, em or kmeans)"
            )
        self._schema, self._transform, self._tower = schema, transform, item_tower
        self._base, self._records, self._codebooks = corpus.index, corpus.records, corpus.codebooks
        self._projection = list(corpus.records.projection)
        self._nodes = [NodeGrowth(corpus.index, layer) for layer in range(1, depth + 1)]
        self._node_rows = [GrowingRows(table) for table in corpus.embeddings[:-1]]
        self._items = GrowingRows(corpus.embeddings[-1])
        self._dense = GrowingRows(corpus.records.features.dense)
        self._feature_ids = GrowingRows(corpus.records.features.ids)
        self._distances = GrowingRows(corpus.records.distances)
        self._added_ids = GrowingRows(np.empty(0, dtype=np.int64))
        self._added_nodes = GrowingRows(np.empty((0, depth), dtype=np.int32))  # at each layer, of added items
        self._forward = (
            {}
            if corpus.i2if is None
            else {feature: GrowingRows(lists.base) for feature, lists in corpus.i2if.forward.items()}
        )
        self._added_places = Places()
        self._order = [np.arange(len(table), dtype=np.int32) for table in corpus.embeddings[:-1]]
        self._attributes = (
            None if corpus.attributes is None else GrowingAttributes(corpus.index, corpus.attributes)
        )
        attributes = None if self._attributes is None else self._attributes.state
        self.state = LiveState.of(corpus, attributes, log_position)
        self.usable = True  # False after a change that failed half-way: build another one from the corpus

    def apply(
        self,
        ids: np.ndarray,
        items: Encoded,
        attributes: ItemAttributes | None,
        deleted: np.ndarray,
        log_position: int,
    ) -> LiveState:
        """Upsert the items ``ids`` (n,) int64 with their n encoded rows and attributes (None when the schema declares
        none), delete ``deleted`` (m,) int64 (those that are not there are left out), and return the new state; an id
        may occur once. A list derived from the log that an upsert leaves empty stays what the item had.

        Raises DataError, and changes nothing, when the tower's outputs cannot be used. Whatever else is raised (out of
        memory, say) leaves ``state`` as it was and the index no longer ``usable``.
        """
        if not self.usable:
            raise DataError("a change of this index failed half-way, expected a new index from its corpus")
        if len(set(ids.tolist()) | set(deleted.tolist())) != len(ids) + len(deleted):
            raise DataError(
                f"{len(ids)} upserts and {len(deleted)} deletes name an item twice, expected once each"
            )
        items = self._with_kept_lists(ids, items)
        embedded = self._embedded(items)
        self.usable = False
        self.state = self._changed(ids, items, embedded, attributes, deleted, log_position)
        self.usable = True
        return self.state

    def _changed(
        self,
        ids: np.ndarray,
        items: Encoded,
        embedded: tuple[np.ndarray, np.ndarray, np.ndarray],
        attributes: ItemAttributes | None,
        deleted: np.ndarray,
        log_position: int,
    ) -> LiveState:
        """The state after the change; see `apply`."""
        last, paths, distances = embedded
        view = self.state.view
        buried = view.find(np.concatenate([ids, deleted]))
        first = view.items
        gone = view.gone
        if len(buried) or gone is not None:
            gone = with_bits(gone, first + len(ids), buried)

        places = self._place(paths)
        self._append(ids, items, last, distances, places)
        positions = first + np.arange(len(ids))
        lost = self._nodes_of(buried)
        for layer, growth in enumerate(self._nodes, start=1):
            growth.count(places[:, layer - 1], lost[:, layer - 1])
        if self._nodes:
            self._nodes[-1].adopt(places[:, -1], positions)
        self._remember(ids, deleted, positions)
        view = self._view(gone)
        changed = [
            self._elect(view, layer, places[:, layer - 1], positions, lost[:, layer - 1], buried)
            for layer in range(1, len(self._nodes) + 1)
        ]
        self._embed_nodes(changed)
        if self._attributes is not None and attributes is not None:
            counts = tuple(len(growth.live) for growth in self._nodes)
            self._attributes.append(attributes, places, counts)
            for layer in range(1, len(self._nodes) + 1):
                self._attributes.lower(view, layer, lost[:, layer - 1], buried)
        return LiveState(
            self._view(gone),
            self._changed_i2if(ids, deleted, positions),
            (
                *(rows.table(order) for rows, order in zip(self._node_rows, self._order)),
                self._items.table(),
            ),
            None if self._attributes is None else self._attributes.state,
            log_position,
        )

    def _view(self, gone: np.ndarray | None) -> LiveView:
        return LiveView(
            self._base,
            self.state.view.by_id,
            self._added_ids.extra,
            self._added_places,
            self._added_nodes.extra,
            gone,
            tuple(growth.live for growth in self._nodes),
            tuple(growth.additions for growth in self._nodes),
            tuple(growth.representative for growth in self._nodes),
            tuple(growth.parents for growth in self._nodes),
        )

    def compact(self) -> Corpus:
        """A corpus over the live items, as `build_corpus` would build it; the tower runs over representatives only.

        For a state that no `apply` changes meanwhile. Raises DataError when no item is live."""
        view = self.state.view
        live = np.arange(view.items)
        if view.gone is not None:
            live = live[~bits_at(view.gone, live)]
        if not len(live):
            raise DataError("no item is live, expected at least one to make a snapshot of")
        features = Encoded(self._dense.table().take(live), self._feature_ids.table().take(live))
        distances = self._distances.table().take(live)
        depth = len(self._nodes)
        paths = np.empty((len(live), depth), dtype=np.int32)
        if depth:
            paths[:] = self._nodes[-1].codes.table().take(self._nodes_of(live)[:, -1])
        index = HierarchicalIndex.build(view.ids(live), paths, distances)
        last = self._items.table().take(live[index.row_of_position])
        corpus = assemble_corpus(
            self._schema, self._transform, features, index, last, self._tower, self._codebooks, self._projection,
            TOWER_BATCH, distances,
        )  # fmt: skip
        if self._attributes is None:
            return corpus
        return corpus.with_attributes(self._attributes.whole().take(live))

    def _with_kept_lists(self, ids: np.ndarray, items: Encoded) -> Encoded:
        """The encoded rows with what those that send updates do not know: the derived lists of items that are there."""
        slots = [slot for slot in self._schema.layout("item").slots if slot.feature.derive_from is not None]
        if not slots or not len(ids):
            return items
        view = self.state.view
        positions = view.find(ids)
        order = np.argsort(ids)
        rows = order[np.searchsorted(ids, view.ids(positions), sorter=order)]
        before, kept = self._feature_ids.table().take(positions), items.ids.copy()
        for slot in slots:
            part = slice(slot.start, slot.stop)
            empty = ~kept[rows, part].any(axis=1)
            kept[rows[empty], part] = before[empty, part]
        return Encoded(items.dense, kept)

    def _embedded(self, items: Encoded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of n items: the item layer's embeddings (n, E_N), paths (n, N-1), distances (n, N-1)."""
        depth = len(self._nodes)
        if not len(items):
            width = self._items.base.shape[1]
            return np.empty((0, width), np.float32), np.empty((0, depth), np.int32), np.empty((0, depth))
        # All of them, those of the node layers too: an item that could not represent a node is refused here.
        names = [f"item_l{layer}" for layer in range(1, depth + 2)] + (["index"] if depth else [])
        item_layer = names[depth]
        parts = [out for _, out in embed(self._tower, items, np.arange(len(items)), TOWER_BATCH, names)]
        given = {name: np.concatenate([part[name] for part in parts]) for name in names}
        dtype = self._items.base.dtype
        paths, distances = np.empty((len(items), 0), np.int32), np.empty((len(items), 0))
        if depth:
            paths, distances = assign_paths(self._codebooks, given["index"])
        if dtype != np.float32:
            for layer, name in enumerate(names[:depth], start=1):
                node = given[name]
                if self._projection:
                    node = node + codeword_term(
                        self._codebooks, self._projection[layer - 1], paths[:, :layer]
                    )
                rounded(node, dtype, f"the item tower's {name}")
        return rounded(given[item_layer], dtype, f"the item tower's {item_layer}"), paths, distances

    def _nodes_of(self, positions: np.ndarray) -> np.ndarray:
        """(n,) positions -> (n, N-1) int64 node at each layer above the items."""
        nodes = np.empty((len(positions), len(self._nodes)), dtype=np.int64)
        late = positions >= self._base.items
        for layer in range(1, len(self._nodes) + 1):
            nodes[:, layer - 1] = np.searchsorted(self._base.item_ptr(layer), positions, side="right") - 1
        nodes[late] = self._added_nodes.extra[positions[late] - self._base.items]
        return nodes

    def _place(self, paths: np.ndarray) -> np.ndarray:
        """Nodes (n, N-1) of paths (n, N-1); those that are not there yet are made."""
        places = np.empty(paths.shape, dtype=np.int64)
        for layer, growth in enumerate(self._nodes, start=1):
            parents = np.zeros(len(paths), np.int64) if layer == 1 else places[:, layer - 2]
            places[:, layer - 1], made = growth.find_or_make(parents, paths[:, :layer])
            if len(made):
                missing = np.full(len(made), -1, dtype=np.int32)
                self._order[layer - 1] = np.concatenate([self._order[layer - 1], missing])
                if layer > 1:
                    self._nodes[layer - 2].adopt(growth.parents[made - growth.base_nodes], made)
        return places

    def _append(
        self, ids: np.ndarray, items: Encoded, last: np.ndarray, distances: np.ndarray, places: np.ndarray
    ) -> None:
        self._items.append(last)
        self._dense.append(items.dense)
        self._feature_ids.append(items.ids)
        self._distances.append(distances)
        self._added_ids.append(ids)
        self._added_nodes.append(places)
        for feature, lists in forward_lists(self._schema, items).items():
            self._forward[feature].append(lists)

    def _elect(
        self,
        view: LiveView,
        layer: int,
        nodes: np.ndarray,
        positions: np.ndarray,
        lost: np.ndarray,
        buried: np.ndarray,
    ) -> np.ndarray:
        """Elect the representatives of a layer's nodes that got ``nodes`` (n,) the items at ``positions`` (n,) and
        ``lost`` (m,) those ``buried`` (m,); returns the nodes whose representative is another one."""
        growth = self._nodes[layer - 1]
        representative = growth.representative.copy()
        bereaved = lost[representative[lost] == buried]
        holder = representative[nodes]
        # A node that was empty has none, or one that is gone.
        empty = holder < 0
        if view.gone is not None:
            empty |= bits_at(view.gone, np.maximum(holder, 0))
        whole = np.unique(np.concatenate([bereaved, nodes[empty]]))
        changed = []
        for node in whole[growth.live[whole] > 0]:
            representative[node] = self._nearest(view, layer, int(node))
            changed.append(node)
        plain = ~np.isin(nodes, whole)
        if plain.any():
            nodes, positions, holder = nodes[plain], positions[plain], holder[plain]
            best = self._by_distance(view, layer, nodes, positions)
            nodes, positions, holder = nodes[best], positions[best], holder[best]
            theirs = self._order_keys(view, layer, holder)
            ours = self._order_keys(view, layer, positions)
            nearer = np.array([mine < other for mine, other in zip(ours, theirs)], dtype=bool)
            representative[nodes[nearer]] = positions[nearer]
            changed.extend(nodes[nearer])
        if changed:  # what was built for the representatives stays good for the same array
            growth.representative = representative
        return np.array(changed, dtype=np.int64)

    def _by_distance(
        self, view: LiveView, layer: int, nodes: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """For each different one of ``nodes`` the place of its nearest item (ties: the smaller id)."""
        keys = self._order_keys(view, layer, positions)
        order = sorted(range(len(nodes)), key=lambda i: (nodes[i], keys[i]))
        first = [n for n, i in enumerate(order) if n == 0 or nodes[order[n - 1]] != nodes[i]]
        return np.array([order[n] for n in first], dtype=np.int64)

    def _order_keys(self, view: LiveView, layer: int, positions: np.ndarray) -> list[tuple[float, int]]:
        distances = self._distances.table().take(positions)[:, layer - 1]
        return list(zip(distances.tolist(), view.ids(positions).tolist()))

    def _nearest(self, view: LiveView, layer: int, node: int) -> int:
        """The position of the live item of a node that is nearest to its codeword (ties: the smaller id)."""
        members = view.under(layer, node)
        distances = self._distances.table().take(members)[:, layer - 1]
        near = members[distances == distances.min()]
        return int(near[np.argmin(view.ids(near))])

    def _embed_nodes(self, changed: Sequence[np.ndarray]) -> None:
        """The embeddings of the nodes ``changed`` per layer, from their representatives."""
        of_layer = [growth.representative[nodes] for growth, nodes in zip(self._nodes, changed)]
        needed = np.unique(np.concatenate(of_layer)) if of_layer else np.empty(0, np.int64)
        if not len(needed):
            return
        items = Encoded(self._dense.table().take(needed), self._feature_ids.table().take(needed))
        names = [f"item_l{layer}" for layer in range(1, len(self._nodes) + 1)]
        parts = [out for _, out in embed(self._tower, items, np.arange(len(needed)), TOWER_BATCH, names)]
        for layer, (nodes, positions) in enumerate(zip(changed, of_layer)):
            rows = np.concatenate([part[names[layer]] for part in parts])
            rows = rows[np.searchsorted(needed, positions)]
            if self._projection:
                codes = self._nodes[layer].codes.table().take(nodes)
                rows = rows + codeword_term(self._codebooks, self._projection[layer], codes)
            order = self._order[layer].copy()
            order[nodes] = len(self._node_rows[layer]) + np.arange(len(nodes))
            self._node_rows[layer].append(rows)
            self._order[layer] = order

    def _remember(self, ids: np.ndarray, deleted: np.ndarray, positions: np.ndarray) -> None:
        # What the base has is marked as gone; only what was added needs a place, or none.
        known = deleted[np.isin(deleted, self._added_places.keys)]
        self._added_places = self._added_places.with_changes(
            np.concatenate([ids, known]), np.concatenate([positions, np.full(len(known), -1)])
        )

    def _changed_i2if(self, ids: np.ndarray, deleted: np.ndarray, positions: np.ndarray) -> I2IF | None:
        i2if = self.state.i2if
        if i2if is None:
            return None
        items = np.concatenate([ids, deleted])
        places = np.concatenate([positions, np.full(len(deleted), -1)])
        known = self._transform.vocabularies[ITEM_SPACE].encode(items)
        own = known >= ID_FIRST
        table: PositionTable = i2if.position_of_id
        if own.any():
            table = table.with_changes(known[own], places[own])
        return i2if.over({feature: rows.table() for feature, rows in self._forward.items()}, table)
