"""hsnn train --follow: learn from a stream of impression files, and publish a snapshot every few minutes."""

from __future__ import annotations

import argparse
import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clients.admin import RepositoryAdmin
from clients.tls import Tls
from export.candidate import publish_and_promote
from export.export_run import export_run
from export.publish import publish
from export.retire import retire
from hsnn_core.errors import DataError, FeatureError, HsnnError, PublishError
from hsnn_train.checkpoint import write_json
from hsnn_train.follow import Follower
from hsnn_train.follow_report import read_rows
from hsnn_train.guards import interrupt_flag
from hsnn_train.plots import progressive_validation
from hsnn_train.trainer import Interrupted

from .connection import admin_key, tls_of

LOCK_FILE, PUBLISHED = ".follow.lock", "published.json"
CHECKPOINT_SECONDS = 60.0  # a checkpoint at least this often while there is something to learn from
KEPT = 2  # snapshots on the disk where this command serves them: the one in service and one to roll back to
LOOK_SECONDS = 1.0  # between two looks into the folder


@dataclass(frozen=True)
class Snapshots:
    """Where snapshots of a run go: exported with their gates, published, and with ``url`` put into service there."""

    run: Path
    repository: Path
    engine: str
    url: str | None
    key: str | None
    embeddings: str = "float32"
    tls: Tls | None = None
    sign_key: Path | None = None

    def last(self) -> dict[str, Any]:
        """What the newest one here was made of: version, files, repository; empty before the first."""
        path = self.run / PUBLISHED
        found = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("repository") == str(self.repository.absolute()) else {}

    def make(self, files: int, users: dict[str, Any] | None) -> str:
        """One snapshot of the run's checkpoint, which has learnt from ``files`` files; says what was done. Raises
        HsnnError and OSError."""
        began = time.monotonic()
        exported = export_run(self.run, self.engine, users=users, progress=False, embeddings=self.embeddings)
        served = ""
        if self.url is None:
            version = publish(exported.path, self.repository, sign_key=self.sign_key)
        else:
            with RepositoryAdmin(self.url, self.key, tls=self.tls) as admin:
                version = publish_and_promote(exported.path, self.repository, admin, self.sign_key)
                retire(self.repository, admin, KEPT)
            served = f", served at {self.url}"
        made = {"repository": str(self.repository.absolute()), "version": version, "files": files}
        write_json(self.run / PUBLISHED, made)
        return f"published version {version}{served}, {time.monotonic() - began:.1f} s after the checkpoint"


class Following:
    """The loop: files as they arrive, checkpoints, snapshots, what is shown of it.

    ``every``: seconds between snapshots; ``snapshots``: None makes none.
    """

    def __init__(self, follower: Follower, snapshots: Snapshots | None, every: float, progress: bool) -> None:
        self.follower, self.snapshots, self.every = follower, snapshots, every
        self.saved_at = self.published_at = time.monotonic()
        # A run that was stopped may have learnt more than its last snapshot has.
        learnt, made = len(follower.files), snapshots.last() if snapshots is not None else {}
        self.unpublished = bool(follower.note) or (learnt > 0 and made.get("files") != learnt)
        self.unsaved = bool(follower.note)
        self.failed = ""  # why the last snapshot was not published
        self.ne = ""
        self.bar = tqdm(initial=follower.seen, unit=" impressions", disable=not progress, mininterval=0.5)

    def run(self, once: bool) -> None:
        """Until Ctrl-C, or ``once`` over the files that are there now.

        Raises Interrupted after Ctrl-C, PublishError when ``once`` ends without its snapshot, and what `Follower`
        raises."""
        follower = self.follower
        with self.bar, interrupt_flag() as interrupted:
            todo = follower.waiting()
            while not interrupted():
                self._tables()
                names = todo if once else follower.waiting()
                if names:
                    self._file(names[0])
                    todo = todo[1:]
                if (once and not todo) or (self.unpublished and self._due() <= 0):
                    self._snapshot()
                if self.unsaved and time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                    self._save()
                if once and not todo:
                    break
                self._show()
                if not names:
                    time.sleep(LOOK_SECONDS)
            if self.unsaved:
                self._save()
            rows = read_rows(follower.run)
            self.say(f"plot: {progressive_validation(rows, follower.run / 'plots' / 'follow.png')}")
            self.say(self.summary())
            if interrupted():
                raise Interrupted(
                    f"stopped after {len(follower.files)} files; the checkpoint is in {follower.run}; the same command "
                    "goes on"
                )
        if self.failed:
            raise PublishError(self.failed)

    def summary(self) -> str:
        """What the run has seen so far, in one line."""
        follower = self.follower
        bad = (
            f"; {len(follower.bad)} bad files skipped: {', '.join(sorted(follower.bad))}"
            if follower.bad
            else ""
        )
        return (
            f"{len(follower.files)} files, {follower.seen:,} impressions learnt from, {follower.dropped:,} left out "
            f"(items that the items table lacks){bad}"
        )

    def say(self, text: str) -> None:
        """A line above the bar."""
        if text:
            self.bar.write(text)

    def _tables(self) -> None:
        said = self.follower.update_tables()
        if said.startswith("items"):
            self.unsaved = self.unpublished = True
        self.say(said)

    def _file(self, name: str) -> None:
        follower, began = self.follower, time.monotonic()
        self._show(name)
        try:
            row, warnings = follower.take(name, lambda count: self.bar.update(count) and None)
        except (DataError, FeatureError) as error:
            self.say(f"skipped, nothing learnt from it: {error} ({len(follower.bad)} bad files so far)")
            return
        self.unsaved = True
        if row is None:
            self.say(f"{name}: no impressions")
            return
        self.unpublished = True
        last = [own for own in row["pointwise"] if own["layer"] == follower.model.layers]
        self.ne = ", ".join(f"{own['task']} NE {_figure(own['ne'])}" for own in last)
        rate = row["impressions"] / (time.monotonic() - began)
        simulated = " (simulated)" if row["simulated"] else ""
        left_out = f" ({row['dropped']} left out)" if row["dropped"] else ""
        self.say(
            f"{name}{simulated}: {row['impressions']:,} impressions{left_out}, {self.ne}; {rate:,.0f} impressions/s"
        )
        for warning in warnings:
            self.say(f"warning: {warning}")

    def _due(self) -> float:
        """Seconds until the next snapshot."""
        return float("inf") if self.snapshots is None else self.published_at + self.every - time.monotonic()

    def _save(self) -> None:
        self.follower.save()
        self.saved_at, self.unsaved = time.monotonic(), False

    def _snapshot(self) -> None:
        if self.unsaved:
            self._save()
        if self.snapshots is None or not self.unpublished:
            return
        self._show("a snapshot")
        try:
            self.say(self.snapshots.make(len(self.follower.files), self.follower.users))
            self.unpublished, self.failed = False, ""
        except (HsnnError, OSError) as error:
            self.failed = f"not published: {error}"
            self.say(
                f"{self.failed}; what was served before is served on, training goes on, and the next snapshot is tried "
                f"in {self.every / 60:g} minutes"
            )
        self.published_at = time.monotonic()

    def _show(self, doing: str = "waiting") -> None:
        due = self._due()
        parts = [f"{len(self.follower.files)} files"]
        parts += [f"{len(self.follower.bad)} bad"] if self.follower.bad else []
        parts += [self.ne] if self.ne else []
        if self.snapshots is not None:
            parts.append(f"next snapshot in {max(0, int(due)) // 60}:{max(0, int(due)) % 60:02d}")
        self.bar.set_description_str(doing, refresh=False)
        self.bar.set_postfix_str(", ".join(parts))


def _figure(ne: float | None) -> str:
    return "undefined" if ne is None else f"{ne:.4f}"


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """One follower of a run at a time; a killed one leaves no lock behind. HsnnError when another is at work."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise HsnnError(f"run {run}: another process follows a stream there; stop it first") from error
        yield


def run_follow(options: argparse.Namespace) -> None:
    """hsnn train --follow."""
    snapshots = None
    if options.repository is not None:
        key, tls = admin_key(options.key_file), tls_of(options)
        engine = options.engine or "onnxruntime"
        snapshots = Snapshots(
            options.run,
            options.repository,
            engine,
            options.url,
            key,
            options.embeddings or "float32",
            tls,
            options.sign_key,
        )
    with alone(options.run):
        follower = Follower(options.follow, options.run, options.base)
        following = Following(follower, snapshots, 60 * (options.publish_every or 10.0), progress=True)
        following.say(follower.note)
        following.say(f"follows {follower.stream}, began from {follower.base}: {following.summary()}")
        following.run(options.once)
