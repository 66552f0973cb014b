"""The probe against a server that answers as it is told to, and its reader of .npy files against NumPy."""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hsnn_cli.main import main
from hsnn_core.item_log import ItemLog
from hsnn_core.item_updates import Update
from hsnn_server import probe as module
from hsnn_server.probe import BUSY, DEAD, HEALTHY, WRONG, probe

ITEMS = np.array([[11, 12, 13, 14]], np.int64)
PROBABILITIES = np.array([[[0.9, 0.5], [0.8, 0.4], [0.7, 0.3], [0.6, 0.2]]], np.float32)
Answer = Callable[[dict[str, Any], bytes], tuple[int, bytes, dict[str, str]]]


class Server(ThreadingHTTPServer):
    """Triton's HTTP endpoint as far as a probe asks it; ``answer`` gets the request's JSON and the bytes behind it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.versions = ["3"]
        self.answer: Answer = lambda head, data: tensors()
        self.writer: Answer = lambda head, data: (200, b"{}", {})
        self.metrics = (
            'hsnn_requests_total{outcome="ok",version="2"} 90\n'
            'hsnn_requests_total{outcome="ok",version="3"} 41.000000\n'
            'hsnn_requests_total{outcome="overload",version="3"} 7\n'
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._send(200, self.server.metrics.encode(), {})
            return
        assert self.path == "/v2/models/hsnn_retrieve"
        self._send(200, json.dumps({"name": "hsnn_retrieve", "versions": self.server.versions}).encode(), {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v2/models/hsnn_index/infer":
            self._send(*self.server.writer(json.loads(body), b""))
            return
        assert self.path == "/v2/models/hsnn_retrieve/infer"
        at = int(self.headers["Inference-Header-Content-Length"])
        self._send(*self.server.answer(json.loads(body[:at]), body[at:]))

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def tensors(
    version: int = 3, items: np.ndarray = ITEMS, probabilities: np.ndarray = PROBABILITIES, valid: int = 4
) -> tuple[int, bytes, dict[str, str]]:
    """An answer in Triton's binary form."""
    arrays = {
        "item_ids": items,
        "probabilities": probabilities,
        "rank_score": probabilities[..., 0],
        "valid": np.array([[valid]], np.int32),
    }
    kinds = {"int64": "INT64", "float32": "FP32", "int32": "INT32"}
    outputs = [
        {"name": name, "datatype": kinds[str(a.dtype)], "shape": list(a.shape),
         "parameters": {"binary_data_size": a.nbytes}}
        for name, a in arrays.items()
    ]  # fmt: skip
    head = json.dumps({"model_version": str(version), "outputs": outputs}).encode()
    body = head + b"".join(a.tobytes() for a in arrays.values())
    return 200, body, {"Inference-Header-Content-Length": str(len(head))}


def refusal(status: int, text: str) -> Answer:
    return lambda head, data: (status, json.dumps({"error": text}).encode(), {})


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 3 with a smoke request of two users, of which the first one's answer is that of `tensors`."""
    root = tmp_path_factory.mktemp("repository")
    directory = root / "hsnn_retrieve" / "3"
    directory.mkdir(parents=True)
    np.savez(
        directory / "smoke.npz",
        item_ids=np.repeat(ITEMS, 2, axis=0),
        probabilities=np.repeat(PROBABILITIES, 2, axis=0),
        **{"user.age": np.array([[1.5], [2.5]], np.float32), "user.seen": np.array([[7, 8], [9, 10]])},
    )
    (directory / "manifest.json").write_text('{"log_position": 1}')
    (root / "hsnn_retrieve" / "config.pbtxt").write_text(
        'parameters {\n  key: "item_log"\n  value {\n    string_value: "own/log.db"\n  }\n}\n'
    )
    return root


def test_a_healthy_server_is_asked_the_first_users_smoke_request(server: Server, repository: Path) -> None:
    asked: list[tuple[dict[str, Any], bytes]] = []

    def answer(head: dict[str, Any], data: bytes) -> tuple[int, bytes, dict[str, str]]:
        asked.append((head, data))
        return tensors()

    server.answer = answer
    verdict = probe(server.url, repository, 2.0)
    assert verdict.state == HEALTHY and verdict.alive
    assert verdict.reason == "version 3 answers 4 items, 4 of them as at its export"
    [(head, data)] = asked
    shapes = {i["name"]: (i["datatype"], i["shape"]) for i in head["inputs"]}
    assert shapes == {"age": ("FP32", [1, 1]), "seen": ("INT64", [1, 2])}
    assert data == np.array([1.5], np.float32).tobytes() + np.array([7, 8]).tobytes()
    assert 0 < head["parameters"]["timeout"] <= 2_000_000, "the server must know how long the probe waits"


@pytest.mark.parametrize(
    ("status", "text", "state"),
    [
        (503, "QueueFull: 4 requests are running and 64 are waiting", BUSY),
        (503, "DeadlineUnmeetable: the request has 3.1 ms left", BUSY),
        (499, "DeadlineExceeded: the request took 1000 ms", BUSY),
        (500, "Stub process 'hsnn_retrieve_0_0' is not healthy.", DEAD),
        (500, "ServerError: hsnn_scorer_l2 version 3 failed: Stub process is not healthy", DEAD),
        (404, "Request for unknown model: 'hsnn_retrieve' is not found", DEAD),
    ],
)
def test_a_refusal_is_not_a_death(
    server: Server, repository: Path, status: int, text: str, state: str
) -> None:
    server.answer = refusal(status, text)
    verdict = probe(server.url, repository)
    assert verdict.state == state and text in verdict.reason
    assert verdict.alive == (state == BUSY)


def test_an_item_writer_whose_process_died_is_a_dead_server(server: Server, repository: Path) -> None:
    asked: list[dict[str, Any]] = []

    def answer(head: dict[str, Any], data: bytes) -> tuple[int, bytes, dict[str, str]]:
        asked.append(head)
        return 500, b'{"error":"Stub process \'hsnn_index_0_0\' is not healthy."}', {}

    server.writer = answer
    assert probe(server.url, repository).state == HEALTHY and not asked, "only who restarts it asks"
    verdict = probe(server.url, repository, writer=True)
    assert verdict.state == DEAD
    assert verdict.reason == (
        "the process of hsnn_index has died: Stub process 'hsnn_index_0_0' is not healthy."
    )
    [head] = asked
    assert head["inputs"] == [{"name": "updates", "datatype": "BYTES", "shape": [0], "data": []}]
    server.answer = refusal(503, "QueueFull: full")
    assert probe(server.url, repository, writer=True).state == BUSY, "an overload is no time for a restart"


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (404, "Request for unknown model: 'hsnn_index' is not found"),
        (500, "LogError: .items/log.db: can't be written (database or disk is full)"),
        (500, "in ensemble, Stub process is healthy again"),
    ],
)
def test_a_restart_would_not_help_an_item_writer_that_refuses(
    server: Server, repository: Path, status: int, text: str
) -> None:
    server.writer = refusal(status, text)
    assert probe(server.url, repository, writer=True).state == HEALTHY


def test_an_item_writer_at_a_long_batch_is_not_dead(server: Server, repository: Path) -> None:
    server.writer = lambda head, data: (time.sleep(0.6), tensors())[1]
    verdict = probe(server.url, repository, 0.3, writer=True)
    assert verdict.state == HEALTHY and verdict.seconds < 0.5


def test_another_programs_server_raises_nothing(server: Server, repository: Path) -> None:
    server.versions = ["one"]
    verdict = probe(server.url, repository)
    assert verdict.state == WRONG and "is not the hsnn_retrieve of" in verdict.reason


def test_it_takes_no_longer_than_it_is_given(server: Server, repository: Path) -> None:
    def slow(head: dict[str, Any], data: bytes) -> tuple[int, bytes, dict[str, str]]:
        time.sleep(0.5)
        return tensors()

    server.answer = slow
    verdict = probe(server.url, repository, 0.2)
    assert (verdict.state, verdict.reason) == (DEAD, "no answer within 0.2 s")
    assert 0.15 < verdict.seconds < 0.4


def test_nobody_there_and_nothing_loaded(server: Server, repository: Path, tmp_path: Path) -> None:
    assert "nobody answers at 127.0.0.1:1" in probe("http://127.0.0.1:1", repository).reason
    for url in ("grpc://127.0.0.1:1", "127.0.0.1:http"):
        assert f"{url}: expected http://host:port" in probe(url, repository).reason
    assert "expected --repository to be the one that is served" in probe(server.url, tmp_path).reason
    server.versions = []
    assert probe(server.url, repository).reason == "no version of hsnn_retrieve is loaded"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda: tensors(probabilities=PROBABILITIES[:, ::-1]), "items that are no ranking"),
        (lambda: tensors(probabilities=PROBABILITIES * np.float32("nan")), "items that are no ranking"),
        (lambda: tensors(items=np.full((1, 4), 11, np.int64)), "items that are no ranking"),
        (lambda: tensors(probabilities=PROBABILITIES / 2), "answers 0 of 4 items with the probabilities"),
        (lambda: (200, b"{}", {}), "the answer is not one of hsnn_retrieve"),
        (
            lambda: (200, json.dumps({"outputs": 7}).encode(), {"Inference-Header-Content-Length": "14"}),
            "answer is not",
        ),
    ],
)
def test_a_wrong_answer_is_said_and_no_reason_to_restart(
    server: Server, repository: Path, answer: Callable[[], Any], text: str
) -> None:
    server.answer = lambda head, data: answer()
    verdict = probe(server.url, repository)
    assert verdict.state == WRONG and verdict.alive and text in verdict.reason


def test_other_items_than_at_the_export_are_no_fault(server: Server, repository: Path) -> None:
    """A request without context gets the items that are open to all, the export's answer has all."""
    server.answer = lambda head, data: tensors(items=ITEMS + 100)
    assert probe(server.url, repository).state == HEALTHY
    server.answer = lambda head, data: tensors(valid=0)
    assert probe(server.url, repository).state == HEALTHY


def test_items_may_change_after_the_export(server: Server, repository: Path) -> None:
    server.answer = lambda head, data: tensors(probabilities=PROBABILITIES / 2)
    log = ItemLog.open(repository / "own" / "log.db", "hash")
    try:
        log.append([Update(11, 1, deleted=True)])
        assert probe(server.url, repository).state == WRONG, "the snapshot contains this one"
        log.append([Update(11, 2, deleted=True)])
        assert probe(server.url, repository).state == HEALTHY
    finally:
        log.close()


def test_the_command_and_the_file_alone(server: Server, repository: Path, capsys: Any) -> None:
    arguments = ["--url", server.url, "--repository", str(repository)]
    assert main(["health", *arguments]) == 0
    assert re.fullmatch(r"healthy: version 3 answers .* \(\d+ ms\)\n", capsys.readouterr().out)
    server.answer = refusal(503, "QueueFull: full")
    assert main(["health", *arguments]) == 1
    assert main(["health", *arguments, "--live"]) == main(["health", *arguments, "--ready"]) == 0
    server.answer = lambda head, data: tensors(probabilities=PROBABILITIES[:, ::-1])
    assert main(["health", *arguments, "--live"]) == 0, "a restart would load the same files"
    assert main(["health", *arguments, "--ready"]) == 1, "it would go on answering wrongly"
    server.writer = refusal(500, "Stub process 'hsnn_index_0_0' is not healthy.")
    assert main(["health", *arguments, "--live"]) == 1
    capsys.readouterr()
    server.answer = refusal(500, "Stub process 'hsnn_retrieve_0_0' is not healthy.")
    ended = subprocess.run(
        [sys.executable, "-I", "-S", module.__file__, *arguments, "--live"], capture_output=True, text=True
    )
    assert ended.returncode == 1 and ended.stdout.startswith("dead: HTTP 500: Stub process"), ended


def test_who_is_busy_for_minutes_and_answers_nobody_hangs(
    server: Server, repository: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, now = tmp_path / "busy", [1000.0]
    options = argparse.ArgumentParser()
    module.add_arguments(options)
    given = options.parse_args(
        ["--url", server.url, "--repository", str(repository), "--live", "--busy-since", str(memory),
         "--metrics-url", server.url, "--timeout", "1e6"]
    )  # fmt: skip
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def after(seconds: float) -> int:
        now[0] += seconds
        return module.run(given)

    server.answer = refusal(503, "QueueFull: full")
    assert [after(0), after(299), after(1), after(3)] == [0, 0, 1, 1]
    said = capsys.readouterr().out.splitlines()[-2]
    assert said.startswith(
        "dead: it has refused for 300 s and answered nobody in them; it refused the smoke request"
    )
    server.metrics = server.metrics.replace(" 41.0", " 42.0")
    assert after(1) == 0, "somebody was answered: an overload, however long"
    assert [after(299), after(1)] == [0, 1]
    full, server.metrics = server.metrics, ""
    assert after(1) == 0, "without the number it is not known"
    server.metrics = full
    assert after(1) == 1
    server.answer = lambda head, data: tensors()
    assert after(1) == 0 and not memory.exists()
    server.answer = refusal(503, "QueueFull: full")
    memory.write_text("not what was written")
    assert [after(0), after(299)] == [0, 0]
    now[0] = 5.0
    assert after(0) == 0, "another machine's clock, or it has been booted since"
    assert memory.read_text() == "5.0 42"
    given.busy_since = tmp_path / "nowhere" / "busy"
    assert [after(0), after(400)] == [0, 0]


@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int64, np.int32]),
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=5),
        elements={"allow_nan": False, "allow_infinity": False},
    )
)
def test_npy_files_are_read_as_numpy_reads_them(array: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, array)
    read = module._array(file.getvalue())
    assert read.shape == array.shape and read.data == array.tobytes()
    assert read.first() == tuple(array[0].ravel().tolist())
