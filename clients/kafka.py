"""Item updates from a Kafka topic to a server, at least once: offsets are committed once they are on its disk."""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from confluent_kafka import OFFSET_INVALID, Consumer, KafkaError, KafkaException, Message, TopicPartition

from hsnn_core.errors import DeadlineExceeded, ServerError
from hsnn_core.item_updates import FAILED, REFUSED

from .items import ItemClient, ItemResults

POLL_SECONDS = 0.5
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # between attempts while the server cannot take the updates


@dataclass
class FollowCounts:
    """Messages so far: updates by what became of them, and ``bad``: no update or not a valid one."""

    applied: int = 0
    stale: int = 0
    bad: int = 0

    def __str__(self) -> str:
        return f"{self.applied:,} applied, {self.stale:,} stale, {self.bad:,} bad"


class DeadLetters:
    """Where bad messages go: a file of JSON lines (topic, partition, offset, reason, value), or standard error.

    A message is on the disk when `add` returns; ``value`` is text, or {"base64": ...} where it is no UTF-8."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("a", encoding="utf-8")

    def add(self, bad: list[tuple[Message, str]]) -> None:
        """Keep messages with the reason of each."""
        for message, reason in bad:
            place = {"topic": message.topic(), "partition": message.partition(), "offset": message.offset()}
            if self._file is None:
                print(
                    f"bad message {place['topic']}[{place['partition']}] at offset {place['offset']}: {reason}",
                    file=sys.stderr,
                )
            else:
                line = json.dumps(place | {"reason": reason, "value": _text(message.value())})
                self._file.write(line + "\n")
        if self._file is not None and bad:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class KafkaFollower:
    """Follows ``topic`` as a member of ``group``, until it is told to stop; a context manager.

    ``options``: librdkafka's, at least bootstrap.servers. Every server has a log of its own, so every server needs a
    follower with a group of its own; followers of one group share the topic's partitions between them. A group that
    is new begins with the topic's oldest message.

    A message is an update in JSON and must have a sequence number, as it may come twice. Bad messages go to
    ``dead_letters``. While the server cannot be reached or cannot write, the follower waits and tries again; ``tell``
    is called with the reason.
    """

    def __init__(
        self,
        client: ItemClient,
        topic: str,
        group: str,
        options: Mapping[str, Any],
        dead_letters: DeadLetters,
        batch: int,
        tell: Callable[[str], object] = lambda reason: None,
    ) -> None:
        self._client, self._topic, self._batch, self._tell = client, topic, batch, tell
        self._dead_letters = dead_letters
        self._held: list[Message] = []
        self._at_end: set[int | None] = set()  # partitions whose end was seen
        self.counts = FollowCounts()
        ours = {"group.id": group, "enable.auto.commit": False, "enable.partition.eof": True,
                "error_cb": lambda error: tell(error.str())}  # fmt: skip
        try:
            self._consumer = Consumer({"auto.offset.reset": "earliest"} | dict(options) | ours)
        except KafkaException as error:
            raise ServerError(f"Kafka: {error.args[0].str()}; check --brokers and --option") from error
        self._consumer.subscribe([topic])

    def follow(
        self,
        stopped: Callable[[], bool],
        progress: Callable[[int], object] = lambda count: None,
        caught_up: Callable[[], object] = lambda: None,
    ) -> None:
        """Apply messages until ``stopped`` says so; it is asked at least every second. ``progress`` is called with the
        number of messages that were just done, ``caught_up`` once: when the end of all its partitions was seen, and
        what came before is on the server's disk. Raises ServerError when the topic cannot be read, and what the client
        raises for a call that is wrong in itself."""
        behind = True
        while not stopped():
            messages = self._received()
            if messages:
                if not self._done(messages, stopped):
                    continue
                progress(len(messages))
            if behind and not self._held and self._seen_to_the_end():
                behind = False
                caught_up()

    def lag(self) -> int | None:
        """Messages of its partitions that it has not read yet, as far as it knows."""
        total = 0
        try:
            for place in self._consumer.position(self._consumer.assignment()):
                _, high = self._consumer.get_watermark_offsets(place, cached=True)
                if place.offset < 0 or high == OFFSET_INVALID:
                    return None
                total += max(0, high - place.offset)
        except KafkaException:
            return None
        return total

    def close(self) -> None:
        """Leave the group."""
        self._consumer.close()

    def __enter__(self) -> KafkaFollower:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _seen_to_the_end(self) -> bool:
        mine = {place.partition for place in self._consumer.assignment()}
        return bool(mine) and mine <= self._at_end

    def _received(self) -> list[Message]:
        messages, self._held = self._held, []
        for message in self._consumer.consume(self._batch, POLL_SECONDS):
            error = message.error()
            if error is None:
                messages.append(message)
            elif error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART or error.fatal():
                raise ServerError(
                    f"Kafka: {self._topic} cannot be read: {error.str()}; check --topic and --brokers"
                )
            elif error.code() == KafkaError._PARTITION_EOF:
                self._at_end.add(message.partition())
            else:
                self._tell(error.str())
        return messages

    def _done(self, messages: list[Message], stopped: Callable[[], bool]) -> bool:
        """Apply and commit; False when it was told to stop before that succeeded."""
        bad: list[tuple[Message, str]] = []
        rows: list[tuple[Message, Any]] = []
        for message in messages:
            row, reason = _row(message.value())
            if reason:
                bad.append((message, reason))
            else:
                rows.append((message, row))
        results = self._applied([row for _, row in rows], stopped)
        if results is None:
            return False
        bad += [(rows[place][0], reason) for place, reason in results.reasons(REFUSED)]
        self._dead_letters.add(bad)
        self._commit(messages)
        self.counts.applied += results.count("applied")
        self.counts.stale += results.count("stale")
        self.counts.bad += len(bad)
        return True

    def _applied(self, rows: list[Any], stopped: Callable[[], bool]) -> ItemResults | None:
        """Send until the server has all that is valid on its disk. Meanwhile the partitions are paused and the broker
        goes on hearing of this member, so that a long wait does not cost it its place in the group."""
        pause, paused = FIRST_PAUSE, False
        try:
            while True:
                try:
                    results = self._client.upsert(rows)
                    failures = results.reasons(FAILED)
                    if not failures:
                        return results
                    reason = failures[0][1]
                except (ServerError, DeadlineExceeded) as error:
                    reason = str(error)
                self._tell(f"{reason}; {len(rows)} messages wait, next attempt in {pause:g} s")
                paused = True
                until = time.monotonic() + pause
                while time.monotonic() < until:
                    if stopped():
                        return None
                    self._consumer.pause(self._consumer.assignment())
                    # Of a partition that was just assigned, or that was being fetched.
                    if (message := self._consumer.poll(0.1)) is None:
                        continue
                    if (condition := message.error()) is None:
                        self._held.append(message)
                    elif condition.code() == KafkaError._PARTITION_EOF:
                        self._at_end.add(message.partition())
                pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            if paused:
                self._consumer.resume(self._consumer.assignment())

    def _commit(self, messages: list[Message]) -> None:
        after: dict[int, int] = {}
        for message in messages:
            partition, offset = int(message.partition() or 0), int(message.offset() or 0)
            after[partition] = max(offset + 1, after.get(partition, 0))
        places = [TopicPartition(self._topic, partition, offset) for partition, offset in after.items()]
        try:
            self._consumer.commit(offsets=places, asynchronous=False)
        except KafkaException as error:
            # The partitions are another member's by now, or the broker is away: they will come again, and be stale.
            self._tell(f"offsets were not committed: {error.args[0].str()}; the messages will come again")


def _row(value: bytes | None) -> tuple[Any, str]:
    """The update in a message, or why it is none."""
    if value is None:
        return (
            None,
            'empty, expected an update in JSON; a delete is {"id": ..., "sequence": ..., "deleted": true}',
        )
    try:
        row = json.loads(value)
    except (ValueError, RecursionError) as error:
        return None, f"not valid JSON ({error}), expected an update"
    if not isinstance(row, Mapping):
        return None, f"got {str(row)[:80]}, expected an update as an object with id, sequence and features"
    if row.get("sequence") is None:
        return (
            None,
            "sequence: missing; a message may come twice, so each needs a number that grows with every update",
        )
    return row, ""


def _text(value: bytes | None) -> Any:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}
