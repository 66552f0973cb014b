"""What has to be known of a running server to talk to it, or to stop it, from another process."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hsnn_core.errors import ServerError

from .processes import ServerProcess, remove_regions

FORMAT_VERSION = 1
_PREFIX = re.compile(r"hsnn-[0-9a-z-]*")
_ADDRESS = re.compile(r"[^\s/:]+:\d+")


@dataclass(frozen=True)
class Urls:
    """``host:port`` of the three endpoints."""

    grpc: str
    http: str
    metrics: str


@dataclass(frozen=True)
class ServerState:
    """One running server. ``directory``: its private files, the admin key among them; ``region_prefix``:
    how its /dev/shm regions begin."""

    process: ServerProcess
    urls: Urls
    repository: Path
    directory: Path
    log_file: Path
    region_prefix: str

    @property
    def key_file(self) -> Path:
        return self.directory / "admin.key"

    def end(self, patience: float) -> None:
        """Stop the processes and remove all they left, even when the stopping is interrupted."""
        try:
            self.process.stop(patience)
        finally:
            remove_regions(self.region_prefix)
            shutil.rmtree(self.directory, ignore_errors=True)

    def write(self, path: Path) -> None:
        """As JSON, readable by the owner alone; written aside, then renamed."""
        content = json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2, default=str)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, content + "\n")

    @classmethod
    def read(cls, path: Path) -> ServerState:
        """ServerError when there is no such file, or when it is none of ours."""
        try:
            data: dict[str, Any] = json.loads(path.read_text())
            version = data["format_version"]
            if version != FORMAT_VERSION:
                raise ServerError(
                    f"{path}: format version {version}, expected {FORMAT_VERSION}; start the server anew"
                )
            state = cls(
                process=ServerProcess(**data["process"]),
                urls=Urls(**data["urls"]),
                repository=Path(data["repository"]),
                directory=Path(data["directory"]),
                log_file=Path(data["log_file"]),
                region_prefix=data["region_prefix"],
            )
            # What is named here is ended and removed, so it must not name anybody else's.
            numbers = (state.process.pid, state.process.started)
            if any(type(number) is not int or number < 1 for number in numbers):
                raise ValueError(f"process {numbers}")
            if not _PREFIX.fullmatch(state.region_prefix) or not all(
                map(_ADDRESS.fullmatch, vars(state.urls).values())
            ):
                raise ValueError(f"regions {state.region_prefix!r}, addresses {state.urls}")
            return state
        except FileNotFoundError as error:
            raise ServerError(
                f"{path}: no such file, so no server was left running there; start one"
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ServerError(f"{path}: not the state of a server ({error!r}); remove it") from error


def write_private(path: Path, text: str) -> None:
    """Write ``text`` for the owner's eyes only (mode 0600), atomically and durably."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
