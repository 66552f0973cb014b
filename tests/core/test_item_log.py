from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_writer import ROOT, SCHEMA_HASH, kill_writers

from hsnn_core.errors import FormatError, LogError
from hsnn_core.item_log import FORMAT_VERSION, Entry, ItemLog, LogCounts, LogReader
from hsnn_core.item_updates import Update

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".items" / "log.db"


def price(item: int, sequence: int, value: float = 1.0) -> Update:
    return Update(item, sequence, features={"price": value})


def gone(item: int, sequence: int) -> Update:
    return Update(item, sequence, deleted=True)


def test_a_log_by_hand(path: Path) -> None:
    with ItemLog.open(path, SCHEMA_HASH) as log, LogReader(path, SCHEMA_HASH) as reader:
        assert (reader.position(), reader.since(0, 9), reader.oldest()) == (0, [], 0)
        first = log.append([price(1, 5), gone(2, 5), price(3, 5)])
        assert (first.position, first.applied.tolist()) == (3, [True, True, True])
        # Newer, the same again, older, and twice one item in a batch.
        second = log.append([price(1, 6), gone(2, 5), price(2, 4), price(9, 1), price(9, 2)])
        assert (second.position, second.applied.tolist()) == (6, [True, False, False, True, True])
        assert second.sequences.tolist() == [6, 5, 5, 1, 2]
        assert reader.position() == 6
        assert reader.since(0, 9) == [
            Entry(2, 2, 5, True, None),
            Entry(3, 3, 5, False, price(3, 5).to_json()),
            Entry(4, 1, 6, False, price(1, 6).to_json()),
            Entry(6, 9, 2, False, price(9, 2).to_json()),
        ]
        assert [entry.item for entry in reader.since(2, 2)] == [3, 1]
        assert reader.since(6, 9) == []
        assert reader.counts() == LogCounts(live=3, deleted=1)
        assert log.append([]).position == 6
    with ItemLog.open(path, SCHEMA_HASH) as log:
        assert log.append([gone(9, 3)]).position == 7


def test_a_log_that_is_not_there_is_empty_until_it_is(path: Path) -> None:
    with LogReader(path, SCHEMA_HASH) as reader:
        assert (reader.position(), reader.since(0, 9), reader.oldest(), reader.identity()) == (0, [], 0, None)
        with ItemLog.open(path, SCHEMA_HASH) as log:
            log.append([price(1, 1)])
            assert reader.position() == 1
            assert reader.identity() == log.identity
            assert len(log.identity) == 32


def test_forgetting_keeps_what_makes_old_updates_stale(path: Path) -> None:
    with ItemLog.open(path, SCHEMA_HASH) as log, LogReader(path, SCHEMA_HASH) as reader:
        log.append([price(1, 5), gone(2, 5), price(3, 5), price(4, 5)])
        assert log.forget(3) == 2
        assert log.forget(2) == 0
        assert reader.oldest() == 3
        assert [entry.item for entry in reader.since(3, 9)] == [4]
        with pytest.raises(
            LogError, match="up to position 3 are forgotten, and those after 2 were asked for; .*newer"
        ):
            reader.since(2, 9)
        assert not log.append([price(1, 4), gone(2, 5)]).applied.any()
        assert log.append([price(1, 6)]).position == 5
        assert [entry.position for entry in reader.since(3, 9)] == [4, 5]
        with pytest.raises(LogError, match=r"can't forget up to 6, expected 0\.\.5"):
            log.forget(6)


Step = tuple[str, Any]
UPDATES = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 5), st.booleans()), max_size=6)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), UPDATES),
        st.tuples(st.just("reopen"), st.none()),
        st.tuples(st.just("forget"), st.floats(0, 1)),
        st.tuples(st.just("follow"), st.integers(1, 4)),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_any_history_ends_in_the_newest_state_of_every_item(
    steps: list[Step], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Beside a dict of the highest sequence, first come: batches, reopening, forgetting, readers that lag behind."""
    path = tmp_path_factory.mktemp("log") / "log.db"
    oracle: dict[int, Update] = {}
    position_of: dict[int, int] = {}
    newest = forgotten = seen = 0
    followed: dict[int, Entry] = {}
    log, reader = ItemLog.open(path, SCHEMA_HASH), LogReader(path, SCHEMA_HASH)
    for kind, argument in steps:
        if kind == "append":
            updates = [gone(i, s) if d else price(i, s, len(oracle)) for i, s, d in argument]
            applied = []
            for update in updates:
                known = oracle.get(update.item)
                applied.append(known is None or update.sequence > known.sequence)
                if applied[-1]:
                    newest += 1
                    oracle[update.item], position_of[update.item] = update, newest
            appended = log.append(updates)
            assert (appended.position, appended.applied.tolist()) == (newest, applied)
        elif kind == "reopen":
            log.close()
            log = ItemLog.open(path, SCHEMA_HASH)
        elif kind == "forget":
            forgotten = max(forgotten, int(argument * seen))  # only what the follower has seen
            log.forget(forgotten)
        else:
            entries = reader.since(seen, argument)
            assert len(entries) == min(argument, sum(at > seen for at in position_of.values()))
            for entry in entries:
                assert entry.position > seen
                seen, followed[entry.item] = entry.position, entry
        assert (reader.position(), reader.oldest()) == (newest, forgotten)
        live = sum(not update.deleted for update in oracle.values())
        assert reader.counts() == LogCounts(live, len(oracle) - live)
    for entry in reader.since(seen, 100):
        followed[entry.item] = entry
    assert followed == {
        item: Entry(at, item, update.sequence, update.deleted, None if update.deleted else update.to_json())
        for item, update in oracle.items()
        for at in [position_of[item]]
    }
    log.close()
    reader.close()


def test_what_a_killed_writer_acknowledged_is_there(path: Path) -> None:
    assert kill_writers(path, kills=5) > 100


def test_writers_take_turns(path: Path) -> None:
    def write(offset: int) -> int:
        with ItemLog.open(path, SCHEMA_HASH) as log:
            return sum(int(log.append([price(n, n)]).applied.sum()) for n in range(offset, offset + 30))

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(write, [0, 0, 15, 30])) == 60
    with LogReader(path, SCHEMA_HASH) as reader:
        assert {entry.item for entry in reader.since(0, 100)} == set(range(60))


def _open_and_close(path: Path, schema_hash: str) -> None:
    ItemLog.open(path, schema_hash).close()


def test_processes_that_make_the_log_at_once_make_one(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_open_and_close, args=(path, SCHEMA_HASH)) for _ in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 8


def test_a_reader_may_not_write(path: Path) -> None:
    with ItemLog.open(path, SCHEMA_HASH) as log, LogReader(path, SCHEMA_HASH) as reader:
        log.append([price(1, 1)])
        assert reader.position() == 1
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader._connection.execute("DELETE FROM items")  # type: ignore[union-attr]


def test_a_reader_that_reads_does_not_hold_up_the_writer(path: Path) -> None:
    with ItemLog.open(path, SCHEMA_HASH) as log, sqlite3.connect(path) as other:
        log.append([price(1, 1)])
        other.execute("BEGIN")
        assert other.execute("SELECT count(*) FROM items").fetchone() == (1,)
        assert log.append([price(2, 1)]).applied.all()
        assert other.execute("SELECT count(*) FROM items").fetchone() == (1,)  # one state, until it ends


def test_following_is_cheap(path: Path) -> None:
    with ItemLog.open(path, SCHEMA_HASH) as log, LogReader(path, SCHEMA_HASH) as reader:
        log.append([price(n, 1) for n in range(1000)])
        times = []
        for _ in range(200):
            started = time.perf_counter()
            reader.position()
            times.append(time.perf_counter() - started)
    assert np.median(times) < 200e-6


def full_after(log: ItemLog, pages: int) -> None:
    connection = log._connection
    (used,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {used + pages}")


def test_a_full_disk_refuses_the_batch_and_harms_nothing(path: Path) -> None:
    with ItemLog.open(path, SCHEMA_HASH) as log, LogReader(path, SCHEMA_HASH) as reader:
        log.append([price(1, 1), gone(2, 1)])
        before = reader.since(0, 9)
        full_after(log, 2)
        with pytest.raises(
            LogError, match=f"^{path}: no room on the disk .*; the log is as it was, make room and"
        ):
            log.append([Update(n, 2, features={"note": "x" * 2000}) for n in range(50)])
        assert reader.since(0, 9) == before
        full_after(log, 1000)
        assert log.append([price(1, 2)]).position == 3
    with ItemLog.open(path, SCHEMA_HASH) as log:
        assert log._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A file system of 1 MiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
mount -t tmpfs -o size=1m none {disk} || exit 77
{sys.executable} - <<'END'
from pathlib import Path
from hsnn_core.errors import LogError
from hsnn_core.item_log import ItemLog, LogReader
from hsnn_core.item_updates import Update
path = Path("{disk}/log.db")
with ItemLog.open(path, "a") as log, LogReader(path, "a") as reader:
    acknowledged = 0
    try:
        while True:
            acknowledged = log.append([Update(acknowledged, 1, features={{"note": "x" * 3000}})]).position
    except LogError as error:
        print(error)
    assert acknowledged > 20
    assert [e.item for e in reader.since(0, 10**6)] == list(range(acknowledged))
    try:
        log.append([Update(9**9, 1, features={{"note": "x" * 10**5}})])
    except LogError as error:
        print(error)
with LogReader(path, "a") as reader:
    assert reader.position() == acknowledged
END
"""
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*own_mounts, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets no test mount a file system")
    run = subprocess.run([*own_mounts, "bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    if run.returncode == 77:
        pytest.skip(f"this machine lets no test mount a file system: {run.stderr}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("log.db: ") == 2, run.stdout


def test_a_file_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE notes (text)")
    other.close()
    before = path.read_bytes()
    wanted = (
        r"log\.db: a database of another program \(application id 0x0, tables notes\), expected an item log"
    )
    with pytest.raises(FormatError, match=wanted):
        ItemLog.open(path, SCHEMA_HASH)
    with LogReader(path, SCHEMA_HASH) as reader, pytest.raises(FormatError, match=wanted):
        reader.position()
    assert path.read_bytes() == before
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(FormatError, match=r"log\.db: file is not a database; expected an item log"):
        ItemLog.open(path, SCHEMA_HASH)


def test_a_newer_format_is_refused(path: Path) -> None:
    ItemLog.open(path, SCHEMA_HASH).close()
    with sqlite3.connect(path) as newer:
        newer.execute("PRAGMA user_version = 2")
    newer.close()
    wanted = "item log of format version 2, expected 1; use the release that wrote it"
    with pytest.raises(FormatError, match=wanted):
        ItemLog.open(path, SCHEMA_HASH)
    with LogReader(path, SCHEMA_HASH) as reader, pytest.raises(FormatError, match=wanted):
        reader.since(0, 1)


def test_another_schema_is_refused(path: Path) -> None:
    ItemLog.open(path, SCHEMA_HASH).close()
    wanted = f"holds updates of the schema {SCHEMA_HASH}, expected ffff; a new generation .* needs a log of its own"
    with pytest.raises(FormatError, match=wanted):
        ItemLog.open(path, "ffff")
    with LogReader(path, "ffff") as reader, pytest.raises(FormatError, match=wanted):
        reader.position()


def test_a_damaged_log_is_told(path: Path) -> None:
    with ItemLog.open(path, SCHEMA_HASH) as log:
        log.append([price(n, 1) for n in range(500)])
    data = bytearray(path.read_bytes())
    data[4096:-4096] = os.urandom(len(data) - 8192)
    path.write_bytes(data)
    with pytest.raises(FormatError, match="the file is damaged or another program's, put back a copy"):
        ItemLog.open(path, SCHEMA_HASH).append([price(1, 2)])


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LogError, match=r"file/log\.db: cannot be opened for writing: .*; give another path"):
        ItemLog.open(tmp_path / "file" / "log.db", SCHEMA_HASH)
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        LogError, match=r"folder: cannot be opened for writing \(unable to open database file\)"
    ):
        ItemLog.open(tmp_path / "folder", SCHEMA_HASH)


def test_a_log_that_is_swapped_under_its_reader_is_noticed(path: Path) -> None:
    with ItemLog.open(path, SCHEMA_HASH) as log:
        log.append([price(1, 1), price(2, 1)])
    with LogReader(path, SCHEMA_HASH) as reader:
        assert reader.position() == 2
        path.rename(path.with_name("away.db"))
        with pytest.raises(LogError, match="was removed while it was followed, expected the same log"):
            reader.position()
        ItemLog.open(path, SCHEMA_HASH).close()
        with pytest.raises(LogError, match="was replaced by another file while it was followed"):
            reader.position()
    with (
        LogReader(path, SCHEMA_HASH) as fresh,
        pytest.raises(
            LogError, match="ends at position 0, and what came after 2 was asked for; this is not the"
        ),
    ):
        fresh.since(2, 10)


def test_every_past_version_still_opens(tmp_path: Path) -> None:
    golden = sorted(GOLDEN.glob("item_log_v*.db"))
    assert golden[-1].name == f"item_log_v{FORMAT_VERSION}.db"
    for file in golden:
        copy = tmp_path / file.name
        shutil.copy(file, copy)
        with ItemLog.open(copy, SCHEMA_HASH) as log, LogReader(copy, SCHEMA_HASH) as reader:
            assert reader.oldest() == 1
            assert reader.since(1, 9) == [
                Entry(2, 2, 6, True, None),
                Entry(3, 3, 7, False, price(3, 7, 0.5).to_json()),
            ]
            assert log.append([price(1, 5), price(1, 6)]).applied.tolist() == [False, True]
