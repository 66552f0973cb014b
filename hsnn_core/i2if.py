"""I2IF: <user, item> interaction features from an inverted index (paper §2, spec §1).

Every interaction crosses a user feature with an item feature. The user's ids are the query: directly, when
both features share an id space; *through items*, when the user's ids are items and it is the terms of those items
that count; or *via lists*, when each of the user's items stands for the terms of its list in another item feature.
Per candidate there are three dense crossings and the ids that matched:

    0  number of the item's terms that matched; via lists log(1 + w), w what they weigh, the first place of a list 1
    1  share of the user's total weight that lies on matched terms (0 without any)
    2  share of the item's terms that matched (0 without any)

What a term weighs is `hsnn_core.terms`. A node is crossed as its representative is; in an interaction of members,
what all its items weigh is the representative's, for which the user's query is rewritten per layer.

Two plans give the same bits: `probe` looks the user up from the candidates' forward lists (few candidates),
`walk` runs over the postings of the user's terms (all nodes of a layer). Both only collect integers; one
function turns them into features. Padding (0) and unknown (1) never match and are no terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from threading import local
from typing import NamedTuple

import numpy as np

from .errors import FeatureError, FormatError
from .features import Encoded, FeatureTransform, without_gaps, without_repeats
from .place_table import PositionTable
from .row_table import RowTable
from .schema import ID_FIRST, ID_PADDING, Interaction, Schema
from .terms import LIST_FIRST, Terms, list_weights, occurrence_weights, summed

DENSE_PER_INTERACTION = 3
# Entries of the term table that `probe` keeps per thread (4 MiB): how many users one pass can hold.
TABLE_ENTRIES = 1 << 20


#: positions of items (n,) -> positions of the items that represent their nodes (n,)
StandIn = Callable[[np.ndarray], np.ndarray]


class CrossSpec(NamedTuple):
    """An interaction, the columns of its feature in the encoded user ids, and the ids its terms have."""

    interaction: Interaction
    user: slice
    cardinality: int


class IdSlot(NamedTuple):
    """Columns ``start:stop`` of the sparse crossings belong to the interaction."""

    interaction: Interaction
    start: int
    stop: int


class Query(NamedTuple):
    """B users as queries, one `Terms` per interaction."""

    terms: tuple[Terms, ...]


class Crossings(NamedTuple):
    """``dense`` (B, C, 3P) float32 and ``ids`` (B, C, sum of matches) int32: the first matches in the order
    of the item's list, 0 beyond."""

    dense: np.ndarray
    ids: np.ndarray


class PostingList(NamedTuple):
    """One item feature over R' nodes of L slots; cell = node * L + slot. ``cells[ptr[i]:ptr[i+1]]`` hold
    ``terms[i]``, terms ascending; ``lists`` (R', L) is the way back, 0 in empty cells."""

    terms: np.ndarray
    ptr: np.ndarray
    cells: np.ndarray
    lists: np.ndarray

    def find(self, terms: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in ``terms`` of those asked for that are there, and their weights."""
        at = np.searchsorted(self.terms, terms)
        there = np.flatnonzero(at < len(self.terms))
        there = there[self.terms[at[there]] == terms[there]]
        return at[there], weights[there]


@dataclass(frozen=True, eq=False)
class Postings:
    """The inverted index over ``nodes`` nodes: one list per interaction, the same one for those that share an item
    feature."""

    nodes: int
    lists: tuple[PostingList, ...]


class I2IF:
    """The interactions of a schema over V items, known by their position.

    ``forward[feature]`` (V, L) int32: the terms of every item in an item feature that is crossed or that crossings go
    via, different within an item, 0 at the end (`forward_lists` makes them); interactions share them.
    ``position_of_id`` (cardinality of the item space,) int32: position of an item id, -1 when it is not in the corpus.
    Safe to share between threads. Raises FormatError when the arrays do not fit.
    """

    def __init__(
        self, specs: Sequence[CrossSpec], forward: Mapping[str, np.ndarray], position_of_id: np.ndarray
    ) -> None:
        self.specs = tuple(specs)
        self.forward = {
            feature: RowTable(_forward_list(feature, spec, forward))
            for spec in self.specs
            for feature in spec.interaction.item_features
        }
        self._crossed = {spec.interaction.item for spec in self.specs}
        position_of_id = np.asarray(position_of_id)
        rows = {len(lists) for lists in self.forward.values()}
        if len(rows) != 1:
            raise FormatError(
                f"i2if: forward lists of {sorted(rows)} items, expected lists of the same items"
            )
        self.positions = rows.pop()
        if position_of_id.ndim != 1 or position_of_id.max(initial=-1) >= self.positions:
            raise FormatError(
                f"i2if: position_of_id of shape {position_of_id.shape} reaches position "
                f"{position_of_id.max(initial=-1)}, expected one axis and positions below {self.positions}"
            )
        self.position_of_id = PositionTable(position_of_id)
        slots, stop = [], 0
        for spec in self.specs:
            start, stop = stop, stop + spec.interaction.matches
            slots.append(IdSlot(spec.interaction, start, stop))
        self.id_slots = tuple(slots)
        self._scratch = local()

    @classmethod
    def build(
        cls, schema: Schema, transform: FeatureTransform, items: Encoded, position_of_id: np.ndarray
    ) -> I2IF:
        """From encoded items, row = position. Raises FormatError when the schema has no interactions."""
        return cls(_specs(schema, transform), forward_lists(schema, items), position_of_id)

    @classmethod
    def from_arrays(
        cls, schema: Schema, transform: FeatureTransform, arrays: Mapping[str, np.ndarray]
    ) -> I2IF:
        """The inverse of `to_arrays`; views, no copies. Raises FormatError."""
        names = _stored_names(schema.interactions)
        for name in (*names.values(), "i2if.position_of_id"):
            if name not in arrays:
                raise FormatError(f"i2if: array {name} is missing; got {', '.join(sorted(arrays))}")
        forward = {feature: arrays[stored] for feature, stored in names.items()}
        return cls(_specs(schema, transform), forward, arrays["i2if.position_of_id"])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Named arrays for an array file."""
        names = _stored_names([spec.interaction for spec in self.specs])
        arrays = {names[feature]: lists.part(slice(0, len(lists))) for feature, lists in self.forward.items()}
        arrays["i2if.position_of_id"] = self.position_of_id.positions()
        return arrays

    def over(self, forward: Mapping[str, RowTable], position_of_id: PositionTable) -> I2IF:
        """The same interactions over items that have changed; it shares the threads' scratch memory."""
        changed = copy(self)
        changed.forward, changed.position_of_id = dict(forward), position_of_id
        changed.positions = len(next(iter(forward.values())))
        return changed

    @property
    def dense_width(self) -> int:
        """3P."""
        return DENSE_PER_INTERACTION * len(self.specs)

    @property
    def ids_width(self) -> int:
        """Sum of the interactions' matches."""
        return self.id_slots[-1].stop

    def query(self, user_ids: np.ndarray) -> Query:
        """The terms of encoded user ids (B, S) int32. Raises FeatureError for ids outside their space."""
        found: dict[str, np.ndarray] = {}
        return Query(tuple(self._user_terms(spec, user_ids[:, spec.user], found) for spec in self.specs))

    def query_of_nodes(self, query: Query, stand_in: StandIn) -> Query:
        """What ``query`` is for the nodes of a layer: in interactions of members every item among the user's terms
        stands as the one that represents its node, which ``stand_in`` says."""
        found: dict[tuple[str, str, str | None], np.ndarray] = {}
        return Query(
            tuple(
                self._members(spec.interaction, terms, found, stand_in) if spec.interaction.members else terms
                for spec, terms in zip(self.specs, query.terms)
            )
        )

    def _members(
        self,
        interaction: Interaction,
        users: Terms,
        found: dict[tuple[str, str, str | None], np.ndarray],
        stand_in: StandIn,
    ) -> Terms:
        """``found``: what stands in, for the interactions whose users have the same terms."""
        key = (interaction.user, interaction.item, interaction.via)
        if key not in found:
            positions = self._positions(users.terms)
            there = positions >= 0
            own = found[key] = np.zeros(positions.shape, np.int32)
            own[there] = self.forward[interaction.item].take(stand_in(positions[there]))[:, 0]
        return summed(found[key], users.weights)

    def _user_terms(self, spec: CrossSpec, ids: np.ndarray, found: dict[str, np.ndarray]) -> Terms:
        """``found``: positions of the items that a user feature names, for the interactions that share it."""
        interaction = spec.interaction
        lists = interaction.via or (interaction.item if interaction.through else None)
        limit = spec.cardinality if lists is None else len(self.position_of_id)
        if ids.size and (ids.min() < 0 or ids.max() >= limit):
            raise FeatureError(
                f"interaction {interaction.name!r}: user ids {ids.min()}..{ids.max()}, expected 0.."
                f"{limit - 1}; encode users with the transform of this snapshot"
            )
        if lists is None:
            weights = occurrence_weights(ids, interaction.fade)
            return summed(np.where(ids < ID_FIRST, ID_PADDING, ids), weights)
        if interaction.user not in found:
            found[interaction.user] = self._positions(ids)
        positions = found[interaction.user]
        terms = self.forward[lists].take(np.maximum(positions, 0))  # (B, S, L)
        terms[positions < 0] = ID_PADDING
        if interaction.via:
            spread = list_weights(ids, interaction.fade, terms.shape[2])
        else:
            weights = occurrence_weights(ids, interaction.fade)
            spread = np.broadcast_to(weights[:, :, None], terms.shape)
        return summed(terms.reshape(len(ids), -1), spread.reshape(len(ids), -1))

    def _positions(self, ids: np.ndarray) -> np.ndarray:
        """Positions of item ids of any shape; -1 for those that are no item or not in the corpus."""
        positions: np.ndarray = np.where(ids < ID_FIRST, -1, self.position_of_id.take(ids))
        return positions

    def probe(self, query: Query, positions: np.ndarray) -> Crossings:
        """Crossings of each user with positions (B, C) of its own, from the forward lists."""
        batch, count = positions.shape
        crossings = self._empty(batch, count)
        wanted = {feature: self.forward[feature].take(positions) for feature in self._crossed}
        for number, (spec, users) in enumerate(zip(self.specs, query.terms)):
            lists = wanted[spec.interaction.item]  # (B, C, L)
            step = max(1, TABLE_ENTRIES // spec.cardinality)
            table = self._table(spec.cardinality)
            for first in range(0, batch, step):
                part = slice(first, min(first + step, batch))
                row = np.arange(part.stop - first)[:, None] * spec.cardinality
                asked = row + users.terms[part]
                places = lists[part] if part.stop - first == 1 else row[:, :, None] + lists[part]
                try:
                    table[asked] = users.weights[part]
                    hits = np.take(table, places).ravel()
                finally:  # out of memory, say: this thread's next users must not find these ones' terms
                    table[asked] = 0
                cells = np.flatnonzero(hits != 0)  # of booleans, few of them true, it takes the least
                self._fill(crossings, number, first, cells, hits[cells], lists[part], users)
        return crossings

    def postings(self, positions: np.ndarray) -> Postings:
        """The inverted index over the nodes whose items are at positions (R',), in that order."""
        inverted = {feature: _inverted(self.forward[feature].take(positions)) for feature in self._crossed}
        return Postings(len(positions), tuple(inverted[spec.interaction.item] for spec in self.specs))

    def walk(self, query: Query, postings: Postings) -> Crossings:
        """Crossings (B, R', ...) of every user with all nodes of the postings, in their order."""
        batch = len(query.terms[0].totals)
        crossings = self._empty(batch, postings.nodes)
        for number, (users, inverted) in enumerate(zip(query.terms, postings.lists)):
            for user in range(batch):
                at, weights = inverted.find(users.terms[user], users.weights[user])
                lengths = inverted.ptr[at + 1] - inverted.ptr[at]
                before = lengths.cumsum() - lengths
                entries = np.repeat(inverted.ptr[at] - before, lengths) + np.arange(lengths.sum())
                hits = np.zeros(inverted.lists.size, dtype=np.int32)
                hits[inverted.cells[entries]] = np.repeat(weights, lengths)
                cells = np.flatnonzero(hits)
                self._fill(crossings, number, user, cells, hits[cells], inverted.lists[None], users)
        return crossings

    def _fill(
        self,
        crossings: Crossings,
        number: int,
        first: int,
        cells: np.ndarray,
        weights: np.ndarray,
        lists: np.ndarray,
        users: Terms,
    ) -> None:
        """Turn the hits of one interaction into the crossings of b users, from user ``first``; few candidates have any.

        ``lists`` (b, C, L): the candidates' terms; ``cells`` (n,) ascending: which of them, flat, the user has;
        ``weights`` (n,) int32: the user's of these. Integers until each column's last operation, so that equal hits
        give equal bits.
        """
        if not len(cells):
            return
        slot, (_, count, length) = self.id_slots[number], lists.shape
        dense = crossings.dense.reshape(-1, self.dense_width)  # (B*C, 3P)
        ids = crossings.ids.reshape(-1, self.ids_width)  # (B*C, sum of matches)
        terms = lists.reshape(-1)[cells]
        pairs, matched, of_list = (
            cells,
            np.ones(1, np.int64),
            np.ones(1, np.int64),
        )  # an item of one term has that
        if length == 1:
            ids[:, slot.start][first * count + pairs] = terms
        else:
            pair = cells // length
            starts = np.flatnonzero(np.diff(pair, prepend=-1))
            pairs, matched = pair[starts], np.diff(starts, append=len(pair))
            weights = np.add.reduceat(weights, starts)
            of_list = _over_slots(lists.reshape(-1, length)[pairs] != ID_PADDING)
            place = np.arange(len(pair)) - np.repeat(starts, matched)
            keep = np.flatnonzero(place < slot.interaction.matches)
            ids[first * count + pair[keep], slot.start + place[keep]] = terms[keep]
        rows = first * count + pairs
        totals = np.maximum(users.totals, 1)
        of_user = totals[0] if len(totals) == 1 else totals[first + pairs // count]
        first_column = np.log1p(weights / LIST_FIRST) if slot.interaction.via else matched
        values = (first_column, weights / of_user, matched / of_list)
        for column, value in enumerate(values, start=DENSE_PER_INTERACTION * number):
            # A column by rows, in the column's own type: half the time of rows and column together.
            dense[:, column][rows] = np.broadcast_to(value.astype(np.float32), rows.shape)

    def _empty(self, batch: int, count: int) -> Crossings:
        return Crossings(
            np.zeros((batch, count, self.dense_width), dtype=np.float32),
            np.zeros((batch, count, self.ids_width), dtype=np.int32),
        )

    def _table(self, cardinality: int) -> np.ndarray:
        """This thread's term table; all zero between uses, so that it is never cleared as a whole."""
        size = max(TABLE_ENTRIES, cardinality)
        table: np.ndarray | None = getattr(self._scratch, "table", None)
        if table is None or len(table) < size:
            table = self._scratch.table = np.zeros(size, dtype=np.int32)
        return table


def forward_lists(schema: Schema, items: Encoded) -> dict[str, np.ndarray]:
    """Item feature -> (R, L) int32 terms of R encoded items, different within an item, 0 at the end."""
    columns = {slot.feature.name: slice(slot.start, slot.stop) for slot in schema.layout("item").slots}
    forward: dict[str, np.ndarray] = {}
    for feature in _stored_names(schema.interactions):
        terms = items.ids[:, columns[feature]]
        known = np.where(terms < ID_FIRST, np.int32(ID_PADDING), terms)
        forward[feature] = np.ascontiguousarray(without_gaps(without_repeats(known)))
    return forward


def _specs(schema: Schema, transform: FeatureTransform) -> list[CrossSpec]:
    if not schema.interactions:
        raise FormatError(f"i2if: schema {schema.name!r} has no interactions, expected at least one")
    columns = {slot.feature.name: slice(slot.start, slot.stop) for slot in schema.layout("user").slots}
    return [
        CrossSpec(i, columns[i.user], transform.cardinality(schema.feature(i.item).space))
        for i in schema.interactions
    ]


def _stored_names(interactions: Sequence[Interaction]) -> dict[str, str]:
    """Item feature -> name of its lists in a file: that of the first interaction that reads it."""
    names: dict[str, str] = {}
    for interaction in interactions:
        names.setdefault(interaction.item, f"i2if.{interaction.name}")
        if interaction.via:
            names.setdefault(interaction.via, f"i2if.{interaction.name}.via")
    return names


def _forward_list(name: str, spec: CrossSpec, forward: Mapping[str, np.ndarray]) -> np.ndarray:
    if name not in forward:
        raise FormatError(f"i2if: no forward lists of {name!r}; got {', '.join(sorted(forward)) or 'none'}")
    lists = np.asarray(forward[name])
    if lists.ndim != 2 or lists.dtype != np.int32 or 0 in lists.shape:
        raise FormatError(
            f"i2if: forward lists of {name!r}: {lists.dtype} {lists.shape}, expected int32 (V, L)"
        )
    if lists.min() < 0 or lists.max() >= spec.cardinality:
        raise FormatError(
            f"i2if: forward lists of {name!r} hold ids {lists.min()}..{lists.max()}, expected 0.."
            f"{spec.cardinality - 1}"
        )
    return lists


def _over_slots(values: np.ndarray) -> np.ndarray:
    """The sum over the last axis, of a few slots: (n, L) bool -> (n,) int64."""
    total = values[:, 0].astype(np.int64)
    for slot in range(1, values.shape[1]):
        total += values[:, slot]
    return total


def _inverted(lists: np.ndarray) -> PostingList:
    flat = lists.ravel()
    cells = np.flatnonzero(flat)
    cells = cells[np.argsort(flat[cells], kind="stable")]
    terms, starts = np.unique(flat[cells], return_index=True)
    return PostingList(terms, np.append(starts, len(cells)), cells, lists)
