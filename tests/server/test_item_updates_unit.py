"""hsnn_index's own logic without a server: who may write, and what becomes of a call that cannot be written."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_pb_utils
import numpy as np
import pytest
from index_repository import ELIGIBLE, write_index

from export.vendor import INDEX_SOURCES
from hsnn_core.errors import LogError, RequestError
from hsnn_core.item_log import ItemLog, LogReader
from hsnn_core.item_updates import APPLIED, FAILED, REFUSED, STALE

sys.path.append(str(INDEX_SOURCES))

from log_owner import LogOwner, this_server
from updater import Updater

OURS = {"host": "a", "server": 1, "started": 10}
THEIRS = {"host": "b", "server": 1, "started": 11}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def updater(path: Path) -> Iterator[Updater]:
    updater = Updater(path, ELIGIBLE, clock=lambda: 1000.0)
    yield updater
    updater.close()


def texts(*updates: dict[str, Any]) -> list[bytes]:
    return [json.dumps(update).encode() for update in updates]


def test_a_server_is_told_from_its_successor() -> None:
    server = this_server()
    assert server == this_server()
    assert server["server"] == os.getppid()
    assert server["started"] > 0


def test_processes_of_one_server_own_a_log_together(path: Path) -> None:
    first, second = LogOwner.claim(path, OURS), LogOwner.claim(path, OURS)
    first.release()
    with pytest.raises(
        LogError, match="another server, process 1 on a, writes to this log; stop it, or give each"
    ):
        LogOwner.claim(path, THEIRS)
    second.release()
    LogOwner.claim(path, THEIRS).release()
    LogOwner.claim(path, OURS).release()


def _claim_and_wait(path: Path, ready: Any) -> None:
    held = LogOwner.claim(path, THEIRS)
    ready.set()
    signal.pause()
    held.release()


def test_the_dead_own_nothing(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_claim_and_wait, args=(path, ready))
    process.start()
    assert ready.wait(20)
    with pytest.raises(LogError, match="process 1 on b"):
        LogOwner.claim(path, OURS)
    process.kill()
    process.join()
    LogOwner.claim(path, OURS).release()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LogError, match=r"log\.db\.owner: cannot be written .*hsnn publish --item-log"):
        LogOwner.claim(tmp_path / "file" / "log.db", OURS)


def test_a_call_by_hand(updater: Updater, path: Path) -> None:
    outcome = updater.apply(
        texts(
            {"id": 1, "sequence": 5},
            {"id": 1, "sequence": 4},
            {"id": "x", "sequence": 4},
            {"id": 2, "sequence": 1},
        )
    )
    assert outcome.status == [APPLIED, STALE, REFUSED, APPLIED]
    assert outcome.position == 2
    assert updater.apply([]).position == 2
    assert updater.stats() | {"identity": None} == {
        "log": str(path),
        "identity": None,
        "schema_hash": ELIGIBLE.hash,
        "position": 2,
        "oldest": 0,
        "live": 2,
        "deleted": 0,
    }


def test_a_clock_may_be_a_little_off(updater: Updater) -> None:
    for seconds in (701, 1299):
        assert updater.apply(texts({"id": seconds, "sequence": 1}), seconds * 10**6).status == [APPLIED]
    for seconds, text in ((699, "301 s behind"), (1301, "301 s ahead of")):
        with pytest.raises(
            RequestError, match=f"the client's is {text} this server's.*set it right, or send seq"
        ):
            updater.apply(texts({"id": 1, "sequence": 1}), seconds * 10**6)


def test_a_full_disk_refuses_the_call_and_the_next_one_goes_on(updater: Updater, path: Path) -> None:
    assert updater.apply(texts({"id": 1, "sequence": 1})).position == 1
    log = updater._log
    assert isinstance(log, ItemLog)
    (pages,) = log._connection.execute("PRAGMA page_count").fetchone()
    log._connection.execute(f"PRAGMA max_page_count = {pages}")
    many = texts(*({"id": n, "sequence": 2, "features": {"category": list(range(50))}} for n in range(100)))
    full = updater.apply([*many, b"?"])
    assert full.status == [FAILED] * 100 + [REFUSED]
    assert full.position == 1
    assert {message.partition("(")[0] for message in full.messages[:100]} == {f"{path}: no room on the disk "}
    assert full.messages[100].startswith("update: not valid JSON")
    with LogReader(path, ELIGIBLE.hash) as reader:
        assert [entry.sequence for entry in reader.since(0, 1000)] == [1]
    log._connection.execute(f"PRAGMA max_page_count = {pages + 1000}")
    assert updater.apply(many).status == [APPLIED] * 100


class Index:
    """hsnn_index's model.py, loaded over a fake server; ``lines``: what it logs, read by closing it."""

    def __init__(self, module: ModuleType, pb_utils: ModuleType, config: dict[str, Any]) -> None:
        self.pb_utils, self.text = pb_utils, ""
        self.model = module.TritonPythonModel()
        self.model.initialize(
            {"model_config": json.dumps(config), "model_name": "hsnn_index", "model_version": "1"}
        )
        self.model._log._write = self._write

    def _write(self, text: str) -> None:
        self.text += text

    def send(self, *updates: Any, **parameters: Any) -> fake_pb_utils.InferenceResponse:
        sent = np.array([json.dumps(update).encode() for update in updates], np.object_)
        outputs = ("status", "message", "position")
        request = fake_pb_utils.Request({"updates": sent}, outputs, 0, **parameters)
        (answer,) = self.model.execute([request])
        assert isinstance(answer, fake_pb_utils.InferenceResponse)
        return answer

    def lines(self) -> list[dict[str, Any]]:
        self.model.finalize()
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    pb_utils = fake_pb_utils.make(lambda request: fake_pb_utils.InferenceResponse())
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb_utils)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("hsnn_index_model", INDEX_SOURCES / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", write_index(tmp_path, 1))
    monkeypatch.setattr(module, "_check_own_core", lambda: None)  # tests have the source tree's
    facts = {"schema_hash": ELIGIBLE.hash, "item_log": ".items/log.db"}
    return Index(module, pb_utils, {"parameters": {name: {"string_value": v} for name, v in facts.items()}})


def test_refused_updates_are_logged_without_what_they_hold(index: Index) -> None:
    index.send({"id": 1, "sequence": 1}, {"id": 1, "sequence": 1})
    secret = {"id": 770_123_456_077, "sequence": 1, "features": {"price": "secret 31.25"}}
    assert index.send(secret, {"id": "x"}, {"id": 3, "sequence": 1}).tensors["status"].tolist() == [2, 2, 0]
    index.send({"id": 4, "sequence": 1, "features": {"price": [[1], "secret", [2, 3]]}})
    index.send({"id": 5, "sequence": 1, "eligibility": {"paused": "secret"}})
    lines = index.lines()
    assert len(lines) == 3, "what is applied or stale is nothing to log"
    assert "31.25" not in index.text and "secret" not in index.text and "770123456077" not in index.text
    first = lines[0]
    assert first.pop("time").endswith("+00:00")
    assert 0 <= first.pop("seconds") < 10
    assert first == {
        "level": "warning",
        "event": "updates",
        "outcome": "refused",
        "code": "OK",
        "error": "FeatureError",
        "message": "item #: feature 'price': not as expected",
        "updates": 3,
        "refused": 2,
        "failed": 0,
        "request_id": "ad-17",
        "trace_id": None,
        "model": "hsnn_index",
        "version": 1,
    }


def test_updates_that_cannot_be_written_and_calls_that_are_refused_are_logged(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise LogError("/items/log.db: no room on the disk (database or disk is full)")

    assert index.send({"id": 1}, clok=1).has_error()
    monkeypatch.setattr(index.model._updater, "_opened", full)
    assert index.send({"id": 1, "sequence": 1}, {"id": "x"}).tensors["status"].tolist() == [3, 2]
    monkeypatch.setattr(index.model._updater, "apply", lambda *_: {}["secret 31.25"])
    assert index.send({"id": 1}).has_error()
    invalid, failed, error = index.lines()
    assert (invalid["outcome"], invalid["code"], invalid["updates"]) == ("invalid", "INVALID_ARGUMENT", None)
    assert invalid["message"].startswith("unknown request parameters ['clok']")
    assert (failed["level"], failed["outcome"], failed["code"]) == ("error", "failed", "OK")
    assert (failed["updates"], failed["refused"], failed["failed"]) == (2, 1, 1)
    assert failed["message"] == "/items/log.db: no room on the disk (database or disk is full)"
    assert (error["outcome"], error["code"], error["error"]) == ("error", "INTERNAL", "KeyError")
    counts = {
        m.labels["outcome"]: m.value for m in index.pb_utils.MetricFamily.made["hsnn_item_updates_total"]
    }
    assert counts == {"applied": 0, "stale": 0, "refused": 1, "failed": 1}
    assert "KeyError" in index.pb_utils.Logger.lines[-1], "the unexpected is in the server's log"


def test_a_call_whose_id_is_no_text_is_answered_and_logged_without_it(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_text(_: Any) -> str:
        raise UnicodeDecodeError("utf-8", b"\x80", 0, 1, "invalid start byte")

    monkeypatch.setattr(fake_pb_utils.Request, "request_id", no_text)
    assert index.send({"id": "x"}, {"id": 1, "sequence": 1}).tensors["status"].tolist() == [2, 0]
    (line,) = index.lines()
    assert line["request_id"] == ""


def test_of_many_bad_calls_some_are_logged(index: Index) -> None:
    for _ in range(30):
        index.send({"id": "x"})
    *lines, rest = index.lines()
    assert len(lines) == 10
    assert (rest["event"], rest["count"]) == ("suppressed", 20)
