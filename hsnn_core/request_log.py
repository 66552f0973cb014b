"""One line of JSON for every request to a model of ours that was refused or failed, for whoever asks later why.

On standard output, because Triton writes its own log, which quotes what a model says, to standard error: a log
shipper gets lines that it can parse as they are. No line holds a user's features. They reach the server as numbers, so
numbers are left out of every text but those of errors that are known to speak of the request's settings and times.
Item updates come as text, so `hsnn_index` leaves out more.
"""

from __future__ import annotations

import json
import os
import re
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import Event, Lock, Thread
from typing import Any

from .errors import DeadlineExceeded, Overloaded, RequestError, SchemaMismatch

PERIOD = 1.0  # seconds
LINES = 10  # per period and outcome; the others are counted
_PATIENCE = 2.0  # seconds that an unload waits for the last lines
_STANDARD_OUTPUT = 1
_LONGEST = 500  # characters of a text that a client may have chosen
_OF_THE_REQUEST = (RequestError, SchemaMismatch, Overloaded, DeadlineExceeded)
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d[\w.+-]*|inf\b)")


@dataclass(frozen=True)
class Refused:
    """What the log says of a request: ``outcome``, as its model counts it; ``code``: the gRPC status it was answered
    with; ``facts``: what else its model says of one, as JSON has it; ``seconds`` since its arrival; ``trace``: its
    trace id, if it was traced."""

    outcome: str
    code: str
    error: Exception
    facts: Mapping[str, int | None]
    request_id: str
    seconds: float
    trace: str | None = None


def _to_standard_output(text: str) -> None:
    # Past Python's buffer: what stood there would be flushed when the process ends, to a reader who may not read.
    left = text.encode()
    while left:
        left = left[os.write(_STANDARD_OUTPUT, left) :]


class RequestLog:
    """Writes at most LINES lines per second and outcome, the first ones, then one that says how many more there were.

    ``add`` only notes the request: a thread writes, so that a reader who is slow holds up no request. ``event``: what
    lines call a request of this model.
    """

    def __init__(
        self,
        model: str,
        version: int,
        event: str = "request",
        write: Callable[[str], None] = _to_standard_output,
        period: float = PERIOD,
    ) -> None:
        self._who = {"model": model, "version": version}
        self._event, self._write, self._period = event, write, period
        self._lock = Lock()
        self._lines: list[dict[str, Any]] = []
        self._counts: dict[str, int] = {}
        self._closing = Event()
        self._writer = Thread(target=self._follow, name="hsnn-log", daemon=True)
        self._writer.start()

    def add(self, refused: Refused) -> bool:
        """Log it, or count it where enough of its kind were logged; whether it is logged."""
        with self._lock:
            count = self._counts[refused.outcome] = self._counts.get(refused.outcome, 0) + 1
            if count > LINES:
                return False
        line = self._line(refused)
        with self._lock:
            self._lines.append(line)
        return True

    def close(self) -> None:
        """Write what is left and stop; a reader that does not read is not waited for."""
        self._closing.set()
        self._writer.join(_PATIENCE)

    def _line(self, refused: Refused) -> dict[str, Any]:
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "level": "error" if refused.outcome in ("error", "failed") else "warning",
            "event": self._event,
            "outcome": refused.outcome,
            "code": refused.code,
            "error": type(refused.error).__name__,
            "message": without_features(refused.error),
            **refused.facts,
            "request_id": refused.request_id[:_LONGEST],
            "trace_id": refused.trace,
            "seconds": round(refused.seconds, 6),
            **self._who,
        }

    def _follow(self) -> None:
        last = False
        while not last:
            last = self._closing.wait(self._period)
            with self._lock:
                lines, self._lines = self._lines, []
                counts, self._counts = self._counts, {}
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            for outcome, count in counts.items():
                if count > LINES:
                    lines.append(
                        {"time": now, "level": "warning", "event": "suppressed", "outcome": outcome,
                         "count": count - LINES, **self._who}
                    )  # fmt: skip
            if lines:
                with suppress(Exception):  # a log that cannot be written now may be written later
                    self._write("".join(json.dumps(line) + "\n" for line in lines))


def text_of(error: Exception) -> str:
    """What an error says, as text that can be encoded; never raises. A client's half of a surrogate pair cannot."""
    try:
        return str(error).encode(errors="backslashreplace").decode()
    except Exception:
        return "internal error"


def without_features(error: Exception) -> str:
    """The text of an error as a log may hold it."""
    text = text_of(error)
    return (text if isinstance(error, _OF_THE_REQUEST) else _NUMBER.sub("#", text))[:_LONGEST]


def traceback_without_features(error: Exception) -> str:
    """Where an unexpected error came from, in as many lines as Python's own."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    cause = error.__cause__ or error.__context__
    before = f"{traceback_without_features(cause)}\nwhich led to:\n" if isinstance(cause, Exception) else ""
    return f"{before}{frames}{type(error).__name__}: {without_features(error)}"
