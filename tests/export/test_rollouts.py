"""Candidates, canaries, promotion, rollback and retirement on a fake server that notes every request it would have
failed."""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from fake_triton import FakeTriton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kill import SERVER, TASKS, few_code_files
from standin_world import standin_source

from clients.admin import RepositoryAdmin
from export import candidate as candidates
from export import loading, vendor
from export.candidate import (
    promote_candidate,
    publish_and_promote,
    publish_candidate,
    roll_back,
    start_canary,
    stop_canary,
    withdraw,
)
from export.export_run import export_source
from export.exported import Exported
from export.pbtxt import ORCHESTRATOR, ServingOptions
from export.publish import current_options, publish
from export.repository import CANARY, LOCK_PATIENCE, candidate, locked, next_version, versions
from export.retire import retire
from export.rollout import promote, rollback
from export.status import status
from hsnn_core.errors import PublishError, ServerError

ROOT = Path(__file__).parents[2]
MODELS = ["hsnn_index", "hsnn_item_tower", "hsnn_retrieve", "hsnn_scorer_l1", "hsnn_user_tower"]


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An export of few files, to be published many times."""
    return export_source(standin_source(layers=1), tmp_path_factory.mktemp("flat") / "export", progress=False)


@pytest.fixture(autouse=True)
def _little_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(vendor, "code_files", few_code_files)


def served(flat: Exported, repository: Path, count: int = 1, **options: object) -> FakeTriton:
    """A repository of some snapshots, each of which was served in turn."""
    server = FakeTriton(repository, **options)
    for _ in range(count):
        publish(flat.path, repository)
        promote(repository, server)
    return server


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_candidate_is_there_and_serves_nobody(flat: Exported, tmp_path: Path) -> None:
    server = served(flat, tmp_path)
    assert publish_candidate(flat.path, tmp_path, server) == 2
    assert (candidate(tmp_path), versions(tmp_path)) == (2, [1])
    assert names(tmp_path / ORCHESTRATOR) == ["1", "config.pbtxt"]
    assert names(tmp_path / CANARY) == ["2", "config.pbtxt"]
    server.load(ORCHESTRATOR)  # whatever reloads the orchestrator, or restarts the server, does not take it
    assert server.serving() == [1]
    fresh = FakeTriton(tmp_path)
    assert promote(tmp_path, fresh) == 1
    assert fresh.serving() == [1]
    assert candidate(tmp_path) == 2
    assert server.serving("hsnn_user_tower") == [1, 2]
    assert server.violations == []


def test_the_canary_differs_in_name_and_share_only(flat: Exported, tmp_path: Path) -> None:
    server = served(flat, tmp_path)
    publish_candidate(flat.path, tmp_path, server)
    stable = (tmp_path / ORCHESTRATOR / "config.pbtxt").read_text()
    canary = tmp_path / CANARY / "config.pbtxt"
    assert canary.read_text() == stable.replace(ORCHESTRATOR, CANARY, 1)
    assert start_canary(tmp_path, server, 0.05) == 2
    assert (server.serving(), server.serving(CANARY)) == ([1], [2])
    text = canary.read_text()
    assert 'key: "canary_share"' in text and 'string_value: "0.05"' in text
    assert start_canary(tmp_path, server, 0.25, shadow=True) == 2
    with pytest.raises(PublishError, match="share is 1.5, expected a number from 0 to 1"):
        start_canary(tmp_path, server, 1.5)
    stop_canary(tmp_path, server)
    stop_canary(tmp_path, server)  # nothing to do is no error
    assert (server.serving(), server.serving(CANARY), candidate(tmp_path)) == ([1], [], 2)
    assert promote_candidate(tmp_path, server) == 2
    assert (tmp_path / ORCHESTRATOR / "config.pbtxt").read_text() == stable
    assert not (tmp_path / CANARY).exists()
    assert server.serving() == [2]
    assert server.violations == []


def test_the_first_snapshot_may_be_a_candidate(flat: Exported, tmp_path: Path) -> None:
    server = FakeTriton(tmp_path)
    options = ServingOptions(mode="in_process", workers=3)
    assert publish_candidate(flat.path, tmp_path, server, options) == 1
    with pytest.raises(PublishError, match="no complete snapshot there; publish one first"):
        promote(tmp_path, server)
    assert promote_candidate(tmp_path, server) == 1
    assert current_options(tmp_path) == options
    assert names(tmp_path) == [".publish.lock", *MODELS]


def test_one_candidate_at_a_time(flat: Exported, tmp_path: Path) -> None:
    server = served(flat, tmp_path)
    publish_candidate(flat.path, tmp_path, server)
    for again in (publish, lambda *args: publish_candidate(*args, server)):
        with pytest.raises(PublishError, match="candidate 2 waits there.*promote it or roll it back first"):
            again(flat.path, tmp_path)
    with pytest.raises(PublishError, match="candidate 2 waits.*withdraw the candidate first"):
        rollback(tmp_path, server)
    assert withdraw(tmp_path, server) == 2
    assert (candidate(tmp_path), versions(tmp_path), server.serving("hsnn_user_tower")) == (None, [1], [1])
    assert not (tmp_path / CANARY).exists()
    for command in (start_canary, promote_candidate, withdraw):
        with pytest.raises(PublishError, match="no candidate there; publish one with hsnn rollout publish"):
            command(tmp_path, server)
    assert publish_candidate(flat.path, tmp_path, server) == 3
    assert server.violations == []


def test_a_candidate_that_answers_otherwise_is_refused_and_gone(flat: Exported, tmp_path: Path) -> None:
    server = served(flat, tmp_path)
    server.shift = 0.05
    with pytest.raises(PublishError, match="candidate 2: its networks do not answer the smoke request"):
        publish_candidate(flat.path, tmp_path, server)
    server.shift, server.fails = 0.0, ("hsnn_scorer_l1",)
    with pytest.raises(
        PublishError, match="candidate 3: the server did not load hsnn_scorer_l1: out"
    ) as failure:
        publish_candidate(flat.path, tmp_path, server)
    (note,) = failure.value.__notes__
    assert "candidate 3 is withdrawn, but the server did not reload hsnn_scorer_l1: out of memory" in note
    assert (candidate(tmp_path), versions(tmp_path), server.serving()) == (None, [1], [1])
    assert [row.disk for row in status(tmp_path)] == ["complete", "retired", "retired"]
    assert server.violations == []


def test_a_canary_or_an_orchestrator_that_does_not_load(flat: Exported, tmp_path: Path) -> None:
    server = served(flat, tmp_path)
    publish_candidate(flat.path, tmp_path, server)
    server.fails = (CANARY, ORCHESTRATOR)
    with pytest.raises(PublishError, match="candidate 2: the server did not load hsnn_canary: out of memory"):
        start_canary(tmp_path, server)
    before = (tmp_path / ORCHESTRATOR / "config.pbtxt").read_bytes()
    with pytest.raises(
        PublishError, match="candidate 2: the server did not load hsnn_retrieve: out of memory"
    ):
        promote_candidate(tmp_path, server)
    assert (candidate(tmp_path), versions(tmp_path), server.serving()) == (2, [1], [1])
    assert (tmp_path / ORCHESTRATOR / "config.pbtxt").read_bytes() == before
    server.fails = ()
    assert promote_candidate(tmp_path, server) == 2


def test_what_goes_on_by_itself_leaves_no_candidate_in_its_way(flat: Exported, tmp_path: Path) -> None:
    server = served(flat, tmp_path)
    server.fails = (ORCHESTRATOR,)
    with pytest.raises(PublishError, match="candidate 2: the server did not load hsnn_retrieve"):
        publish_and_promote(flat.path, tmp_path, server)
    assert (candidate(tmp_path), versions(tmp_path), server.serving()) == (None, [1], [1])
    server.fails = ()
    assert publish_and_promote(flat.path, tmp_path, server) == 3
    assert (candidate(tmp_path), server.serving(), server.violations) == (None, [3], [])


def test_a_damaged_candidate_is_refused_and_can_be_withdrawn(flat: Exported, tmp_path: Path) -> None:
    server = served(flat, tmp_path)
    publish_candidate(flat.path, tmp_path, server)
    index = tmp_path / CANARY / "2" / "index.hsnn"
    index.write_bytes(index.read_bytes()[:-1])
    for command in (start_canary, promote_candidate):
        with pytest.raises(PublishError, match=r"index\.hsnn: .*the file was edited or cut short"):
            command(tmp_path, server)
    (tmp_path / CANARY / "2" / "manifest.json").unlink()
    assert [row.disk for row in status(tmp_path, server)] == ["complete", "candidate"]
    assert withdraw(tmp_path, server) == 2
    assert server.serving() == [1]
    assert server.violations == []


def test_snapshots_that_were_never_served_make_room(flat: Exported, tmp_path: Path) -> None:
    """Two more publishes than promotions: the networks of the one that serves must not fall out."""
    server = served(flat, tmp_path)
    publish(flat.path, tmp_path)
    with pytest.raises(PublishError, match="snapshot 2 is published and not served"):
        publish_candidate(flat.path, tmp_path, server)
    publish(flat.path, tmp_path)
    with pytest.raises(
        PublishError, match="snapshot 4 is published and not served.*of snapshot 1, which serves"
    ):
        publish_candidate(flat.path, tmp_path, server)
    assert rollback(tmp_path, server) == 1  # of one that nobody serves: files only
    assert versions(tmp_path) == [1, 2]
    for _ in range(2):
        publish(flat.path, tmp_path)
    assert promote(tmp_path, server) == 7
    assert versions(tmp_path) == [1, 7]
    assert server.violations == []


def test_rolling_back_one_step_and_many(flat: Exported, tmp_path: Path) -> None:
    server = served(flat, tmp_path, 4)
    publish_candidate(flat.path, tmp_path, server)
    assert roll_back(tmp_path, server) == "candidate 5 is withdrawn, snapshot 4 goes on"
    assert roll_back(tmp_path, server) == "snapshot 3 serves"
    publish_candidate(flat.path, tmp_path, server)
    start_canary(tmp_path, server)
    with pytest.raises(PublishError, match=r"no complete snapshot 5 there, expected one of \[1, 2, 3\]"):
        roll_back(tmp_path, server, to=5)
    assert roll_back(tmp_path, server, to=1) == "candidate 6 is withdrawn; snapshot 1 serves"
    assert (server.serving(), server.serving(CANARY), versions(tmp_path)) == ([1], [], [1])
    assert server.violations == []
    assert next_version(tmp_path) == 7


def test_a_second_server_follows_a_rollback(flat: Exported, tmp_path: Path) -> None:
    first, second = served(flat, tmp_path, 3), FakeTriton(tmp_path)
    promote(tmp_path, second)
    rollback(tmp_path, first)
    assert promote(tmp_path, second) == 2
    assert (second.serving(), second.serving("hsnn_user_tower")) == ([2], [1, 2])
    assert first.violations == second.violations == []


def test_retiring_removes_what_nothing_serves(flat: Exported, tmp_path: Path) -> None:
    server = served(flat, tmp_path, 5)
    rollback(tmp_path, server)
    publish_candidate(flat.path, tmp_path, server)
    start_canary(tmp_path, server)
    assert retire(tmp_path, server) == [1, 2, 5]
    assert (versions(tmp_path), candidate(tmp_path)) == ([3, 4], 6)
    withdraw(tmp_path, server)
    with pytest.raises(PublishError, match="keep is 0, expected at least 1"):
        retire(tmp_path, server, keep=0)
    assert retire(tmp_path, server, keep=1) == [3, 6]
    assert retire(tmp_path, server, keep=1) == []
    assert [(row.version, row.disk, row.orchestrator) for row in status(tmp_path, server)] == [
        (3, "gone", ""),  # its networks, until they are loaded the next time
        (4, "complete", "READY"),
    ]
    assert publish_candidate(flat.path, tmp_path, server) == 7  # 6 is gone, and is not used again
    assert promote_candidate(tmp_path, server) == 7
    assert names(tmp_path / "hsnn_user_tower") == [".retired", "4", "7", "config.pbtxt"]
    assert server.violations == []


def test_what_serves_stays_even_when_the_disk_has_newer_ones(flat: Exported, tmp_path: Path) -> None:
    server = served(flat, tmp_path)
    for _ in range(2):
        publish(flat.path, tmp_path)
    assert retire(tmp_path, server, keep=1) == [2]
    assert versions(tmp_path) == [1, 3]


def test_status_tells_disk_and_server(flat: Exported, tmp_path: Path) -> None:
    server = served(flat, tmp_path, 2)
    publish_candidate(flat.path, tmp_path, server)
    start_canary(tmp_path, server)
    rows = status(tmp_path, server)
    assert [(r.version, r.disk, r.orchestrator, r.canary, r.networks) for r in rows] == [
        (1, "complete", "", "", 0),
        (2, "complete", "READY", "", 4),
        (3, "candidate", "", "READY", 4),
    ]
    assert all(row.created is not None and row.created.startswith("20") for row in rows)
    assert [row.networks for row in status(tmp_path)] == [None] * 3
    (tmp_path / "hsnn_user_tower" / "9").mkdir()
    assert status(tmp_path)[-1].disk == "unfinished"


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "replay", lambda *_: None)
    for name, seconds in (("QUIET_SECONDS", 0.03), ("DRAIN_SECONDS", 0.15), ("_POLL", 0.005)):
        monkeypatch.setattr(loading, name, seconds)


@pytest.mark.usefixtures("_impatient")
def test_a_version_that_never_ends_unloading_holds_up_no_rollout(
    flat: Exported, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = served(flat, tmp_path, 2)
    server.stuck.add((ORCHESTRATOR, 2))
    for number in (3, 4, 5):
        assert publish_candidate(flat.path, tmp_path, server) == number
        assert promote_candidate(tmp_path, server) == number
    assert (server.states(ORCHESTRATOR)[2], server.serving()) == ("UNLOADING", [5])
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 4, "one for each load of networks while it is there: two a rollout"
    (text,) = set(said)
    assert text.startswith("hsnn_retrieve version 2 did not end unloading and called no network for 0.03 s")
    assert "its memory stays taken until the server is started again" in text
    assert server.violations == []


@pytest.mark.usefixtures("_impatient")
def test_a_version_that_goes_on_calling_its_networks_keeps_them(flat: Exported, tmp_path: Path) -> None:
    server = served(flat, tmp_path, 2)
    server.stuck.add((ORCHESTRATOR, 2))
    server.still_calling = True
    publish(flat.path, tmp_path)
    promote(tmp_path, server)
    publish(flat.path, tmp_path)
    with pytest.raises(
        PublishError, match=r"hsnn_retrieve version 2 still answers requests 0\.15 s after it"
    ):
        promote(tmp_path, server)
    assert (server.serving(), server.serving("hsnn_user_tower")) == ([3], [2, 3])
    assert server.violations == []


@pytest.mark.usefixtures("_impatient")
def test_a_canary_that_never_ends_unloading_is_left_behind(
    flat: Exported, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = served(flat, tmp_path)
    server.stuck |= {(CANARY, 2), (CANARY, 3)}
    for end in (promote_candidate, withdraw):
        publish_candidate(flat.path, tmp_path, server)
        start_canary(tmp_path, server, 0.1)
        end(tmp_path, server)
    assert (server.serving(), candidate(tmp_path), versions(tmp_path)) == ([2], None, [1, 2])
    assert "hsnn_canary version 3 did not end unloading" in caplog.text
    assert server.calls.count("unload hsnn_canary") == 2, "not asked for again, each time for two minutes"
    assert publish_candidate(flat.path, tmp_path, server) == 4
    assert promote_candidate(tmp_path, server) == 4
    assert roll_back(tmp_path, server, to=1) == "snapshot 1 serves"
    assert server.violations == []


@pytest.mark.usefixtures("_impatient")
def test_a_rolled_back_version_that_never_ends_unloading_is_retired(flat: Exported, tmp_path: Path) -> None:
    server = served(flat, tmp_path, 3)
    server.stuck.add((ORCHESTRATOR, 3))
    assert rollback(tmp_path, server) == 2
    assert [row.disk for row in status(tmp_path)] == ["complete", "complete", "retired"]
    assert rollback(tmp_path, server) == 1


def test_a_canary_that_does_not_end_is_an_error(
    flat: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = served(flat, tmp_path)
    publish_candidate(flat.path, tmp_path, server)
    start_canary(tmp_path, server)

    def away(model: str) -> None:
        raise ServerError("no server answers there")

    monkeypatch.setattr(server, "unload", away)
    with pytest.raises(ServerError, match="no server answers there"):
        stop_canary(tmp_path, server)


def test_a_server_that_goes_in_a_rollout_leaves_no_candidate(
    flat: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = served(flat, tmp_path)

    def restarting(*_: object) -> int:
        raise ServerError("no server answers there")

    with monkeypatch.context() as patch:
        patch.setattr(candidates, "check_candidate", restarting)
        with pytest.raises(ServerError, match="no server answers there"):
            publish_candidate(flat.path, tmp_path, server)
    assert candidate(tmp_path) is None


def test_a_command_waits_for_what_another_one_may_wait_for() -> None:
    unload = inspect.signature(RepositoryAdmin).parameters["timeout"].default
    assert loading.DRAIN_SECONDS + unload < LOCK_PATIENCE


def test_two_operators_take_turns(flat: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = served(flat, tmp_path)
    publish_candidate(flat.path, tmp_path, server)
    for module in ("candidate", "rollout", "retire"):
        monkeypatch.setattr(f"export.{module}.LOCK_PATIENCE", 0.2)
    calls = list(server.calls)
    commands: list[Callable[..., object]] = [
        promote,
        start_canary,
        promote_candidate,
        withdraw,
        rollback,
        retire,
    ]
    for command in commands:
        with locked(tmp_path), pytest.raises(PublishError, match="another publish or rollback is at work"):
            command(tmp_path, server)
    assert server.calls == calls
    assert promote_candidate(tmp_path, server) == 2


def restart(repository: Path, server: FakeTriton) -> None:
    server.held, server.fails = {}, ()
    promote(repository, server)


COMMANDS: dict[str, Callable[[Exported, Path, FakeTriton], object]] = {
    "publish": lambda export, repository, server: publish(export.path, repository),
    "promote": lambda export, repository, server: promote(repository, server),
    "publish_candidate": lambda export, repository, server: publish_candidate(
        export.path, repository, server
    ),
    "start_canary": lambda export, repository, server: start_canary(repository, server, 0.1),
    "stop_canary": lambda export, repository, server: stop_canary(repository, server),
    "promote_candidate": lambda export, repository, server: promote_candidate(repository, server),
    "withdraw": lambda export, repository, server: withdraw(repository, server),
    "rollback": lambda export, repository, server: rollback(repository, server),
    "retire": lambda export, repository, server: retire(repository, server),
    "restart": lambda export, repository, server: restart(repository, server),
    "refuse": lambda export, repository, server: setattr(server, "fails", ("hsnn_scorer_l1", ORCHESTRATOR)),
    "accept": lambda export, repository, server: setattr(server, "fails", ()),
}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(commands=st.lists(st.sampled_from(sorted(COMMANDS)), max_size=14), keep=st.integers(1, 2))
def test_no_order_of_commands_fails_a_request(
    commands: list[str], keep: int, flat: Exported, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Those that are refused included."""
    repository = tmp_path_factory.mktemp("repository")
    server = FakeTriton(repository)
    publish(flat.path, repository, options=ServingOptions(keep=keep))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "replay", lambda *_: None)
        promote(repository, server)
        for command in commands:
            with suppress(PublishError, RuntimeError):
                COMMANDS[command](flat, repository, server)
            assert server.violations == [], command
            assert server.serving(), command
        server.fails = ()
        if candidate(repository) is not None:
            withdraw(repository, server)
        newest = promote(repository, server)
        assert server.serving()[-1] == newest == versions(repository)[-1]
        assert server.violations == []


@pytest.mark.parametrize("task", TASKS)
def test_a_command_killed_at_any_step_leaves_what_the_next_one_goes_on_from(
    task: str, flat: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, out = tmp_path / "template", tmp_path / "out"
    template.mkdir()
    monkeypatch.setattr(loading, "replay", lambda *_: None)
    server = served(flat, template, 3, file=template / SERVER)
    if task in ("start_canary", "promote_candidate", "withdraw"):
        publish_candidate(flat.path, template, server)
    if task in ("promote_candidate", "withdraw"):
        start_canary(template, server)
    if task == "retire":
        rollback(template, server)
    subprocess.run(
        [sys.executable, Path(__file__).parent / "kill.py", task, flat.path, template, out],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    copies = [out / str(step) for step in range(len(list(out.iterdir())))]
    assert len(copies) > 5
    for repository in copies:
        server = FakeTriton(repository, repository / SERVER)
        assert server.serving() in ([2], [3], [4])
        # The server may be started anew now, and serves what was promoted last.
        fresh = FakeTriton(repository)
        assert promote(repository, fresh) == versions(repository)[-1]
        # Or another command comes: promotion goes on, and everything works as ever.
        newest = (promote_candidate if candidate(repository) else promote)(repository, server)
        assert server.serving() == [newest] == versions(repository)[-1:]
        number = publish_candidate(flat.path, repository, server)
        start_canary(repository, server)
        assert promote_candidate(repository, server) == number
        assert rollback(repository, server) == newest
        retire(repository, server, keep=1)
        assert versions(repository) == [newest]
        for model in MODELS:
            assert {name for name in names(repository / model) if name != ".retired"} == {
                str(newest),
                "config.pbtxt",
            }
        assert server.violations == fresh.violations == []


def test_a_rollback_that_was_killed_is_finished_and_goes_no_further(flat: Exported, tmp_path: Path) -> None:
    template, out = tmp_path / "template", tmp_path / "out"
    template.mkdir()
    served(flat, template, 3, file=template / SERVER)
    subprocess.run(
        [sys.executable, Path(__file__).parent / "kill.py", "rollback_served", flat.path, template, out],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    begun = 0
    for repository in out.iterdir():
        server = FakeTriton(repository, repository / SERVER)
        if any(row.disk == "rolled back" for row in status(repository)):
            begun += 1
            assert rollback(repository, server) == 2
            assert versions(repository) == [1, 2]
            assert server.serving() == [2]
        assert server.violations == []
    assert begun > 2
