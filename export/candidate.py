"""A candidate: a snapshot that is published and checked, and serves nobody until it is promoted.

Its networks stand beside those in service; its orchestrator may run as a Triton model of its own, `hsnn_canary`,
whose configuration is that of `hsnn_retrieve` under another name, with the share of the traffic that clients
shall give it. Requests to `hsnn_retrieve` know nothing of it. Promoting it is the rename of its orchestrator's
directory into `hsnn_retrieve`. Whether there is a candidate says the repository; whether the canary runs,
the server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export import pbtxt
from export.loading import (
    UNLOADING,
    Admin,
    await_drained,
    load_model,
    load_networks,
    pushed_out,
    retire_leftovers,
    serving,
)
from export.pbtxt import CONFIG_FILE, ORCHESTRATOR, ServingOptions
from export.publish import publish
from export.repository import (
    CANARY,
    LOCK_PATIENCE,
    candidate,
    locked,
    remove_canary,
    retire_candidate,
    snapshots,
    versions,
)
from export.rollout import finish, rollback
from hsnn_core.errors import HsnnError, PublishError, ServerError
from hsnn_core.files import sync_directory, write_bytes


def publish_candidate(
    source: str | Path,
    repository: str | Path,
    admin: Admin,
    options: ServingOptions | None = None,
    sign_key: Path | None = None,
) -> int:
    """Publish an export as the candidate and check it on a running server: its networks are loaded, warmed up and
    asked the smoke request. Returns its version.

    Raises what `publish` does, and PublishError with the reason when the check fails, ServerError when nobody answers
    any more: the candidate is withdrawn then, and the server serves what it served. Where that fails, too, the error
    has a note that says so."""
    repository = Path(repository)
    admin.states(ORCHESTRATOR)  # nobody there: say so before anything is written
    version = publish(source, repository, options=options, as_candidate=True, sign_key=sign_key)
    with _withdrawn_on_failure(repository, admin):
        check_candidate(repository, admin)
    return version


def publish_and_promote(
    source: str | Path, repository: str | Path, admin: Admin, sign_key: Path | None = None
) -> int:
    """`publish_candidate` and `promote_candidate` for a program that goes on by itself: a candidate that can't be
    promoted is withdrawn, too, or it would be in the way of the next one. Returns the version; raises what both do."""
    repository = Path(repository)
    publish_candidate(source, repository, admin, sign_key=sign_key)
    with _withdrawn_on_failure(repository, admin):
        return promote_candidate(repository, admin)


@contextmanager
def _withdrawn_on_failure(repository: Path, admin: Admin) -> Iterator[None]:
    """Withdraw the candidate, if there still is one, when the block raises HsnnError; that error goes on, with a note
    when the candidate could not be withdrawn."""
    try:
        yield
    except HsnnError as error:
        try:
            if candidate(repository) is not None:
                withdraw(repository, admin)
        except HsnnError as second:
            error.add_note(f"and then, as the candidate was withdrawn: {second}")
        raise


def check_candidate(repository: str | Path, admin: Admin) -> int:
    """Load the candidate's networks and replay its smoke request on them; return its version. PublishError says
    what failed; traffic has not touched the candidate then."""
    repository = Path(repository)
    with locked(repository, LOCK_PATIENCE):
        version = _candidate(repository)
        load_networks(f"candidate {version}", repository, version, admin)
    return version


def start_canary(repository: str | Path, admin: Admin, share: float = 0.0, shadow: bool = False) -> int:
    """Load the candidate's orchestrator as `hsnn_canary`; return its version.

    `share` of the requests go there from clients that follow the operator (`clients.canary.Canary`); with `shadow`
    they are answered by the stable model and copied to the canary. Raises PublishError as `check_candidate`."""
    repository = Path(repository)
    if not 0 <= share <= 1:
        raise PublishError(f"share is {share!r}, expected a number from 0 to 1")
    with locked(repository, LOCK_PATIENCE):
        version = _candidate(repository)
        what = f"candidate {version}"
        load_networks(what, repository, version, admin)
        path = repository / CANARY / CONFIG_FILE
        config = pbtxt.parse(path.read_text(), str(path))
        config.parameters["canary_share"].string_value = repr(float(share))
        config.parameters["canary_shadow"].string_value = str(shadow).lower()
        text = pbtxt.to_text(config)
        if text != path.read_text():
            write_bytes(path, text.encode())
        load_model(what, CANARY, version, repository, admin)
    return version


def stop_canary(repository: str | Path, admin: Admin, version: int | None = None) -> None:
    """Unload `hsnn_canary` once its requests are answered; the candidate stays. Nothing to do is no error, and so is
    a canary of another version than the given one."""
    with locked(Path(repository), LOCK_PATIENCE):
        if version is None or version in admin.states(CANARY):
            _unload(admin)


def promote_candidate(repository: str | Path, admin: Admin) -> int:
    """Make the candidate the newest snapshot and the server serve it; return its version.

    Its networks are loaded and asked the smoke request once more; the canary ends; the orchestrator's directory is
    renamed into `hsnn_retrieve`, from where a restart serves it, too; the load of `hsnn_retrieve` ends the
    rollout. When that load fails, the rename is undone and PublishError has the server's reason."""
    repository = Path(repository)
    with locked(repository, LOCK_PATIENCE):
        version = _candidate(repository)
        what = f"candidate {version}"
        load_networks(what, repository, version, admin)
        _unload(admin)
        target = repository / ORCHESTRATOR / str(version)
        before = _commit(repository, version)
        try:
            load_model(what, ORCHESTRATOR, version, repository, admin)
        except PublishError:
            _move(target, repository / CANARY / str(version))
            if before is not None:
                write_bytes(repository / ORCHESTRATOR / CONFIG_FILE, before.encode())
            raise
        remove_canary(repository)
        finish(repository, version, admin)
    return version


def withdraw(repository: str | Path, admin: Admin | None = None) -> int:
    """Give the candidate up: the canary ends and its directories move to `.retired`; return its version. Without
    `admin` only the files move."""
    repository = Path(repository)
    with locked(repository, LOCK_PATIENCE):
        version = _candidate(repository)
        # Not by its manifest: a damaged candidate can be withdrawn, too.
        (models,) = (snapshot.models for snapshot in snapshots(repository) if snapshot.version == version)
        networks = [model for model in models if model != CANARY]
        quiet: set[int] = set() if admin is None else _unload(admin)
        retire_candidate(repository, version)
        retire_leftovers(repository, admin, quiet)
        # Snapshots that were published and never served may stand in the way of a reload; then it can wait.
        if admin is not None and not pushed_out(repository, networks, serving(admin)):
            for model in networks if versions(repository) else ():
                try:
                    admin.load(model)
                except Exception as error:
                    raise PublishError(
                        f"candidate {version} is withdrawn, but the server did not reload {model}: {error}; what "
                        "serves goes on, and the next rollout loads it again"
                    ) from error
    return version


def roll_back(repository: str | Path, admin: Admin | None = None, to: int | None = None) -> str:
    """Undo the newest step, or everything newer than snapshot `to`; return what was done, for a person.

    The newest step is the candidate, if there is one; else the snapshot that serves. PublishError when `to` is no
    complete snapshot; see `rollout.rollback`."""
    repository = Path(repository)
    complete = versions(repository)
    if to is not None and to not in complete:
        raise PublishError(
            f"{repository}: no complete snapshot {to} there, expected one of {complete}; see hsnn rollout status"
        )
    done = []
    if candidate(repository) is not None:
        done.append(f"candidate {withdraw(repository, admin)} is withdrawn")
        if to is None:
            stays = f"snapshot {complete[-1]} goes on" if complete else "there is no other snapshot"
            return f"{done[0]}, {stays}"
    elif to is None:
        return f"snapshot {rollback(repository, admin)} serves"
    while any(snapshot.rolled_back for snapshot in snapshots(repository)) or versions(repository)[-1] > to:
        rollback(repository, admin)
    return "; ".join([*done, f"snapshot {to} serves"])


def _candidate(repository: Path) -> int:
    version = candidate(repository)
    if version is None:
        raise PublishError(
            f"{repository}: no candidate there; publish one with hsnn rollout publish (see hsnn rollout status)"
        )
    return version


def _unload(admin: Admin) -> set[int]:
    """End the canary, if it runs. One that never ends unloading is passed over like any orchestrator; see
    `await_drained`, whose return value and errors these are, and ServerError where the canary stays as it was."""

    def states() -> set[str]:
        return set(admin.states(CANARY).values()) - {"UNAVAILABLE"}

    found = states()
    if found - {UNLOADING}:
        try:
            admin.unload(CANARY)
        except ServerError:
            if states() - {UNLOADING}:
                raise
    return await_drained(admin) if found else set()


def _commit(repository: Path, version: int) -> str | None:
    """The rename of the orchestrator into service, under the configuration of its snapshot; returns the text of
    the one before, None for the first."""
    own = repository / CANARY / CONFIG_FILE
    config = pbtxt.renamed(pbtxt.parse(own.read_text(), str(own)), ORCHESTRATOR)
    for name in ("canary_share", "canary_shadow"):
        config.parameters.pop(name, None)
    directory = repository / ORCHESTRATOR
    directory.mkdir(exist_ok=True)
    path = directory / CONFIG_FILE
    before = path.read_text() if path.is_file() else None
    if (text := pbtxt.to_text(config)) != before:
        write_bytes(path, text.encode())
    _move(repository / CANARY / str(version), directory / str(version))
    return before


def _move(source: Path, target: Path) -> None:
    os.rename(source, target)
    for directory in (source.parent, target.parent):
        sync_directory(directory)
