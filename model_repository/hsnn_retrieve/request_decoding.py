"""One request's parameters, context and deadline, checked."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from hsnn_core.eligibility import Context, checked_context
from hsnn_core.errors import DeadlineExceeded, FeatureError, RequestError, SchemaMismatch
from hsnn_core.schema import Schema
from hsnn_core.schema_eligibility import EXCLUDED_ITEMS

PARAMETERS = ("k", "widths", "rank_by", "tasks", "after", "schema_hash")
RANK_BY = ("probability", "bid")


class Deadline:
    """The moment by which a request must be answered; ``microseconds`` 0 means there is none.

    Called, it raises DeadlineExceeded once that moment has passed; the search does so before every layer.
    """

    def __init__(self, microseconds: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._allowed = microseconds
        self._clock = clock
        self._start = clock()

    def __call__(self) -> None:
        if self._allowed and self._elapsed() >= self._allowed:
            raise self.exceeded()

    def exceeded(self) -> DeadlineExceeded:
        """The error of a request whose time has passed."""
        return DeadlineExceeded(
            f"the request took {self._elapsed() / 1000:.1f} ms so far, allowed are "
            f"{self._allowed / 1000:.1f} ms; allow a longer timeout, or ask for smaller widths or k"
        )

    def seconds_left(self) -> float:
        """Infinite when there is no deadline, negative when it has passed."""
        return (self._allowed - self._elapsed()) / 1e6 if self._allowed else math.inf

    def microseconds_left(self) -> int:
        """What a call made on behalf of the request may take; 0 when there is no deadline."""
        return max(1, int(self._allowed - self._elapsed())) if self._allowed else 0

    def seconds_since_start(self) -> float:
        return self._clock() - self._start

    def _elapsed(self) -> float:
        return self.seconds_since_start() * 1e6


@dataclass(frozen=True)
class Ask:
    """How one request searches: ``k`` items returned and nodes kept after each layer but the last; ``rank``, one
    exponent of the probability of each task; ``by_bid``: whether their product is multiplied with the item's bid;
    ``after``: the position of the item log that the answer must know."""

    k: int
    widths: tuple[int, ...]
    rank: tuple[float, ...]
    by_bid: bool = False
    after: int = 0


def decode_ask(parameters: str, default: Ask, max_k: int, schema: Schema) -> Ask:
    """``parameters``: the request's, as the JSON object Triton gives.

    RequestError names the parameter, what came and what is expected; SchemaMismatch names both hashes.
    """
    given = json.loads(parameters or "{}")
    unknown = sorted(name for name in given if name not in PARAMETERS and not name.startswith("triton_"))
    if unknown:
        raise RequestError(f"unknown request parameters {unknown}, expected among {list(PARAMETERS)}")
    theirs = given.get("schema_hash", schema.hash)
    if theirs != schema.hash:
        raise SchemaMismatch(
            f"the client encodes by schema {theirs}, this snapshot serves schema {schema.hash}; "
            "let the client fetch the schema from the server again"
        )
    k = _whole("k", given.get("k", default.k))
    if k > max_k:
        raise RequestError(
            f"k: got {k}, expected at most {max_k} (the snapshot's max_k); ask for fewer items"
        )
    return Ask(
        k,
        _widths(given["widths"], default.widths) if "widths" in given else default.widths,
        _rank(given["tasks"], schema) if "tasks" in given else default.rank,
        _by_bid(given["rank_by"], schema) if "rank_by" in given else default.by_bid,
        _whole("after", given["after"]) if "after" in given else default.after,
    )


def split_inputs(
    schema: Schema, inputs: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A request's tensors: those of the users' features, and those of `Schema.context_wire`."""
    names = {tensor.name for tensor in schema.context_wire()}
    users = {name: values for name, values in inputs.items() if name not in names}
    return users, {name: values for name, values in inputs.items() if name in names}


def check_complete(schema: Schema, features: Mapping[str, np.ndarray]) -> None:
    """FeatureError for users without a tensor of every feature. Triton counts a request's tensors, so where optional
    ones are sent it does not notice that another is missing."""
    missing = [tensor.name for tensor in schema.user_wire() if tensor.name not in features]
    if missing:
        raise FeatureError(
            f"user features {missing} are missing, expected a tensor of every one; send a feature that a user does not "
            "have as its default, or as ids that are all missing"
        )


def decode_context(
    schema: Schema, tensors: Mapping[str, np.ndarray], users: int, now: float
) -> tuple[Context, np.ndarray]:
    """The context of B ``users`` and the raw keys of the items that they exclude, (B, n) int64 padded with KEY_MISSING.

    ``tensors``: as `split_inputs` gives them; ``now``: see `Context.from_wire`. FeatureError names the tensor, what
    came and what is expected.
    """
    excluded = tensors.get(EXCLUDED_ITEMS.name, np.empty((users, 0), np.int64))
    checked_context(excluded, EXCLUDED_ITEMS, users)
    others = {name: values for name, values in tensors.items() if name != EXCLUDED_ITEMS.name}
    return Context.from_wire(schema, others, users, now), excluded


def parse_widths(text: object) -> tuple[int, ...]:
    """ "64,256" -> (64, 256); a whole number is one width; an empty text is none (a flat index)."""
    return tuple(_whole("widths", part) for part in str(text).split(",") if part.strip())


def _widths(text: object, default: tuple[int, ...]) -> tuple[int, ...]:
    widths = parse_widths(text)
    if len(widths) != len(default):
        raise RequestError(
            f"widths: got {text!r}, expected {len(default)} numbers separated by commas, one for each layer "
            f"but the last (the default is {','.join(map(str, default))!r})"
        )
    return widths


def _rank(text: object, schema: Schema) -> tuple[float, ...]:
    known = [task.name for task in schema.tasks]
    chosen = [part.strip() for part in str(text).split(",")]
    if not set(chosen) <= set(known) or len(set(chosen)) != len(chosen):
        raise RequestError(
            f"tasks: got {text!r}, expected different ones of {known}, separated by commas, whose probabilities are "
            "multiplied"
        )
    return tuple(float(name in chosen) for name in known)


def _by_bid(text: object, schema: Schema) -> bool:
    if text not in RANK_BY:
        raise RequestError(f"rank_by: got {text!r}, expected one of {list(RANK_BY)}")
    if text == "bid" and schema.bid is None:
        raise RequestError(
            "rank_by: got 'bid', but the items have none; declare the schema's bid, or leave it out"
        )
    return text == "bid"


def _whole(name: str, value: object) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise RequestError(f"{name}: got {value!r}, expected a whole number >= 1")
    return number
