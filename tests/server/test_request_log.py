"""The log of refused and failed requests: which lines, how many, and what is never in them."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsnn_core import request_log
from hsnn_core.errors import FeatureError, Overloaded, RequestError, ServerError
from hsnn_core.request_log import Refused, RequestLog


class Log:
    """A log with a period that never ends by itself: closing it writes what one period holds."""

    def __init__(self) -> None:
        self.text = ""
        self.log = RequestLog("hsnn_retrieve", 7, write=self._write, period=60.0)

    def _write(self, text: str) -> None:
        self.text += text

    def add(self, error: Exception, outcome: str = "invalid", **changed: Any) -> None:
        facts = {
            "code": "INVALID_ARGUMENT",
            "facts": {"users": 2, "k": 10},
            "request_id": "a",
            "seconds": 0.25,
        }
        self.log.add(Refused(outcome=outcome, error=error, **(facts | changed)))

    def lines(self) -> list[dict[str, Any]]:
        self.log.close()
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
def log() -> Log:
    return Log()


def test_a_line_says_what_an_operator_asks(log: Log) -> None:
    log.add(RequestError("k: got 101, expected at most 100"), trace="ab" * 16)
    (line,) = log.lines()
    time = line.pop("time")
    assert time.endswith("+00:00")
    assert line == {
        "level": "warning",
        "event": "request",
        "outcome": "invalid",
        "code": "INVALID_ARGUMENT",
        "error": "RequestError",
        "message": "k: got 101, expected at most 100",
        "users": 2,
        "k": 10,
        "request_id": "a",
        "trace_id": "ab" * 16,
        "seconds": 0.25,
        "model": "hsnn_retrieve",
        "version": 7,
    }


def test_of_many_alike_the_first_are_logged_and_the_others_counted(log: Log) -> None:
    for number in range(250):
        log.add(Overloaded(f"{number} requests are running"), "overload")
    log.add(ServerError("gone"), "error")
    lines = log.lines()
    assert [line["message"] for line in lines[:10]] == [f"{n} requests are running" for n in range(10)]
    assert lines[10]["level"] == "error"
    assert [(line["outcome"], line["count"]) for line in lines[11:]] == [("overload", 240)]
    assert lines[11]["event"] == "suppressed"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            FeatureError("feature 'age': got [17.5, -3e+20] in row 4, expected finite numbers"),
            "feature 'age': got [#, #] in row #, expected finite numbers",
        ),
        (FeatureError("age: got inf, expected finite"), "age: got #, expected finite"),
        (
            FeatureError("feature 'f_7': got key -9223372036854775807 in row 0, expected 0..4"),
            "feature 'f_7': got key # in row #, expected #",
        ),
        (ServerError("hsnn_scorer_l2 version 7 failed: idx=51 out of bounds"),
         "hsnn_scorer_l2 version # failed: idx=# out of bounds"),
        (Overloaded("4 requests are running"), "4 requests are running"),
    ],
)  # fmt: skip
def test_values_are_left_out(error: Exception, text: str) -> None:
    assert request_log.without_features(error) == text


@given(
    value=st.floats(allow_nan=False) | st.integers(-(2**63), 2**63),
    quote=st.sampled_from(["{}", "[{}]", "({},)"]),
)
def test_no_number_of_a_feature_is_in_a_message(value: float, quote: str) -> None:
    text = request_log.without_features(
        FeatureError(f"feature 'age': got {quote.format(value)}, expected less")
    )
    assert text == f"feature 'age': got {quote.format('#')}, expected less"


def test_a_traceback_has_the_frames_and_not_the_values() -> None:
    def fails() -> None:
        try:
            raise ValueError("could not broadcast 31.25")
        except ValueError as error:
            raise RuntimeError("user 12 of 13") from error

    with pytest.raises(RuntimeError) as failure:
        fails()
    text = request_log.traceback_without_features(failure.value)
    assert "in fails" in text
    assert "ValueError: could not broadcast #\nwhich led to:" in text
    assert text.endswith("RuntimeError: user # of #")


def test_a_client_cannot_forge_lines_or_fill_the_disk(log: Log) -> None:
    log.add(
        RequestError("tasks: got " + "x" * 10_000),
        request_id='a"}\n{"outcome": "ok"}' + "y" * 10_000,
    )
    (line,) = log.lines()
    assert line["request_id"].startswith('a"}\n{"outcome"')
    assert len(line["request_id"]) == len(line["message"]) == 500


def test_a_log_that_cannot_be_written_holds_nobody_up() -> None:
    def full(text: str) -> None:
        raise OSError("no space left")

    log = RequestLog("hsnn_retrieve", 7, write=full, period=0.001)
    for _ in range(3):
        assert log.add(Refused("error", "INTERNAL", ServerError("x"), {}, "", 0.1))
    log.close()
    assert not log._writer.is_alive(), "it ends all the same"


def test_lines_go_past_pythons_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stood in a buffer would be flushed when the process ends, to a reader who may not read; and a write may take
    a part of it."""
    taken: list[bytes] = []

    def seven(descriptor: int, data: bytes) -> int:
        assert descriptor == 1
        taken.append(data[:7])
        return len(taken[-1])

    monkeypatch.setattr(os, "write", seven)
    request_log._to_standard_output("one line\nand another\n")
    assert b"".join(taken) == b"one line\nand another\n"


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "text"),
    [(RequestError("tasks: \ud800"), "tasks: \\ud800"), (Wordless(), "internal error")],
)
def test_every_error_has_a_text_that_can_be_sent(error: Exception, text: str) -> None:
    assert request_log.text_of(error) == request_log.without_features(error) == text
    assert request_log.traceback_without_features(error).endswith(text)
