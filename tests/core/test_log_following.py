from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from core_fakes import SMALL_SCHEMA, small_world, write_small_bundle
from live_fakes import SmoothRunner

from hsnn_core.bundle import NO_LOG, Bundle, LogPosition, Smoke, write_bundle
from hsnn_core.errors import FormatError, LogError
from hsnn_core.item_log import ItemLog, LogReader
from hsnn_core.item_updates import Update
from hsnn_core.log_following import LogFollower


class World:
    """A bundle with records, a log, and a follower of both."""

    def __init__(self, folder: Path, log: LogPosition = NO_LOG) -> None:
        self.world = small_world()
        self.world.runner = SmoothRunner(3)
        (folder / "item_tower.onnx").write_bytes(b"the fake's own")
        write_bundle(
            folder / "bundle", self.world.schema, self.world.transform, self.world.corpus(records=True),
            Smoke({}, np.zeros((0, 5), np.int64), np.zeros((0, 5, 2), np.float32)),
            widths=[2, 3], k=5, max_k=20, buckets=[[], [], []], engine="onnxruntime",
            models={"user_tower": "hsnn_u", "item_tower": "hsnn_i", "scorers": ["hsnn_a", "hsnn_b", "hsnn_c"]},
            item_tower=folder / "item_tower.onnx", log=log,
        )  # fmt: skip
        self.bundle = Bundle.open(folder / "bundle")
        self.path = folder / "log.db"
        self.tower = self.world.runner.item_tower

    def log(self) -> ItemLog:
        return ItemLog.open(self.path, self.world.schema.hash)

    def follower(self) -> LogFollower:
        reader = LogReader(self.path, self.world.schema.hash)
        return LogFollower(self.bundle, reader, lambda inputs: self.tower(inputs))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def upsert(item: int, sequence: int = 1) -> Update:
    return Update(item, sequence, features={"category": [item % 5], "price": 1.0})


def live_ids(follower: LogFollower) -> set[int]:
    view = follower.state.view
    positions = np.arange(view.items)
    there = view.present(3, positions)
    return set(view.ids(positions if there is None else positions[there]).tolist())


def damage(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    "payload",
    ["nonsense", "[]", '{"id": 5001}', '{"id": 5002, "sequence": 1, "features": {}}',
     '{"id": 5001, "sequence": 1, "features": []}', '{"id": 5001, "sequence": 1, "features": {"price": "x"}}',
     '{"id": 5001, "sequence": 1, "features": {"nosuch": 1}, "bid": [1]}'],
)  # fmt: skip
def test_a_damaged_entry_is_left_out_and_named(world, payload):
    follower = world.follower()
    base = live_ids(follower)
    with world.log() as log:
        log.append([upsert(n) for n in range(5000, 5003)])
    damage(world.path, f"UPDATE items SET payload = '{payload}' WHERE item = 5001")
    follower.catch_up()
    assert live_ids(follower) - base >= {5000, 5002}
    if "nosuch" not in payload:  # a feature that no schema has is not looked at
        assert live_ids(follower) == base | {5000, 5002}
        ((item, reason),) = follower.unusable
        assert item == 5001 and reason


def test_a_log_that_is_damaged_elsewhere_is_refused(world):
    with world.log() as log:
        log.append([upsert(n) for n in range(5000, 5003)])
    for statement, text in (
        (
            "UPDATE items SET sequence = 'x' WHERE item = 5001",
            "the entry after position 1 is .*the log is damaged",
        ),
        ("UPDATE facts SET value = 'x' WHERE name = 'forgotten'", "says .* of itself; the log is damaged"),
    ):
        damage(world.path, statement)
        with pytest.raises(FormatError, match=text), LogReader(world.path, world.world.schema.hash) as reader:
            reader.since(0, 10)


def test_what_is_logged_is_followed_in_batches(world):
    follower = world.follower()
    base = live_ids(follower)
    assert (follower.behind(), follower.follow()) == (0, 0)  # no log yet
    with world.log() as log:
        position = log.append([upsert(n) for n in range(5000, 5007)]).position
        assert follower.behind() == position
        assert follower.follow(limit=3) == 3
        assert live_ids(follower) == base | {5000, 5001, 5002}
        assert follower.catch_up() == 4
        log.append([Update(5001, 2, deleted=True), upsert(5002, 2)])
        follower.catch_up()
        assert live_ids(follower) == base | set(range(5000, 5007)) - {5001}
        assert follower.log == (follower.state.log_position, log.identity)
        assert follower.behind() == 0


def test_an_update_that_the_networks_cannot_use_is_left_out_and_named(world):
    follower = world.follower()
    tower = world.world.runner.item_tower

    def broken(inputs):
        outputs = tower(inputs)
        bad = inputs["item_dense"][:, 0] > 100  # standard deviations
        return {name: np.where(bad[:, None], np.nan, value) for name, value in outputs.items()}

    world.tower = broken
    with world.log() as log:
        first = upsert(5000)
        poison = Update(5001, 1, features={"category": [1], "price": 1e6})
        log.append([first, poison, upsert(5002)])
        known = int(world.world.item_keys[0])
        log.append([Update(known, 1, features={"price": 1e6})])
    follower.catch_up()
    assert [item for item, _ in follower.unusable] == [5001, known]
    assert "is not finite" in follower.unusable[0][1]
    assert {5000, 5002} <= live_ids(follower)
    assert not {5001, known} & live_ids(follower)  # what the snapshot knew of it is out of date as well


def test_after_a_failure_half_way_it_begins_again_and_never_shows_less(world, monkeypatch):
    follower = world.follower()
    with world.log() as log:
        log.append([upsert(n) for n in range(5000, 5004)])
        follower.catch_up()
        before = follower.state
        log.append([upsert(6000)])

        def fails(*arguments):
            raise MemoryError("no room")

        with monkeypatch.context() as patch:
            patch.setattr(follower.live, "_remember", fails)
            with pytest.raises(MemoryError):
                follower.follow()
        assert follower.state is before
        # From the bundle on, a few at a time: searches keep what they have until it is there again.
        follower.follow(limit=2)
        assert follower.state is before
        follower.catch_up()
        assert {5000, 5001, 5002, 5003, 6000} <= live_ids(follower)


def test_the_updates_of_another_log_are_not_followed(tmp_path):
    (tmp_path / "a").mkdir()
    world = World(tmp_path / "a", LogPosition(3, "0" * 32))
    with world.log() as log:
        log.append([upsert(n) for n in range(5000, 5005)])
    with pytest.raises(LogError, match="contains the updates up to position 3 of the item log 0000"):
        world.follower().follow()


def test_a_bundle_of_before_has_no_records(tmp_path):
    write_small_bundle(tmp_path / "bundle", small_world())
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.records is None
    assert bundle.log == NO_LOG
    assert SMALL_SCHEMA["name"] == bundle.schema.name
