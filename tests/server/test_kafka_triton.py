"""Item updates from Kafka (librdkafka's built-in mock cluster) to a real Triton."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from index_repository import ELIGIBLE, write_index

from clients.items import ItemClient, ItemResults
from clients.kafka import DeadLetters, KafkaFollower
from hsnn_core.errors import RequestError, ServerError
from hsnn_core.item_log import LogReader
from hsnn_server.processes import wait_until
from hsnn_server.triton import TritonServer

ROOT = Path(__file__).parents[2]
# The mock cluster does not hear of members that leave: the next one begins when the last one's session is over. A
# session must be longer than the three seconds that a group waits for its first members.
SESSION = {"session.timeout.ms": 4000, "heartbeat.interval.ms": 500}
BAD = [b"{", b"\xff\xfe", b"[1]", None, b'{"id": 1}', b'{"id": 1, "sequence": -4}']


class Kafka:
    """A mock cluster in this process; every topic has 4 partitions."""

    def __init__(self) -> None:
        self._producer = Producer({"test.mock.num.brokers": 2})
        brokers = self._producer.list_topics(timeout=10).brokers.values()
        self.brokers = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)

    def send(self, topic: str, values: list[bytes | None]) -> None:
        for value in values:
            self._producer.produce(topic, value, key=str(hash(value)))
        assert self._producer.flush(10) == 0

    def committed(self, topic: str, group: str) -> int:
        """The sum of the group's offsets: how many messages it is done with."""
        consumer = Consumer({"bootstrap.servers": self.brokers, "group.id": group})
        places = consumer.committed([TopicPartition(topic, partition) for partition in range(4)], timeout=10)
        consumer.close()
        return sum(max(0, place.offset) for place in places)


@pytest.fixture(scope="module")
def kafka() -> Kafka:
    return Kafka()


def updates(items: range, sequence: int) -> list[bytes | None]:
    return [
        json.dumps({"id": n, "sequence": sequence, "features": {"price": sequence}}).encode() for n in items
    ]


class Server:
    """What an `ItemClient` says, in memory. ``trouble``: what the next calls end in."""

    def __init__(self, *trouble: Exception | str) -> None:
        self.trouble, self.items, self.calls = list(trouble), dict[int, int](), 0

    def upsert(self, rows: list[Any]) -> ItemResults:
        self.calls += 1
        trouble = self.trouble.pop(0) if self.trouble else ""
        if isinstance(trouble, Exception):
            raise trouble
        results = ItemResults()
        for row in rows:
            status = trouble or ("applied" if row["sequence"] >= 0 else "refused")
            results.status.append(status)
            results.messages.append("" if status == "applied" else f"{status}: no")
            if status == "applied":
                self.items[row["id"]] = row["sequence"]
        return results


def follow(
    kafka: Kafka, server: Server, topic: str, folder: Path, done: int = 1 << 30, told: int = 1 << 30
) -> list[str]:
    """Follow until that many messages are done, or that many lines told; what the follower had to say."""
    lines: list[str] = []
    count = 0
    caught_up: list[int] = []
    until = time.monotonic() + 30

    def progress(more: int) -> None:
        nonlocal count
        count += more

    def stopped() -> bool:
        assert time.monotonic() < until, (count, lines)
        return (count >= done and bool(caught_up)) or len(lines) >= told

    letters = DeadLetters(folder / "bad.jsonl")
    options = {"bootstrap.servers": kafka.brokers} | SESSION
    with KafkaFollower(server, topic, topic, options, letters, 50, lines.append) as follower:  # type: ignore[arg-type]
        follower.follow(stopped, progress, lambda: caught_up.append(count))
        counts = follower.counts
        if done < 1 << 30:
            assert follower.lag() == 0
            assert caught_up == [done]
    letters.close()
    assert counts.applied + counts.stale + counts.bad == count
    return lines


def test_bad_messages_are_put_aside_and_offsets_committed(kafka: Kafka, tmp_path: Path) -> None:
    kafka.send("bad", [*updates(range(10, 40), 3), *BAD])
    server = Server()
    follow(kafka, server, "bad", tmp_path, done=36)
    assert server.items == dict.fromkeys(range(10, 40), 3)
    assert kafka.committed("bad", "bad") == 36
    letters = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    reasons = {json.dumps(letter["value"]): letter["reason"] for letter in letters}
    assert len(reasons) == len(BAD)
    for value, reason in (
        ('"{"', "not valid JSON"),
        ('{"base64": "//4="}', "not valid JSON"),
        ('"[1]"', "got [1], expected an update as an object"),
        ("null", "empty, expected an update in JSON"),
        (json.dumps('{"id": 1}'), "sequence: missing; a message may come twice"),
        (json.dumps('{"id": 1, "sequence": -4}'), "refused: no"),
    ):
        assert reasons[value].startswith(reason)
    assert {
        (letter["topic"], letter["partition"] in range(4), letter["offset"] >= 0) for letter in letters
    } == {("bad", True, True)}


def test_bad_messages_are_told_when_nothing_keeps_them(capsys: pytest.CaptureFixture[str]) -> None:
    class Message:
        topic, partition, offset, value = (lambda self, v=v: v for v in ("items", 2, 7, b"{"))  # type: ignore[misc]

    DeadLetters(None).add([(Message(), "not valid JSON")])  # type: ignore[list-item]
    assert capsys.readouterr().err == "bad message items[2] at offset 7: not valid JSON\n"


def test_nothing_is_committed_before_it_is_on_the_disk(kafka: Kafka, tmp_path: Path) -> None:
    """A server that is away, then has a full disk, then works; and one that stays away until the end."""
    kafka.send("trouble", updates(range(20), 1))
    away = ServerError("hsnn_index at h:1 is unavailable")
    told = follow(kafka, Server(*[away] * 9), "trouble", tmp_path, told=2)
    assert told[0].startswith("hsnn_index at h:1 is unavailable; ")
    assert "messages wait, next attempt in 0.5 s" in told[0]
    assert kafka.committed("trouble", "trouble") == 0
    server = Server(away, "failed")
    told = follow(kafka, server, "trouble", tmp_path, done=20)
    assert [line.partition(";")[0] for line in told[:2]] == ["hsnn_index at h:1 is unavailable", "failed: no"]
    assert server.items == dict.fromkeys(range(20), 1)
    assert kafka.committed("trouble", "trouble") == 20


def test_what_is_wrong_in_itself_ends_it(kafka: Kafka, tmp_path: Path) -> None:
    kafka.send("wrong", updates(range(3), 1))
    with pytest.raises(RequestError, match="unknown request parameters"):
        follow(kafka, Server(RequestError("unknown request parameters")), "wrong", tmp_path)
    assert kafka.committed("wrong", "wrong") == 0
    with pytest.raises(
        ServerError, match="Kafka: .*No such configuration property.*check --brokers and --option"
    ):
        KafkaFollower(Server(), "wrong", "g", {"no.such": "1"}, DeadLetters(None), 1)  # type: ignore[arg-type]


@pytest.mark.triton
def test_a_follower_that_is_killed_and_started_again_loses_nothing(kafka: Kafka, tmp_path: Path) -> None:
    """The command itself, killed -9 while messages come; then everything is there, and it stops when told."""
    write_index(tmp_path, 1)
    rng = random.Random(3)
    wanted: dict[int, int] = {}
    with TritonServer(tmp_path, models=["hsnn_index"]) as server:
        command = [
            sys.executable, "-m", "hsnn_cli.main", "items", "follow-kafka", "--brokers", kafka.brokers, "--topic",
            "items", "--group", "host-1", "--url", server.urls.grpc, "--batch", "20",
            "--dead-letters", str(tmp_path / "bad.jsonl"), "--ready-file", str(tmp_path / "caught-up"),
        ]  # fmt: skip
        for name, value in SESSION.items():
            command += ["--option", f"{name}={value}"]
        sent = 0
        for last in (False, True):
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for _ in range(10):
                items = [rng.randrange(200) for _ in range(30)]
                sequence = time.time_ns() // 1000
                values = [v for n in items for v in updates(range(n, n + 1), sequence)]
                kafka.send("items", [*values, b"bad"])
                wanted |= dict.fromkeys(items, sequence)
                sent += len(values) + 1
                time.sleep(0.02)
            if not last:
                done = kafka.committed("items", "host-1")
                assert wait_until(lambda: kafka.committed("items", "host-1") > done, 30)  # noqa: B023
                process.send_signal(signal.SIGKILL)
                process.communicate()
        assert wait_until(lambda: kafka.committed("items", "host-1") == sent, 60)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0, err
        assert "stopped: " in out
        assert "caught up: " in out
        assert (tmp_path / "caught-up").exists()
        with LogReader(tmp_path / ".items" / "log.db", ELIGIBLE.hash) as reader:
            assert {entry.item: entry.sequence for entry in reader.since(0, 10**6)} == wanted
        with ItemClient(server.urls.grpc) as client:
            assert client.stats().live == len(wanted)
    letters = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert len(letters) >= 20
