"""hsnn_index's own logic without a server: who may write, and what becomes of a call that cannot be written."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from index_repository import ELIGIBLE

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
