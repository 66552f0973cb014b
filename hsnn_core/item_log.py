"""The durable log of item updates: what every server, version and snapshot agrees on.

An SQLite file in WAL mode with the newest state of every item ever updated, each under the position at which it was
written. Positions grow and are never used again, so a reader that has seen all up to p asks for what came after p. A
writer's `append` returns when its rows are on the disk; readers, in any process, take no lock that a writer waits for.

The file must lie on a local disk: WAL mode shares memory between the processes.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from .errors import FeatureError, FormatError, LogError
from .files import sync_directory
from .item_updates import Update

APPLICATION_ID = 0x48534E4C  # "HSNL"
FORMAT_VERSION = 1
BUSY_SECONDS = 10.0  # that a writer waits for another one
WAL_BYTES = 64 << 20  # that the write-ahead file may keep when all of it is in the log

# `position` is the rowid: readers read on from theirs. A replaced row takes a new position; AUTOINCREMENT keeps the
# positions of removed rows from being used again.
_TABLES = (
    """CREATE TABLE items (position INTEGER PRIMARY KEY AUTOINCREMENT, item INTEGER NOT NULL UNIQUE,
    sequence INTEGER NOT NULL, deleted INTEGER NOT NULL, payload TEXT)""",
    "CREATE INDEX deleted_items ON items (position) WHERE deleted",
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
)
_APPLY = """INSERT OR REPLACE INTO items (item, sequence, deleted, payload)
    SELECT ?1, ?2, ?3, ?4 WHERE NOT EXISTS (SELECT 1 FROM items WHERE item = ?1 AND sequence >= ?2)"""
_SEQUENCE = "SELECT sequence FROM items WHERE item = ?"
_POSITION = "SELECT coalesce(max(position), 0) FROM items"
_SINCE = """SELECT position, item, sequence, deleted, payload FROM items
    WHERE position > ? ORDER BY position LIMIT ?"""
_FACT = "SELECT value FROM facts WHERE name = ?"


class Entry(NamedTuple):
    """The newest state of an item: ``payload`` is the JSON of its upsert (`Update.from_json`), None when deleted."""

    position: int
    item: int
    sequence: int
    deleted: bool
    payload: str | None

    def update(self) -> Update:
        """The upsert in the payload. FeatureError when it is not this item's: the log was damaged."""
        update = Update.from_json(self.payload or "")
        if (update.item, update.sequence, update.deleted) != (self.item, self.sequence, False):
            raise FeatureError(
                f"item {self.item}: the log's entry at position {self.position} holds an update of item {update.item} "
                f"with sequence {update.sequence}, expected its own with {self.sequence}; the log is damaged there"
            )
        return update


@dataclass(frozen=True, eq=False)
class Appended:
    """``position``: the log's newest one, which contains the updates. ``applied`` (n,) bool: False where the log knew
    the same or a higher sequence of the item; ``sequences`` (n,) int64: the one that it had after each update."""

    position: int
    applied: np.ndarray
    sequences: np.ndarray


@dataclass(frozen=True)
class LogCounts:
    """Items whose newest state is an upsert (``live``) or a delete (``deleted``)."""

    live: int
    deleted: int


class ItemLog:
    """A writer of the log; may be shared between threads. Several writers take turns.

    >>> with ItemLog.open(path, schema.hash) as log:
    ...     log.append([Update(17, sequence=9, features={"price": 2.5})])
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, identity: str) -> None:
        """Use `open`."""
        self._path, self._connection, self._lock = path, connection, Lock()
        self.identity = identity

    @classmethod
    def open(cls, path: str | Path, schema_hash: str) -> ItemLog:
        """The log in this file, made when there is none.

        ``schema_hash``: of the schema whose features the updates hold; a log holds those of one. Raises FormatError for
        a file that is no item log, is damaged, of a newer format or of another schema, and LogError when it cannot be
        written."""
        path = Path(path)
        with _explained(path, "opened for writing"):
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                sync_directory(path.parent.parent)
            connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                identity = _prepare(path, connection, schema_hash)
            except BaseException:
                connection.close()
                raise
        return cls(path, connection, identity)

    def append(self, updates: Iterable[Update]) -> Appended:
        """Write the updates, in their order, in one transaction; on the disk on return.

        All or nothing: LogError (no room on the disk, or it failed) leaves the log as it was."""
        applied: list[bool] = []
        sequences: list[int] = []
        with self._transaction("written") as connection:
            for update in updates:
                payload = None if update.deleted else update.to_json()
                row = (update.item, update.sequence, int(update.deleted), payload)
                applied.append(connection.execute(_APPLY, row).rowcount == 1)
                known = update.sequence
                if not applied[-1]:
                    (known,) = connection.execute(_SEQUENCE, (update.item,)).fetchone()
                sequences.append(known)
            (position,) = connection.execute(_POSITION).fetchone()
        return Appended(position, np.array(applied, bool), np.array(sequences, np.int64))

    def forget(self, position: int) -> int:
        """Drop the payloads up to ``position``, which every snapshot still in use must contain, and return how many.

        Item and sequence stay, so that an old update that comes late is still stale; `LogReader.since` no longer
        begins before ``position``. Raises LogError as `append`, and for a position that was never written."""
        with self._transaction("written") as connection:
            (newest,) = connection.execute(_POSITION).fetchone()
            if not 0 <= position <= newest:
                raise LogError(f"{self._path}: can't forget up to {position}, expected 0..{newest}")
            (forgotten,) = connection.execute(_FACT, ("forgotten",)).fetchone()
            if position <= forgotten:
                return 0
            connection.execute("UPDATE facts SET value = ? WHERE name = 'forgotten'", (position,))
            return connection.execute(
                "UPDATE items SET payload = NULL WHERE position > ? AND position <= ? AND payload IS NOT NULL",
                (forgotten, position),
            ).rowcount

    def close(self) -> None:
        """Give the file back; what was appended is on the disk already."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> ItemLog:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @contextmanager
    def _transaction(self, what: str) -> Iterator[sqlite3.Connection]:
        with self._lock, _explained(self._path, what), _transaction(self._connection) as connection:
            yield connection


class LogReader:
    """Follows a log that others write, from any process and several threads; a log that is not there yet is empty.

    `position` costs microseconds, so it may be called every few milliseconds. Every call raises FormatError for a file
    that is no log of this schema, and LogError when it cannot be read now (a later call may).
    """

    def __init__(self, path: str | Path, schema_hash: str) -> None:
        self._path, self._schema_hash = Path(path), schema_hash
        self._lock = Lock()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._identity: str | None = None

    def position(self) -> int:
        """The newest position, 0 of an empty log."""
        with self._connected() as connection:
            if connection is None:
                return 0
            return int(connection.execute(_POSITION).fetchone()[0])

    def since(self, position: int, limit: int) -> list[Entry]:
        """At most ``limit`` entries after ``position``, ascending by position, each the newest state of its item.

        Whoever goes on from the last entry's position misses nothing. LogError when ``position`` is before `oldest`,
        as some of what came after is forgotten, or beyond the newest, hence of another log."""
        with self._connected() as connection:
            if connection is None:
                newest = oldest = 0
                rows = []
            else:
                with _transaction(connection, "DEFERRED"):
                    (newest,) = connection.execute(_POSITION).fetchone()
                    (oldest,) = connection.execute(_FACT, ("forgotten",)).fetchone()
                    rows = connection.execute(_SINCE, (position, limit)).fetchall()
        if position < oldest:
            raise LogError(
                f"{self._path}: updates up to position {oldest} are forgotten, and those after {position} were asked "
                "for; expected a snapshot that contains them, publish a newer one"
            )
        if position > newest:
            raise LogError(
                f"{self._path}: ends at position {newest}, and what came after {position} was asked for; this is not "
                "the log that the snapshot followed: give its own back, or publish a new snapshot"
            )
        entries = []
        for at, item, sequence, gone, payload in rows:
            whole = all(type(number) is int for number in (at, item, sequence, gone))
            if not whole or not position < at <= newest or not isinstance(payload, str | None):
                raise FormatError(
                    f"{self._path}: the entry after position {position} is ({at!r}, {item!r}, {sequence!r}, {gone!r}), "
                    "expected numbers in ascending order; the log is damaged, put back a copy"
                )
            entries.append(Entry(at, item, sequence, bool(gone), payload))
            position = at
        return entries

    def oldest(self) -> int:
        """The smallest position that `since` can go on from: everything up to it may be forgotten."""
        with self._connected() as connection:
            return 0 if connection is None else int(connection.execute(_FACT, ("forgotten",)).fetchone()[0])

    def identity(self) -> str | None:
        """32 hexadecimal digits that no other log has; None when there is no log yet. A position means nothing in a
        log of another identity."""
        with self._connected():
            return self._identity

    def counts(self) -> LogCounts:
        """How many items the log knows; milliseconds per million."""
        with self._connected() as connection:
            if connection is None:
                return LogCounts(0, 0)
            (items, deleted) = connection.execute(
                "SELECT (SELECT count(*) FROM items), (SELECT count(*) FROM items WHERE deleted)"
            ).fetchone()
            return LogCounts(items - deleted, deleted)

    def close(self) -> None:
        """Give the file back."""
        with self._lock:
            self._disconnect()

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection | None]:
        with self._lock, _explained(self._path, "read"):
            try:
                found = self._path.stat()
            except FileNotFoundError:
                found = None
            if found is None:
                if self._connection is not None:
                    raise self._replaced("removed")
            elif self._connection is None:
                self._connect((found.st_dev, found.st_ino))
            elif self._file != (found.st_dev, found.st_ino):
                raise self._replaced("replaced by another file")
            yield self._connection

    def _connect(self, file: tuple[int, int]) -> None:
        # Through a URI, as only that opens without the right to change the log.
        connection = sqlite3.connect(
            f"{self._path.absolute().as_uri()}?mode=ro",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            with _transaction(connection, "DEFERRED"):
                facts = _facts(self._path, connection)
            if facts is None:  # its writer is about to fill it
                connection.close()
                return
            _check_schema(self._path, facts, self._schema_hash)
        except BaseException:
            connection.close()
            raise
        self._connection, self._file, self._identity = connection, file, facts["identity"]

    def _replaced(self, how: str) -> LogError:
        return LogError(
            f"{self._path}: was {how} while it was followed, expected the same log for the life of a server; put it "
            "back, or load the snapshot again"
        )

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._file = self._identity = None


def _prepare(path: Path, connection: sqlite3.Connection, schema_hash: str) -> str:
    """Check or make the log, as its writer; its identity."""
    # Before anything is written: the file may be another program's.
    with _transaction(connection, "DEFERRED"):
        _facts(path, connection)
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise LogError(f"{path}: the file system has no write-ahead mode (got {mode}); expected a local disk")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
    with _transaction(connection):
        facts = _facts(path, connection)
        if facts is None:
            facts = {"schema_hash": schema_hash, "identity": uuid.uuid4().hex, "forgotten": 0}
            for statement in _TABLES:
                connection.execute(statement)
            connection.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        _check_schema(path, facts, schema_hash)
    return facts["identity"]


def _facts(path: Path, connection: sqlite3.Connection) -> dict[str, Any] | None:
    """What the log says of itself; None of an empty file. FormatError when it is not a log of this format."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not application and not version and not tables:
        return None
    if application != APPLICATION_ID:
        raise FormatError(
            f"{path}: a database of another program (application id {application:#x}, tables "
            f"{', '.join(sorted(tables)) or 'none'}), expected an item log ({APPLICATION_ID:#x}); give another path"
        )
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path}: item log of format version {version}, expected {FORMAT_VERSION}; use the release that wrote "
            "it, or give another path"
        )
    facts = dict(connection.execute("SELECT name, value FROM facts"))
    kinds = {"schema_hash": str, "identity": str, "forgotten": int}
    if any(type(facts.get(name)) is not kind for name, kind in kinds.items()):
        raise FormatError(f"{path}: says {facts!r:.200} of itself; the log is damaged, put back a copy")
    return facts


def _check_schema(path: Path, facts: dict[str, Any], schema_hash: str) -> None:
    if facts["schema_hash"] != schema_hash:
        raise FormatError(
            f"{path}: holds updates of the schema {facts['schema_hash']}, expected {schema_hash}; a new generation "
            "of the repository needs a log of its own, give another path"
        )


@contextmanager
def _transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
    connection.execute(f"BEGIN {kind}")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk may have ended it already
            connection.execute("ROLLBACK")
        raise


@contextmanager
def _explained(path: Path, what: str) -> Iterator[None]:
    """The errors of SQLite and the system, as ours."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise FormatError(
                f"{path}: {error}; expected an item log: the file is damaged or another program's, put back a copy "
                "or give another path"
            ) from error
        if code == sqlite3.SQLITE_FULL:
            raise LogError(
                f"{path}: no room on the disk ({error}); the log is as it was, make room and send the updates again"
            ) from error
        if code == sqlite3.SQLITE_BUSY:
            raise LogError(
                f"{path}: not {what}, another writer holds it for more than {BUSY_SECONDS:g} s ({error}); "
                "send the updates again"
            ) from error
        raise LogError(
            f"{path}: cannot be {what} ({error}); check the disk and the folder's permissions, then send the "
            "updates again"
        ) from error
    except sqlite3.Error as error:
        raise LogError(f"{path}: cannot be {what}: {error}") from error
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path}: names that are no text ({error}); the log is damaged, put back a copy"
        ) from error
    except OSError as error:
        raise LogError(f"{path}: cannot be {what}: {error.strerror}; give another path") from error
