"""What `hsnn items` does; its arguments are in `commands_items`."""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from tqdm import tqdm

from clients.items import ItemClient, ItemResults
from hsnn_core.errors import DataError, HsnnError, LogError, RequestError
from hsnn_core.item_updates import APPLIED, FAILED, REFUSED, STALE, STATUSES
from hsnn_core.schema import Schema

from .connection import admin_key, tls_of
from .item_files import ItemFile
from .tables import table

SHOWN = 20  # refused updates that are printed


def upsert(options: argparse.Namespace) -> None:
    """hsnn items upsert."""
    with (
        ItemClient(options.url, options.timeout, batch=options.batch, tls=tls_of(options)) as client,
        ItemFile(options.file, client.schema(), options.format) as file,
    ):
        outcome = _apply(client, options, file.updates(), file.total, file.unit, lambda: file.read)
    if file.unused:
        print(f"columns that the schema does not name, not used: {', '.join(sorted(file.unused))}")
    outcome.report("upserted")


def delete(options: argparse.Namespace) -> None:
    """hsnn items delete."""
    if bool(options.ids) == bool(options.file):
        raise RequestError("hsnn items delete: give either --ids or a file of ids (- for standard input)")
    with ItemClient(options.url, options.timeout, batch=options.batch, tls=tls_of(options)) as client:
        schema = client.schema()
        ids = list(_ids(schema, options.ids or _lines(options.file)))
        own = {} if options.sequence is None else {"sequence": options.sequence}
        deletes = ({"id": item, "deleted": True} | own for item in ids)
        outcome = _apply(client, options, deletes, len(ids), " items", None)
    outcome.report("deleted")


def stats(options: argparse.Namespace) -> None:
    """hsnn items stats."""
    with ItemClient(options.url, options.timeout, tls=tls_of(options)) as client:
        held = client.stats()
    if options.json:
        print(json.dumps(vars(held)))
        return
    rows: list[list[Any]] = [
        ["items updated and live", held.live],
        ["items deleted", held.deleted],
        ["newest position", held.position],
        ["updates may be forgotten up to", held.oldest],
        ["identity", held.identity],
        ["schema", held.schema_hash],
        ["file", held.log],
    ]
    print(table(["item log", ""], [[name, str(value)] for name, value in rows]))


def follow_kafka(options: argparse.Namespace) -> None:
    """hsnn items follow-kafka."""
    try:
        from clients.kafka import DeadLetters, KafkaFollower
    except ModuleNotFoundError as error:
        raise DataError(
            f"hsnn items follow-kafka: {error}; install it with: pip install 'hsnn-triton[kafka]'"
        ) from None
    settings = _settings(options.options) | {"bootstrap.servers": options.brokers}
    stop = Event()
    told = _Told()
    if options.ready_file is not None:
        options.ready_file.unlink(missing_ok=True)
    with (
        _stopped_by_signals(stop),
        closing(DeadLetters(Path(options.dead_letters) if options.dead_letters else None)) as dead_letters,
        ItemClient(options.url, options.timeout, batch=options.batch, tls=tls_of(options)) as client,
        KafkaFollower(
            client, options.topic, options.group, settings, dead_letters, options.batch, told
        ) as follower,
        tqdm(unit=" messages", mininterval=0.5, disable=None) as bar,
    ):
        print(f"following {options.topic} at {options.brokers} as {options.group} (Ctrl-C stops)", flush=True)

        def progress(count: int) -> None:
            bar.set_postfix_str(f"{follower.counts}, lag {follower.lag()}", refresh=False)
            bar.update(count)

        def caught_up() -> None:
            print(f"caught up: {follower.counts}", flush=True)
            if options.ready_file is not None:
                options.ready_file.touch()

        follower.follow(stop.is_set, progress, caught_up)
    print(f"stopped: {follower.counts}")


class _Told:
    """Prints what a follower has to say on standard error, the same not more often than once a minute."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def __call__(self, reason: str) -> None:
        key, now = reason.partition(";")[0], time.monotonic()
        if now - self._last.get(key, -60.0) >= 60.0:
            self._last = {key: now}
            tqdm.write(f"hsnn: {reason}", file=sys.stderr)


@contextmanager
def _stopped_by_signals(stop: Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set ``stop``, so that what was begun is finished and committed."""
    before = {
        number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _settings(texts: Sequence[str]) -> dict[str, str]:
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise RequestError(f"--option: got {text!r}, expected NAME=VALUE, a setting of librdkafka")
        settings[name] = value
    return settings


class _Outcome:
    """Counts over all batches, and the first updates that were refused."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(STATUSES, 0)
        self.shown: list[str] = []
        self.position = 0

    def add(self, results: ItemResults) -> None:
        done = sum(self.counts.values())
        for status in self.counts:
            self.counts[status] += results.count(status)
        self.shown += [f"update {done + n + 1}: {reason}" for n, reason in results.reasons(REFUSED, FAILED)]
        del self.shown[SHOWN:]
        self.position = max(self.position, results.position)

    def report(self, done: str) -> None:
        """Print what happened; DataError when something was refused, LogError when it could not be written."""
        counts, total = self.counts, sum(self.counts.values())
        bad = counts[REFUSED] + counts[FAILED]
        print(
            f"{done}: {counts[APPLIED]:,}, stale: {counts[STALE]:,}; the log is at position {self.position:,}"
        )
        for line in self.shown:
            print(line, file=sys.stderr)
        if bad > len(self.shown):
            print(f"... and {bad - len(self.shown):,} more", file=sys.stderr)
        if counts[FAILED]:
            raise LogError(
                f"{counts[FAILED]:,} of {total:,} updates could not be written, for the reasons above; the others are "
                "done: when the server's log can be written again, run the same command again"
            )
        if counts[REFUSED]:
            raise DataError(
                f"{counts[REFUSED]:,} of {total:,} updates were refused, for the reasons above; the others are done: "
                "correct these and send them again"
            )


def _apply(
    client: ItemClient,
    options: argparse.Namespace,
    updates: Iterable[Any],
    total: int | None,
    unit: str,
    read: Callable[[], int] | None,
) -> _Outcome:
    """Send the updates in batches under a progress bar; ``read``: units read so far, None: the updates are counted."""
    outcome = _Outcome()
    updates = iter(updates)
    with tqdm(total=total, unit=unit, unit_scale=unit == "B", mininterval=0.5, disable=None) as bar:
        while batch := list(itertools.islice(updates, options.batch)):
            outcome.add(client.upsert(batch))
            bar.update(len(batch) if read is None else read() - bar.n)
            counts = outcome.counts
            bar.set_postfix_str(f"{counts[STALE]} stale, {counts[REFUSED]} refused", refresh=False)
    return outcome


def _lines(name: str) -> Iterator[str]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text()
    except OSError as error:
        raise DataError(f"{name}: {error.strerror}; expected a file with one item id per line") from None
    return (line.strip() for line in text.splitlines() if line.strip())


def _ids(schema: Schema, texts: Iterable[str]) -> Iterator[int | str]:
    for text in texts:
        if schema.item_key_type == "string":
            yield text
            continue
        try:
            yield int(text)
        except ValueError:
            raise DataError(
                f"item id: got {text!r}, expected a whole number, as the schema's item ids are"
            ) from None


def keep_compact(options: argparse.Namespace) -> None:
    """hsnn items compact --every: until Ctrl-C."""
    from clients.admin import RepositoryAdmin
    from export.compaction import Compactor
    from export.forgetting import log_of

    if options.url is None or options.every <= 0:
        raise RequestError(
            "hsnn items compact --every: expected minutes above 0 and --url, the server to promote on"
        )
    key, tls = admin_key(options.key_file), tls_of(options)
    log = log_of(options.repository)
    compactor = Compactor(options.run, options.repository, log, options.to, options.sign_key)
    while True:
        try:
            pending = compactor.pending()
            if pending >= options.least:
                with RepositoryAdmin(options.url, key, tls=tls) as admin:
                    version = compactor.compact(admin, progress=False)
                print(f"{pending:,} updates folded into version {version}, which serves", flush=True)
        except HsnnError as error:  # what is served goes on; the next time may be better
            print(f"not compacted: {error}", file=sys.stderr, flush=True)
        try:
            time.sleep(60 * options.every)
        except KeyboardInterrupt:
            return
