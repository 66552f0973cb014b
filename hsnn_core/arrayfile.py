"""One file, many arrays, memory-mapped.

    magic b"HSNNARR\\0" | u32 format version | u32 header length | JSON header | zeros up to 64 | payload

The header is {kind, meta, arrays: {name: {dtype, shape, offset, nbytes}}, payload_nbytes, sha256}; offsets
count from the start of the payload, and every array starts at a multiple of 64. All numbers are
little-endian; sha256 is the payload's.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from .errors import FormatError
from .files import sync_directory

MAGIC = b"HSNNARR\0"
FORMAT_VERSION = 1
ALIGNMENT = 64
PREFIX = struct.Struct("<8sII")
HASH_CHUNK = 1 << 24


@dataclass(frozen=True)
class ArrayFile:
    """An open file: ``arrays`` are read-only views of the mapped file, valid as long as they are held."""

    arrays: Mapping[str, np.ndarray]
    meta: dict[str, Any]


def write_arrays(
    path: str | Path, kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any] | None = None
) -> None:
    """Write arrays of bool, integer or float dtype, and JSON-able ``meta``.

    The file appears whole or not at all: written aside, fsynced, renamed. Raises FormatError for a dtype that
    the format does not hold, and when the disk refuses (nothing is left behind).
    """
    path = Path(path)
    stored = {name: _storable(path, name, array) for name, array in arrays.items()}
    entries, offset = {}, 0
    for name, array in stored.items():
        entries[name] = {
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "offset": offset,
            "nbytes": array.nbytes,
        }
        offset += _aligned(array.nbytes)
    digest = hashlib.sha256()
    for piece in _payload(stored):
        digest.update(piece)
    header = json.dumps(
        {
            "kind": kind,
            "meta": dict(meta or {}),
            "arrays": entries,
            "payload_nbytes": offset,
            "sha256": digest.hexdigest(),
        },
        separators=(",", ":"),
    ).encode("utf-8")
    start = PREFIX.size + len(header)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(PREFIX.pack(MAGIC, FORMAT_VERSION, len(header)))
            file.write(header)
            file.write(bytes(_aligned(start) - start))
            for piece in _payload(stored):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_directory(path.parent)
    except OSError as error:
        raise FormatError(
            f"{path}: could not write {_aligned(start) + offset} bytes ({error.strerror or error}); "
            "make room or choose another folder"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def open_arrays(path: str | Path, kind: str, verify: bool = True) -> ArrayFile:
    """Map the file of that kind; ``verify`` reads all of it once to check its sha256.

    Raises FormatError naming the file, what was got and what is expected: no file, wrong magic, format
    version or kind, truncated, damaged.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            prefix = file.read(PREFIX.size)
            if len(prefix) < PREFIX.size or not prefix.startswith(MAGIC):
                raise FormatError(
                    f"{path}: starts with {prefix[:8]!r}, expected {MAGIC!r}: not an array file"
                )
            _, version, header_length = PREFIX.unpack(prefix)
            if version != FORMAT_VERSION:
                raise FormatError(
                    f"{path}: format version {version}, expected {FORMAT_VERSION}; write it again with this "
                    "release, or read it with the one that wrote it"
                )
            start = _aligned(PREFIX.size + header_length)
            if length < start:
                raise FormatError(
                    f"{path}: truncated: {length} bytes, expected at least {start} for its header"
                )
            header = _header(path, file.read(header_length))
            # A mapping outlives the descriptor; after a rename over the file it still shows the old content.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    if header["kind"] != kind:
        raise FormatError(f"{path}: holds kind {header['kind']!r}, expected {kind!r}")
    if length != start + header["payload_nbytes"]:
        what = "truncated" if length < start + header["payload_nbytes"] else "too long"
        raise FormatError(f"{path}: {what}: {length} bytes, expected {start + header['payload_nbytes']}")
    if verify:
        found = _digest(memoryview(mapped)[start:])
        if found != header["sha256"]:
            raise FormatError(
                f"{path}: damaged or edited: its payload has sha256 {found}, expected {header['sha256']}; "
                "restore it or write it again"
            )
    views = {
        name: _view(path, name, mapped, start, header, entry) for name, entry in header["arrays"].items()
    }
    return ArrayFile(MappingProxyType(views), header["meta"])


def _header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
        expected = {"kind": str, "meta": dict, "arrays": dict, "payload_nbytes": int, "sha256": str}
        if all(isinstance(header[key], of) for key, of in expected.items()):
            return header
    except (ValueError, KeyError, TypeError):
        pass
    raise FormatError(f"{path}: damaged: its header is not the expected JSON; restore it or write it again")


def _view(
    path: Path, name: str, mapped: mmap.mmap, start: int, header: dict[str, Any], entry: dict[str, Any]
) -> np.ndarray:
    try:
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        fits = 0 <= entry["offset"] <= header["payload_nbytes"] - entry["nbytes"]
        if dtype.kind not in "biuf" or count * dtype.itemsize != entry["nbytes"] or min(shape, default=0) < 0:
            fits = False
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise FormatError(f"{path}: damaged: array {name!r} is described as {entry}, which cannot be")
    if count == 0:
        empty = np.empty(shape, dtype)
        empty.flags.writeable = False
        return empty
    return np.frombuffer(mapped, dtype, count, start + entry["offset"]).reshape(shape)


def _storable(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise FormatError(
            f"{path}: array {name!r} is {array.dtype}, expected bool, integers or floats of at most 64 bits"
        )
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _payload(arrays: Mapping[str, np.ndarray]) -> Iterator[memoryview | bytes]:
    for array in arrays.values():
        if array.nbytes:
            yield array.reshape(-1).view(np.uint8).data
        yield bytes(_aligned(array.nbytes) - array.nbytes)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _digest(payload: memoryview) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(payload), HASH_CHUNK):
        digest.update(payload[start : start + HASH_CHUNK])
    return digest.hexdigest()
