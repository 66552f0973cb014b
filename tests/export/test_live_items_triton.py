"""Items that change under a running server: found at once, gone at once, and still so after a crash and a rollout."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clients.items import ItemClient
from clients.retrieval import RetrievalClient
from export.compaction import Compactor, compact
from export.exported import Exported
from export.pbtxt import ServingOptions
from export.publish import publish
from export.rollout import promote
from export.signing import check_signature
from hsnn_core.errors import RequestError
from hsnn_server.triton import TritonServer

pytestmark = pytest.mark.triton

USER = {"age": 31.0, "history": [100, 117, 5000]}


@pytest.fixture
def repository(exported: Exported, tmp_path: Path) -> Path:
    publish(exported.path, tmp_path / "repository", options=ServingOptions(mode="in_process", workers=2))
    return tmp_path / "repository"


@pytest.fixture
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository) as running:
        promote(repository, running.admin)
        yield running


def found(server: TritonServer, after: int | None = None) -> set[int]:
    with RetrievalClient(server.urls.grpc, timeout=5.0) as client:
        return {hit.item_id for hit in client.retrieve([USER], k=50, widths=[4, 8], after=after)[0]}


def metric(server: TritonServer, name: str, label: str = "") -> float:
    text = urllib.request.urlopen(f"http://{server.urls.metrics}/metrics", timeout=5).read().decode()
    lines = (line for line in text.splitlines() if line.startswith(f"{name}{{") and label in line)
    return float(next(lines).split()[-1])


def eventually(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.02)


def test_items_come_and_go_and_outlive_the_server_and_its_version(
    server: TritonServer, repository: Path, exported: Exported, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    base = set(range(100, 120))
    assert len(found(server)) == 50  # of 60, the most that may be asked for
    with ItemClient(server.urls.grpc) as items:
        items.delete(range(120, 160))
        eventually(lambda: found(server) == base)
        results = items.upsert([{"id": n, "features": {"category": [3], "price": 5.0}} for n in (5000, 5001)])
        assert results.status == ["applied"] * 2
        # A request may ask to see what was acknowledged.
        assert found(server, after=results.position) == base | {5000, 5001}
        with pytest.raises(
            RequestError, match=r"after: got position \d+ of the item log, but this server knows it up"
        ):
            found(server, after=results.position + 1000)
        eventually(lambda: found(server) == base | {5000, 5001})
        items.delete([100, 5001])
        eventually(lambda: found(server) == base - {100} | {5000})
        # Added 5000 and 5001; gone are 40 at first, then 100 and 5001.
        eventually(
            lambda: metric(server, "hsnn_items") == 20 and metric(server, "hsnn_items_changed") == 2 + 42
        )

        # The snapshot that contains the updates takes over, and finds what came after it was made.
        compact(exported.path, repository / ".items" / "log.db", tmp_path / "next", progress=False)
        items.upsert([{"id": 5002, "features": {"category": [3], "price": 5.0}}])
        publish(tmp_path / "next", repository)
        promote(repository, server.admin)
        expected = base - {100} | {5000, 5002}
        assert found(server) == expected

        # In the background: what came since goes into the next snapshot, made of the one before.
        compactor = Compactor(
            exported.path, repository, repository / ".items" / "log.db", tmp_path / "all", sign_key=keys[0]
        )
        items.upsert([{"id": 5003, "features": {"category": [3], "price": 5.0}}])
        first = compactor.pending()
        assert compactor.compact(server.admin, progress=False) == 3
        assert (first, compactor.pending()) == (first, 0)
        items.delete([5003])
        assert compactor.pending() == 1
        assert compactor.compact(server.admin, progress=False) == 4
        assert len(list((tmp_path / "all").iterdir())) == 1
        check_signature(repository, 4, keys[1])
        assert found(server) == expected
        eventually(lambda: metric(server, "hsnn_items_changed", 'version="4"') == 0)

    # What was acknowledged survives a killed server.
    pid = server.pid
    os.kill(pid, signal.SIGKILL)
    server.stop()
    with TritonServer(repository) as again:
        promote(repository, again.admin)
        assert found(again) == expected
