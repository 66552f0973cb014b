"""manifest.json of a bundle: what the snapshot is, and sha256 and length of every other file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import FormatError
from .files import read_text

FORMAT = "hsnn-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
FILES = ("schema.json", "transform.hsnn", "index.hsnn", "smoke.npz")
RECORDS, ITEM_TOWER = "records.hsnn", "item_tower.onnx"
FIELDS = (
    "schema_hash", "tasks", "layers", "nodes", "widths", "k", "max_k", "buckets", "embedding_widths",
    "engine", "models", "created", "files",
)  # fmt: skip
_MODEL = re.compile(r"[a-z][a-z0-9_]*")  # becomes a folder of the repository
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a bundle, its format and every field checked, its files not. Raises FormatError."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise FormatError(
            f"{path}: missing, expected the manifest of a bundle; is this a bundle's directory?"
        )
    try:
        manifest = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error}); export the snapshot again") from error
    got = manifest.get("format") if isinstance(manifest, dict) else None
    if got != FORMAT:
        raise FormatError(f"{path}: format {got!r}, expected {FORMAT!r}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format version {manifest.get('format_version')!r}, expected {FORMAT_VERSION}; "
            "export the snapshot again with this release"
        )
    files = manifest.get("files", {})
    lacking = [field for field in FIELDS if field not in manifest]
    lacking += [f"files.{name}" for name in FILES if not isinstance(files, dict) or name not in files]
    if lacking:
        raise FormatError(f"{path}: {', '.join(lacking)} missing; export the snapshot again")
    check_models(path, manifest["models"])
    for field, (right, expected) in _CHECKS.items():
        if not right(manifest.get(field), manifest):
            raise FormatError(
                f"{path}: {field} is {json.dumps(manifest.get(field))[:120]}, expected {expected}; the file was "
                "edited, export the snapshot again"
            )
    return manifest


def check_models(path: Path, models: Any) -> None:
    """FormatError unless ``models`` are the names of a snapshot's models: they become folders of a repository."""
    named: list[Any] = [None]
    if isinstance(models, dict) and isinstance(models.get("scorers"), list):
        singles = [models.get("user_tower"), models.get("item_tower")]
        named = [*singles, *models["scorers"], *([models["index"]] if "index" in models else [])]
    if not all(isinstance(name, str) and _MODEL.fullmatch(name) for name in named):
        raise FormatError(
            f"{path}: models is {json.dumps(models)[:200]}, expected user_tower, item_tower and scorers, named like "
            "hsnn_user_tower; the file was edited, export the snapshot again"
        )


def inside(directory: Path, name: str) -> Path:
    """The path of a file of ``directory``. FormatError for a name that leads out of it, by itself or as a link."""
    plain = isinstance(name, str) and _FILE.fullmatch(name) is not None
    path = directory / name if plain else directory
    found = path.resolve()
    if found.parent != directory.resolve():
        raise FormatError(
            f"{directory}: file {name!r} lies elsewhere{f' ({found})' if plain else ''}, expected one of this very "
            "directory; copy the whole directory again, without links"
        )
    return path


def _count(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _counts(value: Any, least: int = 0) -> bool:
    return isinstance(value, list) and all(_count(number, least) for number in value)


def _text(value: Any, manifest: Mapping[str, Any]) -> bool:
    return isinstance(value, str) and bool(value)


def _layers(manifest: Mapping[str, Any]) -> int:
    return manifest["layers"] if _count(manifest["layers"], 1) else -1


_CHECKS: dict[str, tuple[Callable[[Any, Mapping[str, Any]], bool], str]] = {
    "schema_hash": (_text, "the hash of the schema"),
    "engine": (_text, "the name of an engine"),
    "created": (_text, "a time"),
    "layers": (lambda value, m: _count(value, 1), "a whole number of at least 1"),
    "tasks": (lambda value, m: isinstance(value, list) and all(_text(name, m) for name in value), "names of tasks"),
    "nodes": (lambda value, m: _counts(value, 1) and len(value) == _layers(m), "a count for every layer"),
    "widths": (lambda value, m: _counts(value, 1) and len(value) == _layers(m) - 1, "a count for every layer but one"),
    "max_k": (lambda value, m: _count(value, 1), "a whole number of at least 1"),
    "k": (lambda value, m: _count(value, 1) and value <= m["max_k"], "a whole number from 1 to max_k"),
    "embedding_widths": (lambda value, m: _counts(value, 1) and len(value) == _layers(m), "a width for every layer"),
    "buckets": (
        lambda value, m: isinstance(value, list) and len(value) == _layers(m) and all(_counts(s, 1) for s in value),
        "a list of counts for every layer",
    ),
    "models": (lambda value, m: len(value["scorers"]) == _layers(m), "a scorer for every layer"),
    "log_position": (lambda value, m: value is None or _count(value), "a position"),
    "log_identity": (lambda value, m: value is None or _text(value, m), "the identity of a log, or null"),
    "files": (
        lambda value, m: all(
            isinstance(file, dict) and set(file) == {"sha256", "bytes"} and _count(file["bytes"])
            and isinstance(file.get("sha256"), str) and bool(_SHA256.fullmatch(file["sha256"]))
            for file in value.values()
        ),
        "sha256 and bytes of every file",
    ),
}  # fmt: skip
