"""Evaluation requests: who asks, when, and which items may be found for them (`search.candidates` of a recipe).

    all           every item of the corpus; one request per user
    new           all but the items of the request's own history; one request per user. The protocol of the figures
                  published on Amazon reviews and on Gowalla, whose positives are new to the user by construction
    seen_before   the items that had appeared in the log, in any split, strictly before the request; one request per
                  click. The protocol for news, whose catalogue grows by the minute. Times of all users must compare

A request per user stands at the user's first impression of the split and wants all their positives there, which
is fair while the catalogue stands still. News of the day do not: of Globo's last day, 7% of the clicks are on
articles that did not exist at the user's first click, and the others are asked for with the time and history of
a request hours older. So with `seen_before` every click is a request at its own time that wants the clicked item,
the usual next-click protocol, and a choice of the clicks is made instead of the users. (1.6% of those clicks are
the article's first and cannot be found.)

A positive that is no candidate cannot be found by any model: under `seen_before` the click with which an item
appears, under `new` a repetition. Such positives are left out, so are requests that have no other, and both are
counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsnn_core.errors import DataError
from hsnn_core.features import Encoded
from hsnn_core.index import HierarchicalIndex
from hsnn_core.item_filter import ItemFilter, MaskFilter

from .dataset import Dataset, Examples


@dataclass(frozen=True)
class Requests:
    """R requests, each as of one impression of its split.

    Attributes:
        users: encoded, R rows.
        rows: (R,) int64, the request's impression: its row in the split's examples.
        user_key: (R,) int64.
        time: (R,) int64.
        wanted: per request the int32 item rows of its positives that are candidates, distinct and ascending,
            at least one.
        items: V.
        history: under "new" per request the item rows of the whole history, else None.
        first_time: under "seen_before" (V,) int64, else None.
        asked: requests before those without a candidate among their positives were left out.
        positives: positives of the requests asked, candidates or not.
    """

    users: Encoded
    rows: np.ndarray
    user_key: np.ndarray
    time: np.ndarray
    wanted: list[np.ndarray]
    items: int
    history: list[np.ndarray] | None
    first_time: np.ndarray | None
    asked: int
    positives: int

    def __len__(self) -> int:
        return len(self.rows)

    def eligible(self, part: slice) -> np.ndarray | None:
        """The candidates of the requests ``part`` (b of them): (b, V) bool by item row; None when all are."""
        if self.first_time is not None:
            found: np.ndarray = self.first_time < self.time[part, None]
            return found
        if self.history is None:
            return None
        known = self.history[part]
        mask = np.ones((len(known), self.items), dtype=bool)
        of_request = np.repeat(np.arange(len(known)), [len(rows) for rows in known])
        mask[of_request, np.concatenate([*known, np.empty(0, np.int32)])] = False
        return mask

    def asked_of(
        self, part: slice, index: HierarchicalIndex
    ) -> tuple[Encoded, np.ndarray, ItemFilter | None]:
        """The requests ``part`` (b of them) as a search of ``index`` takes them: users, their candidates (b, V) bool
        by position, and these as a filter; None for one when all items are."""
        users, mask = Encoded(self.users.dense[part], self.users.ids[part]), self.eligible(part)
        if mask is None:
            return users, np.ones((len(users), self.items), dtype=bool), None
        by_position = mask[:, index.row_of_position]
        return users, by_position, MaskFilter(index, by_position)


def evaluation_requests(
    dataset: Dataset, split: str, candidates: str = "all", max_requests: int | None = None
) -> Requests:
    """The requests of a split; see the module for ``candidates``.

    More than ``max_requests`` users (or clicks) are cut to a choice that depends on the data set's seed alone;
    requests are in order of user key (or of time). Raises DataError for another ``candidates``.
    """
    if candidates not in ("all", "new", "seen_before"):
        raise DataError(f"candidates: got {candidates!r}, expected all, new or seen_before")
    examples: Examples = getattr(dataset, split)
    if candidates == "seen_before":
        rows = dataset.click_rows(split, max_requests)
        asked = [examples.item_row[row : row + 1] for row in rows]
    else:
        rows = dataset.user_rows(split, max_requests)
        asked = dataset.positives(split, examples.user_key[rows])
    history = dataset.earlier(split, rows, 0) if candidates == "new" else None
    first_time = dataset.item_first_time if candidates == "seen_before" else None
    wanted = asked
    if history is not None:
        wanted = [np.setdiff1d(items, known) for items, known in zip(asked, history)]
    if first_time is not None:
        wanted = [items[first_time[items] < time] for items, time in zip(asked, examples.time[rows])]

    kept = np.flatnonzero([len(items) for items in wanted])
    rows = rows[kept]
    return Requests(
        Encoded(examples.users.dense[rows], examples.users.ids[rows]),
        rows,
        examples.user_key[rows],
        examples.time[rows],
        [wanted[request] for request in kept],
        len(dataset.item_keys),
        None if history is None else [history[request] for request in kept],
        first_time,
        asked=len(asked),
        positives=sum(map(len, asked)),
    )
