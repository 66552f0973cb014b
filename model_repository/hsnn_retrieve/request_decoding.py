"""One request's parameters and deadline, checked."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from hsnn_core.errors import DeadlineExceeded, RequestError, SchemaMismatch

PARAMETERS = ("k", "widths", "schema_hash")


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
    """How deep one request searches: items returned and nodes kept after each layer but the last."""

    k: int
    widths: tuple[int, ...]


def decode_ask(parameters: str, default: Ask, max_k: int, schema_hash: str) -> Ask:
    """``parameters``: the request's, as the JSON object Triton gives.

    RequestError names the parameter, what came and what is expected; SchemaMismatch names both hashes.
    """
    given = json.loads(parameters or "{}")
    unknown = sorted(name for name in given if name not in PARAMETERS and not name.startswith("triton_"))
    if unknown:
        raise RequestError(f"unknown request parameters {unknown}, expected among {list(PARAMETERS)}")
    theirs = given.get("schema_hash", schema_hash)
    if theirs != schema_hash:
        raise SchemaMismatch(
            f"the client encodes by schema {theirs}, this snapshot serves schema {schema_hash}; "
            "let the client fetch the schema from the server again"
        )
    k = _whole("k", given.get("k", default.k))
    if k > max_k:
        raise RequestError(
            f"k: got {k}, expected at most {max_k} (the snapshot's max_k); ask for fewer items"
        )
    return Ask(k, _widths(given["widths"], default.widths) if "widths" in given else default.widths)


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


def _whole(name: str, value: object) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise RequestError(f"{name}: got {value!r}, expected a whole number >= 1")
    return number
