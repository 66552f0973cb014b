"""hsnn rollout on a real Triton, step by step, while clients ask."""

import asyncio
import json
import re
import threading
import time

import pytest

from clients.aio import AsyncRetrievalClient
from clients.retrieval import Canary, RetrievalClient
from export.publish import publish
from export.rollout import promote
from hsnn_cli.main import main
from hsnn_server.triton import TritonServer

pytestmark = pytest.mark.triton


class Load:
    """Clients that ask all the time, one of which follows the canary; `versions`: who answered them."""

    def __init__(self, url):
        self.url, self.stop = url, threading.Event()
        self.failures, self.versions = [], {"plain": set(), "follows": set()}
        follows = Canary(look_every=0.2)
        self.threads = [
            threading.Thread(target=self._ask, args=arguments) for arguments in (("plain", None), ("follows", follows))
        ]  # fmt: skip

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def _ask(self, name, canary):
        with RetrievalClient(self.url, timeout=20, canary=canary) as client:
            while not self.stop.is_set():
                try:
                    self.versions[name].add(client.retrieve([{"age": 20}], k=5).version)
                except Exception as error:
                    self.failures.append(repr(error))

    def answered_by(self, name, version):
        self.versions[name].clear()
        until = time.monotonic() + 20
        while version not in self.versions[name]:
            assert time.monotonic() < until, (self.versions, self.failures)
            time.sleep(0.05)
        self.versions[name].clear()
        time.sleep(0.5)
        return self.versions[name]


async def shadowed(url):
    async with AsyncRetrievalClient(url, timeout=20, canary=Canary(share=1.0, shadow=True)) as client:
        versions = set()
        for _ in range(50):
            versions.add((await client.retrieve([{"age": 20}], k=5)).version)
            await asyncio.sleep(0.02)
        return versions, client.split.switch.comparison.figures()


def test_every_step_and_back(shop, tmp_path, capsys):
    repository = tmp_path / "repository"
    assert publish(shop / "run", repository) == 1
    with TritonServer(repository) as server:
        promote(repository, server.admin)
        given = [
            "--repository",
            str(repository),
            "--url",
            server.urls.grpc,
            "--key-file",
            str(server.key_file),
        ]

        def step(name, *options):
            return main(["rollout", name, *options, *given])

        def status():
            capsys.readouterr()
            assert step("status", "--json") == 0
            rows = json.loads(capsys.readouterr().out)
            return {row["version"]: (row["disk"], row["orchestrator"], row["canary"]) for row in rows}

        with Load(server.urls.grpc) as load:
            assert step("publish", str(shop / "run")) == 0
            assert status() == {1: ("complete", "READY", ""), 2: ("candidate", "", "")}
            assert step("canary", "--share", "1", "--watch", "3") == 0
            assert "share of the other's top k" in capsys.readouterr().out
            assert status()[2] == ("candidate", "", "READY")
            assert load.answered_by("follows", "2") == {"2"}
            assert load.answered_by("plain", "1") == {"1"}
            versions, figures = asyncio.run(shadowed(server.urls.grpc))
            assert versions == {"1"}
            assert figures.requests > 5 and figures.failed == 0 and figures.overlap == 1.0

            metrics = ["--metrics-url", server.urls.metrics]
            assert (
                step("canary", "--share", "1", "--watch", "9", "--max-latency-ratio", "0.01", *metrics) == 1
            )
            assert (
                "allowed are 0.01; the canary has ended, the candidate stays on disk"
                in capsys.readouterr().err
            )
            assert load.answered_by("follows", "1") == {"1"}
            assert status()[2][:2] == ("candidate", "")

            assert step("promote") == 0
            assert load.answered_by("plain", "2") == {"2"}
            assert step("publish", str(shop / "run")) == 0
            assert step("promote", "--watch", "4", "--max-latency-ratio", "0.01") == 1
            assert "it is rolled back, snapshot 2 serves" in capsys.readouterr().err
            assert load.answered_by("plain", "2") == {"2"}
            assert step("rollback") == 0
            assert load.answered_by("follows", "1") == {"1"}
            assert step("retire", "--keep", "1") == 0
            assert "removed: 2, 3" in capsys.readouterr().out
            assert status()[1] == ("complete", "READY", "")
        assert load.failures == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["status"], "hsnn rollout status: got neither --server nor --repository with --url"),
        (
            ["status", "--repository", "x", "--url", "127.0.0.1:9", "--key-file", "nowhere"],
            "--key-file: .*nowhere",
        ),
        (["status", "--repository", "x", "--url", "127.0.0.1:9"], "127.0.0.1:9: can't list the models"),
        (["status", "--server", "nowhere.json"], "nowhere.json: no such file"),
        (["publish", "x", "--repository", "x", "--url", "127.0.0.1:9"], "no server answers there"),
    ],
)
def test_what_is_missing_is_named(arguments, text, capsys):
    assert main(["rollout", *arguments]) == 1
    assert re.search(text, capsys.readouterr().err)


def test_requests_of_a_file(tmp_path):
    from hsnn_cli.commands_rollout import _requests
    from hsnn_core.errors import RequestError

    file = tmp_path / "users.jsonl"
    file.write_text('{"age": 3}\n\n{}\n')
    assert _requests(str(file), tmp_path, 1) == [[{"age": 3}], [{}]]
    for text in ("[1]\n", "{", ""):
        file.write_text(text)
        with pytest.raises(RequestError, match=r"--requests .*users\.jsonl: .*JSON in each line"):
            _requests(str(file), tmp_path, 1)
