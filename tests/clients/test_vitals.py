"""What `hsnn top` makes of two scrapes."""

from __future__ import annotations

import bisect
import socket
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.metrics import scrape as ask
from clients.vitals import vitals
from hsnn_cli import commands_top
from hsnn_cli.main import main
from hsnn_core.errors import ServerError

BOUNDS = [0.001, 0.01, 0.1, 1.0]


def scrape(version: str, seconds: list[float], **counters: float) -> dict[str, float]:
    """A server that answered requests which took ``seconds``."""
    metrics = {
        f'hsnn_requests_in_flight{{version="{version}"}}': 2.0,
        f'hsnn_workers{{version="{version}"}}': 4.0,
        f'hsnn_request_seconds_bucket{{version="{version}",le="+Inf"}}': float(len(seconds)),
        f'hsnn_requests_total{{outcome="ok",version="{version}"}}': float(len(seconds)),
    }
    for bound in BOUNDS:
        key = f'hsnn_request_seconds_bucket{{version="{version}",le="{bound:g}"}}'
        metrics[key] = float(sum(one <= bound for one in seconds))
    return metrics | {f"{name}": value for name, value in counters.items()}


@given(
    st.lists(st.floats(1e-5, 0.99), max_size=30),
    st.lists(st.floats(1e-5, 0.99), min_size=1, max_size=200),
    st.sampled_from(["p50", "p99"]),
)
def test_quantiles_are_of_what_came_between_and_lie_in_the_right_bucket(
    earlier: list[float], between: list[float], which: str
) -> None:
    (one,) = vitals(scrape("7", earlier), scrape("7", earlier + between), seconds=2.0)
    found = getattr(one, which)
    rank = {"p50": 0.5, "p99": 0.99}[which] * len(between)
    true = sorted(between)[max(0, -int(-rank // 1) - 1)]
    bucket = bisect.bisect_left(BOUNDS, true)
    assert [0.0, *BOUNDS][bucket] - 1e-9 <= found <= BOUNDS[bucket] + 1e-9
    assert one.rate == len(between) / 2


def test_without_requests_there_are_no_times() -> None:
    (one,) = vitals(scrape("7", [0.5]), scrape("7", [0.5]), seconds=1.0)
    assert (one.rate, one.p50, one.p99, one.empty, one.eligible, one.layers) == (
        0.0,
        None,
        None,
        None,
        None,
        {},
    )
    assert (one.in_flight, one.workers) == (2, 4)


def test_slower_than_the_last_bucket_is_its_bound() -> None:
    (one,) = vitals({}, scrape("7", [3.0, 4.0]), seconds=1.0)
    assert one.p99 == 1.0


def test_a_server_that_began_anew_counts_from_nothing() -> None:
    (one,) = vitals(scrape("7", [0.05] * 100), scrape("7", [0.05] * 10), seconds=5.0)
    assert one.rate == 2.0
    assert one.p50 == pytest.approx(0.055)


def test_versions_are_told_apart_the_newest_first() -> None:
    after = scrape("9", [0.5] * 4) | scrape("10", [0.05] * 2) | {
        'hsnn_requests_total{outcome="overload",version="10"}': 6.0,
        'hsnn_candidates_total{layer="2",version="10"}': 60.0,
        'hsnn_candidates_total{layer="1",version="10"}': 30.0,
        'hsnn_layer_seconds_count{layer="1",version="10"}': 2.0,
        'hsnn_layer_seconds_sum{layer="1",version="10"}': 0.5,
        'hsnn_users_total{version="10"}': 3.0,
        'hsnn_empty_results_total{version="10"}': 1.0,
        'hsnn_bls_failures_total{model="hsnn_scorer_l1",version="10"}': 4.0,
        'hsnn_item_log_behind{version="10"}': -1.0,
    }  # fmt: skip
    newest, oldest = vitals({}, after, seconds=2.0)
    assert (newest.version, oldest.version) == ("10", "9")
    assert newest.refused == {"overload": 3.0, "unmeetable": 0.0, "deadline": 0.0}
    assert (newest.rate, oldest.rate) == (4.0, 2.0)
    assert (newest.empty, newest.bls_failures, newest.behind) == (pytest.approx(1 / 3), 2.0, -1)
    assert list(newest.layers) == ["1", "2"]
    assert (newest.layers["1"].mean, newest.layers["1"].candidates) == (0.25, 10.0)
    assert newest.layers["2"].mean is None
    assert oldest.layers == {}


def test_top_goes_on_until_ctrl_c_through_a_restart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks: list[dict[str, float] | ServerError] = [
        scrape("7", [0.05] * 4), scrape("7", [0.05] * 24), ServerError("gone"), {}, scrape("8", [0.5]),
    ]  # fmt: skip
    naps = iter([None] * (len(looks) - 1))

    def look(address: str) -> dict[str, float]:
        found = looks.pop(0)
        if isinstance(found, ServerError):
            raise found
        return found

    def sleep(seconds: float) -> None:
        try:
            next(naps)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(commands_top, "scrape", look)
    monkeypatch.setattr(commands_top.time, "sleep", sleep)
    assert main(["top"]) == 130
    shown = capsys.readouterr().out
    views = [view for view in shown.split("127.0.0.1:8002") if view]
    assert "2 of 4" in views[0]
    assert [text in view for view, text in zip(views[1:], ("does not answer: gone", "answers again"))] == [
        True
    ] * 2
    assert "\n8 " in views[3]
    assert "\x1b" not in shown, "only a terminal is cleared"


@pytest.mark.parametrize(
    "answer",
    [b"\x00\x00\x06\x04\x00", b"HTTP/1.1 200 OK\r\n\r\n<html></html>", b"HTTP/1.1 200 OK\r\n\r\n\xff 1\n"],
    ids=["gRPC", "a page", "bytes"],
)
def test_who_gives_no_metrics_is_named(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=_answer_once, args=[listener, answer])
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(
            ServerError, match=f"metrics at {address}: .*give the address of Triton's metrics"
        ):
            ask(address)
        thread.join()


def _answer_once(listener: socket.socket, answer: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(answer)
