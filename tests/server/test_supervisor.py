"""What the supervisor does about what it sees, with a server and a clock that are made up."""

from __future__ import annotations

from typing import Any

import pytest

from hsnn_core.errors import PublishError, ServerError
from hsnn_server.probe import BUSY, DEAD, HEALTHY, WRONG, Verdict
from hsnn_server.stubs import Dead
from hsnn_server.supervisor import Patience, Supervisor


class World:
    """A server whose state a test sets; ``did``: what the supervisor did, with the seconds."""

    def __init__(self, **patience: float) -> None:
        self.now = 0.0
        self.running, self.state = True, HEALTHY
        self.answered: int | None = 7
        self.dead: list[tuple[Any, ...]] = []
        self.starts = True
        self.unrevived: Exception | None = None
        self.unanswered = False
        self.did: list[str] = []
        self.said: list[str] = []
        self.supervisor = Supervisor(
            self, self.start_again, self.probe, Patience(**patience), self.said.append, lambda: self.now, self.sleep
        )  # fmt: skip

    def alive(self) -> bool:
        return self.running

    def dead_models(self) -> list[Dead]:
        if self.unanswered:
            raise ServerError("no answer")
        return [Dead(*one) for one in self.dead]

    def revive(self, model: str, version: int) -> None:
        self.did.append(f"{self.now:.1f} revive {model} {version}")
        if self.unrevived is not None:
            raise self.unrevived
        self.dead = [other for other in self.dead if other != (model, version)]

    def start_again(self) -> int:
        self.did.append(f"{self.now:.1f} start")
        if not self.starts:
            raise PublishError("snapshot 3: does not load")
        self.running, self.state, self.dead, self.unanswered = True, HEALTHY, [], False
        return 3

    def probe(self) -> Verdict:
        return Verdict(self.state, "so it is", 0.0, self.answered if self.state == BUSY else None)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def run(self, seconds: float) -> World:
        until = self.now + seconds
        self.supervisor.run(lambda: self.now >= until)
        return self


def test_a_sound_server_is_left_alone() -> None:
    world = World().run(100)
    assert not world.did and not world.said


def test_a_dead_stub_is_loaded_again_at_once() -> None:
    world = World().run(1)
    world.dead = [("hsnn_retrieve", 3)]
    world.run(100)
    assert [text.split(" ", 1)[1] for text in world.did] == ["revive hsnn_retrieve 3"]
    assert float(world.did[0].split()[0]) < 1.3
    assert world.said == ["supervisor: the stub of hsnn_retrieve version 3 has died; loaded again in 0.0 s"]


def test_stubs_that_die_together_are_loaded_together() -> None:
    world = World()
    world.dead = [("a", 3), ("b", 3), ("c", 2)]
    world.run(100)
    assert [text.split()[1:] for text in world.did] == [
        ["revive", "a", "3"],
        ["revive", "b", "3"],
        ["revive", "c", "2"],
    ]
    assert "the stubs of a version 3, b version 3, c version 2 have died; loaded again" in world.said[0]
    world = World(revivals=2)
    world.dead = [("a", 3), ("b", 3), ("c", 2)]
    world.run(100)
    assert [text.split()[1] for text in world.did] == ["start"]


def test_a_stub_that_dies_again_takes_a_new_server() -> None:
    world = World(settled=20).run(1)
    for _ in range(2):
        world.dead = [("hsnn_scorer_l1", 3)]
        world.run(5)
    assert [text.split()[1] for text in world.did] == ["revive", "start"]
    world.run(30).dead = [("hsnn_scorer_l1", 3)]
    world.run(5)
    assert [text.split()[1] for text in world.did] == ["revive", "start", "revive"], "it had settled"


def test_what_killed_stubs_leave_behind_is_bounded() -> None:
    world = World(revivals=2, settled=1)
    for _ in range(4):
        world.dead = [("m", 1)]
        world.run(10)
    assert [text.split()[1] for text in world.did] == ["revive", "revive", "start", "revive"]


@pytest.mark.parametrize("kind", [ServerError, PublishError, OSError])
def test_a_load_that_fails_takes_a_new_server(kind: type[Exception]) -> None:
    world = World()
    world.dead, world.unrevived = [("m", 1)], kind("can't load\nthe log")
    world.run(1)
    assert [text.split()[1] for text in world.did] == ["revive", "start"]
    assert (
        "the stub of m version 1 has died and could not be loaded again: can't load; starting"
        in world.said[0]
    )
    assert "the log" not in world.said[0]


def test_an_ended_server_is_started_at_once() -> None:
    world = World().run(1)
    world.running = False
    world.run(1)
    assert [text.split()[1] for text in world.did] == ["start"]
    assert world.said[0].startswith(
        "supervisor: its process has ended; starting the server again (attempt 1)"
    )
    assert world.said[1].startswith("supervisor: version 3 serves again")


def test_a_hanging_server_is_started_after_some_probes() -> None:
    world = World(probe=1, failures=3).run(1)
    world.state, world.unanswered = DEAD, True
    world.run(10)
    [did] = world.did
    assert did.endswith("start") and 2.5 < float(did.split()[0]) < 4.5
    assert "3 probes in a row failed, the last with dead: so it is" in world.said[0]


@pytest.mark.parametrize(("state", "lines"), [(BUSY, 0), (WRONG, 1)])
def test_a_busy_or_wrong_server_is_not_restarted(state: str, lines: int) -> None:
    world = World().run(1)
    world.state = state
    world.run(100)
    assert not world.did and len(world.said) == lines


def test_a_server_that_refuses_all_for_minutes_is_started_again() -> None:
    world = World(hanging=300).run(1)
    world.state = BUSY
    world.run(298)
    assert not world.did
    world.run(10)
    [did] = world.did
    assert did.endswith("start") and 299 < float(did.split()[0]) < 303
    assert "and answered nobody in them; so it is; starting" in world.said[0]
    world.state, world.answered = BUSY, 0  # it hangs again, and is given as long again
    world.run(290)
    assert len(world.did) == 1


@pytest.mark.parametrize("unknown", [False, True])
def test_an_overload_may_last(unknown: bool) -> None:
    world = World(hanging=10).run(1)
    world.state = BUSY
    for minute in range(20):
        world.answered = None if unknown else minute
        world.run(5)
    assert not world.did


def test_a_hanging_server_may_fail_a_probe_between_two_refusals() -> None:
    world = World(hanging=10, failures=3).run(1)
    for state in [BUSY, DEAD] * 8:
        world.state = state
        world.run(1)
    assert [text.split()[1] for text in world.did] == ["start"]


def test_failures_must_be_in_a_row() -> None:
    world = World(failures=3)
    for state in [DEAD, DEAD, BUSY] * 10:
        world.state = state
        world.run(1)
    assert not world.did


def test_it_waits_longer_each_time_and_gives_up() -> None:
    world = World(attempts=4, pause=1, longest=3)
    world.running, world.starts = False, False
    with pytest.raises(
        ServerError, match="started 4 times in a row and did not stay up; the last reason: snapshot 3:"
    ):
        world.run(1000)
    assert [float(text.split()[0]) for text in world.did] == [0, 1, 3, 6]


def test_a_server_that_ends_over_and_over_is_given_up() -> None:
    world = World(attempts=3, settled=20)
    for _ in range(3):
        world.running = False
        world.run(5)
    world.running = False
    with pytest.raises(ServerError, match="did not stay up"):
        world.run(5)
    assert len(world.did) == 3


def test_what_never_ends_unloading_takes_a_new_server() -> None:
    world = World(unloading=10).run(1)
    for _ in range(3):
        world.dead = [("hsnn_retrieve", 2, True)]  # it ends a little later than its process
        world.run(5).dead = []
        world.run(5)
    assert not world.did
    world.dead = [("hsnn_retrieve", 2, True)]
    world.run(20)
    assert [text.split()[1] for text in world.did] == ["start"]
    assert (
        "the stub of hsnn_retrieve version 2 died while it was unloaded, which Triton never ends; starting"
        in world.said[0]
    )


def test_what_is_unloading_is_not_loaded_again_with_the_dead() -> None:
    world = World().run(1)
    world.dead = [("old", 2, True), ("new", 3)]
    world.run(1)
    assert [text.split()[1:] for text in world.did] == [["revive", "new", "3"]]


def test_who_stops_it_does_not_wait_for_the_next_attempt() -> None:
    world = World(pause=10)
    world.running, world.starts = False, False
    world.run(1)
    assert world.now < 2
    assert [text.split()[1] for text in world.did] == ["start"]
