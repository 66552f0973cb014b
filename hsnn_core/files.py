"""Writing files so that a crash leaves the old one or the new one: aside, to the disk, renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import FormatError

_CHUNK = 1 << 20


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write in place of `path`: aside, fsynced, renamed. A reader sees the old or the new content, never
    a part; whatever fails leaves the old content and nothing aside."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """A file of these bytes; see `written_aside`."""
    with written_aside(path) as file:
        file.write(data)


def read_text(path: Path) -> str:
    """A text file in UTF-8. Raises FormatError for one that is not, or cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(
            f"{path}: cannot be read as text ({error}); restore it or write it again"
        ) from error


def copy_file(source: Path, target: Path) -> None:
    """Copy contents (not times or owners) to `target`, through to the disk."""
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, _CHUNK)
        writer.flush()
        os.fsync(writer.fileno())


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
