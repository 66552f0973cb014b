"""One request of B users, from raw wire tensors to answer tensors; knows nothing of Triton."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from items import Items
from request_decoding import Ask, Deadline, check_complete, decode_context, split_inputs

from hsnn_core.bundle import Bundle
from hsnn_core.errors import RequestError
from hsnn_core.keys import KEY_MISSING
from hsnn_core.live_index import LiveState
from hsnn_core.scorer import PAIRS_PER_CALL, LayerScorer, Runner
from hsnn_core.search import SearchResult, search
from hsnn_core.targeting import TargetingFilter

# What a request waits for an update that was acknowledged, which is followed in milliseconds.
AFTER_SECONDS, AFTER_PERIOD = 2.0, 0.001


@dataclass(frozen=True)
class Found:
    """One request's answer. ``eligible`` (B,): share of the items that each user may get, empty when nothing was
    filtered; ``began``: unix time in nanoseconds at which the search itself began."""

    result: SearchResult
    eligible: Sequence[float]
    began: int


class Retriever:
    """The layer-wise search over one snapshot; shared by the worker threads.

    ``items``: where its items are found, those of one moment per search. ``within``: entered around every search with
    the request's deadline, for a runner whose calls pass it on.
    """

    def __init__(
        self,
        bundle: Bundle,
        runner: Runner,
        items: Items,
        within: Callable[[Deadline], AbstractContextManager[None]] = lambda deadline: nullcontext(),
        pairs_per_call: int = PAIRS_PER_CALL,
    ) -> None:
        self._items = items
        self._transform = bundle.transform
        self._scorer = bundle.scorer(runner, pairs_per_call)
        self._latest: tuple[LiveState, LayerScorer] | None = None
        self._schema = bundle.schema
        self._within = within

    def retrieve(self, raw: Mapping[str, np.ndarray], ask: Ask, deadline: Deadline) -> Found:
        """``raw``: one tensor per user feature, (B, dim) float32 or (B, length) int64 raw keys, and what the request
        says of itself (`Schema.context_wire`).

        Raises FeatureError (names feature, got, expected), RequestError, DeadlineExceeded, SearchError, ServerError.
        """
        deadline()  # the request may have waited for a worker longer than it may take
        features, context = split_inputs(self._schema, raw)
        check_complete(self._schema, features)
        users = self._transform.encode_users(features)
        self._await(ask.after, deadline)
        state, scorer = self._moment()
        allowed = self._filter(state, context, len(users))
        bids = state.attributes.bids if ask.by_bid and state.attributes is not None else None
        began = time.time_ns()
        with self._within(deadline):
            result = search(
                state.view,
                scorer,
                users,
                ask.widths,
                ask.k,
                np.array(ask.rank),
                allowed,
                bids,
                deadline=deadline,
            )
        shares = [] if allowed is None else (allowed.eligible() / max(1, state.view.live_items)).tolist()
        return Found(result, shares, began)

    def _await(self, position: int, deadline: Deadline) -> None:
        """Wait until the items know the log up to ``position``. RequestError when they do not in `AFTER_SECONDS`."""
        until = time.monotonic() + AFTER_SECONDS
        while (known := self._items.state.log_position) < position:
            deadline()
            if time.monotonic() > until:
                raise RequestError(
                    f"after: got position {position} of the item log, but this server knows it up to {known}, and has "
                    f"not got there in {AFTER_SECONDS:g} s; give a position that its hsnn_index acknowledged"
                )
            time.sleep(AFTER_PERIOD)

    def _filter(
        self, state: LiveState, tensors: Mapping[str, np.ndarray], users: int
    ) -> TargetingFilter | None:
        """What each user may get; None: everything."""
        context, excluded = decode_context(self._schema, tensors, users, time.time())
        if not self._schema.eligibility and not excluded.size:
            return None
        places = [state.view.find(row[row != KEY_MISSING]) for row in excluded]
        return TargetingFilter(state.view, users, state.attributes, context, places)

    def _moment(self) -> tuple[LiveState, LayerScorer]:
        """The items of now and a scorer over them. Threads may make one at the same time: both are good."""
        state, latest = self._items.state, self._latest
        if latest is None or latest[0] is not state:
            latest = (state, self._scorer.over(state.view, state.i2if, state.embeddings))
            self._latest = latest
        return latest


def answer_tensors(result: SearchResult) -> dict[str, np.ndarray]:
    """item_ids (B, K) int64, probabilities (B, K, T) f32, rank_score (B, K) f32, valid (B, 1) int32 and
    stage_us (B, N+2) int64: user tower, layers 1..N, total (alike for all users, searched together)."""
    stages = [
        result.user_microseconds,
        *(layer.microseconds for layer in result.layers),
        result.total_microseconds,
    ]
    return {
        "item_ids": result.item_ids,
        "probabilities": result.probabilities,
        "rank_score": result.rank_score,
        "valid": result.valid[:, None],
        "stage_us": np.tile(np.array(stages, np.int64), (len(result.valid), 1)),
    }
