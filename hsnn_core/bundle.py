"""A snapshot's data in one directory: what the search needs besides the networks, and proof that it is whole.

manifest.json    what the snapshot is, and sha256 and length of every other file
schema.json      the schema
transform.hsnn   vocabularies and normalisation
index.hsnn       index, I2IF forward lists, node embeddings, codebooks and items' attributes, memory-mapped
smoke.npz        a few users' raw wire tensors and the items they must get
records.hsnn     what changing the items needs: their features and distances
item_tower.onnx  embeds items that are added

The last two are in every bundle that this release writes; without them items cannot change.

Files that the manifest does not list (the orchestrator's code lies in the same directory) are left alone.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .arrayfile import open_arrays, write_arrays
from .corpus import Corpus
from .errors import FormatError, PublishError, SchemaMismatch
from .features import FeatureTransform
from .files import copy_file, file_sha256, read_text, sync_directory, write_bytes
from .i2if import I2IF
from .index import HierarchicalIndex
from .item_attributes import ItemAttributes
from .item_records import ItemRecords
from .manifest import FILES, FORMAT, FORMAT_VERSION, ITEM_TOWER, MANIFEST, RECORDS, inside, read_manifest
from .schema import Schema
from .scorer import PAIRS_PER_CALL, LayerScorer, Runner


class LogPosition(NamedTuple):
    """All updates up to ``position`` of the log with this ``identity``; None for none of any."""

    position: int
    identity: str | None


NO_LOG = LogPosition(0, None)


@dataclass(frozen=True)
class Smoke:
    """A request with its answer, replayed before a snapshot goes live.

    ``users``: raw wire tensors, one (B, ...) array per user feature; ``item_ids`` (B, K) int64 and
    ``probabilities`` (B, K, T) float32: what the search at the default widths and k returned at export.
    """

    users: dict[str, np.ndarray]
    item_ids: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; arrays are read-only views of the mapped files. ``i2if`` is None without
    interactions, ``records`` in a bundle that was written before items could change, ``attributes`` (by position)
    without eligibility attributes and bid."""

    path: Path
    manifest: dict[str, Any]
    schema: Schema
    transform: FeatureTransform
    index: HierarchicalIndex
    i2if: I2IF | None
    embeddings: list[np.ndarray]
    codebooks: list[np.ndarray]
    records: ItemRecords | None
    attributes: ItemAttributes | None

    @classmethod
    def open(cls, directory: str | Path, verify: bool = True) -> Bundle:
        """Open and check a bundle. ``verify`` also compares every file's sha256 with the manifest.

        Raises FormatError naming the file that is missing, edited, cut short or of another format version,
        and SchemaMismatch when the schema is not the manifest's.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        for name, expected in manifest["files"].items():
            _check_file(inside(directory, name), expected, verify)
        schema = Schema.from_json(read_text(directory / "schema.json"))
        if schema.hash != manifest["schema_hash"]:
            raise SchemaMismatch(
                f"{directory}: schema.json has hash {schema.hash}, the manifest says "
                f"{manifest['schema_hash']}; the directory mixes two snapshots, export again"
            )
        # The files' sha256 were compared above; the array files need not hash themselves again.
        transform = FeatureTransform.from_arrays(
            schema, open_arrays(directory / "transform.hsnn", "transform", verify=False).arrays
        )
        arrays = open_arrays(directory / "index.hsnn", "index", verify=False).arrays
        index = HierarchicalIndex.from_arrays(_under("index", arrays))
        nodes = [index.nodes(layer) for layer in range(1, index.layers + 1)]
        if nodes != manifest["nodes"] or index.layers != manifest["layers"]:
            raise FormatError(
                f"{directory / 'index.hsnn'}: nodes per layer {nodes}, the manifest says "
                f"{manifest['nodes']}; the directory mixes two snapshots, export again"
            )
        records = None
        if RECORDS in manifest["files"]:
            file = open_arrays(directory / RECORDS, "records", verify=False)
            records = ItemRecords.from_arrays(file.arrays, index)
        return cls(
            directory,
            manifest,
            schema,
            transform,
            index,
            I2IF.from_arrays(schema, transform, arrays) if schema.interactions else None,
            _numbered("embedding", arrays),
            _numbered("codebook", arrays),
            records,
            ItemAttributes.from_arrays(schema, arrays),
        )

    @property
    def log(self) -> LogPosition:
        """How much of which log of item updates the bundle contains."""
        return LogPosition(int(self.manifest.get("log_position", 0)), self.manifest.get("log_identity"))

    @property
    def corpus(self) -> Corpus:
        """What the bundle was written from."""
        return Corpus(self.index, self.i2if, self.embeddings, self.codebooks, self.records, self.attributes)

    def scorer(self, runner: Runner, pairs_per_call: int = PAIRS_PER_CALL) -> LayerScorer:
        """A scorer over this bundle's data with the buckets its networks were built for."""
        buckets = self.manifest["buckets"]
        return LayerScorer(self.index, self.i2if, self.embeddings, runner, buckets, pairs_per_call)

    def smoke(self) -> Smoke:
        """The smoke request and its expected answer. Raises FormatError for a file that holds none."""
        path = self.path / "smoke.npz"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                users = {name[5:]: arrays[name] for name in arrays.files if name.startswith("user.")}
                return Smoke(users, arrays["item_ids"], arrays["probabilities"])
        except Exception as error:  # NumPy and zipfile raise a dozen unrelated classes
            raise FormatError(
                f"{path}: not the smoke request of a bundle ({error}); export the snapshot again"
            ) from error


def write_bundle(
    directory: str | Path,
    schema: Schema,
    transform: FeatureTransform,
    corpus: Corpus,
    smoke: Smoke,
    *,
    widths: Sequence[int],
    k: int,
    max_k: int,
    buckets: Sequence[Sequence[int]],
    engine: str,
    models: Mapping[str, Any],
    item_tower: Path | None = None,
    log: LogPosition = NO_LOG,
) -> dict[str, Any]:
    """Write a bundle and return its manifest. All or nothing: written aside, synced, renamed.

    ``widths``, ``k``: the search's defaults; ``max_k``: the most a request may ask for; ``buckets``:
    candidate counts per layer ([] for any); ``models``: {"user_tower": name, "item_tower": name, "scorers":
    [name, ...], "index": name}. ``item_tower``: ONNX graph that embeds items that are added, for a corpus with records;
    ``log``: how much of which log of item updates the corpus contains.

    Raises PublishError when the directory exists or the settings do not fit the index.
    """
    directory = Path(directory)
    layers = corpus.index.layers
    for name, given, expected in (
        ("widths", len(widths), layers - 1),
        ("buckets", len(buckets), layers),
        ("scorers in models", len(models["scorers"]), layers),
    ):
        if given != expected:
            raise PublishError(
                f"{directory}: {given} {name}, expected {expected} for an index of {layers} layers"
            )
    if not 1 <= k <= max_k:
        raise PublishError(f"{directory}: k {k} and max_k {max_k}, expected 1 <= k <= max_k")
    if schema.has_attributes and corpus.attributes is None:
        raise PublishError(
            f"{directory}: the schema declares eligibility or a bid, the corpus has no attributes; give it "
            "Corpus.with_attributes"
        )
    if directory.exists():
        raise PublishError(
            f"{directory}: exists already; a bundle is never overwritten, remove it or write elsewhere"
        )

    aside = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write_bytes(aside / "schema.json", schema.to_json().encode())
        write_arrays(aside / "transform.hsnn", "transform", transform.to_arrays(), {})
        write_arrays(aside / "index.hsnn", "index", _corpus_arrays(corpus), {})
        write_bytes(aside / "smoke.npz", _smoke_bytes(smoke))
        names = list(FILES)
        if corpus.records is not None and item_tower is not None:
            write_arrays(aside / RECORDS, "records", corpus.records.to_arrays(), {})
            copy_file(item_tower, aside / ITEM_TOWER)
            names += [RECORDS, ITEM_TOWER]
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "schema_hash": schema.hash,
            "tasks": [task.name for task in schema.tasks],
            "layers": layers,
            "nodes": [corpus.index.nodes(layer) for layer in range(1, layers + 1)],
            "widths": [int(width) for width in widths],
            "k": int(k),
            "max_k": int(max_k),
            "buckets": [[int(size) for size in sizes] for sizes in buckets],
            "embedding_widths": [int(table.shape[1]) for table in corpus.embeddings],
            "engine": engine,
            "models": dict(models),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "log_position": log.position,
            "log_identity": log.identity,
            "files": {name: _fingerprint(aside / name) for name in names},
        }
        write_bytes(aside / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        sync_directory(aside)
        os.rename(aside, directory)
        sync_directory(directory.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return manifest


def _check_file(path: Path, expected: Mapping[str, Any], verify: bool) -> None:
    if not path.is_file():
        raise FormatError(
            f"{path}: missing, expected {expected['bytes']} bytes with sha256 {expected['sha256']}; "
            "copy the whole directory again"
        )
    length = path.stat().st_size
    if verify:
        digest = _fingerprint(path)["sha256"]
        if digest != expected["sha256"] or length != expected["bytes"]:
            raise FormatError(
                f"{path}: {length} bytes with sha256 {digest}, expected {expected['bytes']} bytes with "
                f"sha256 {expected['sha256']}; the file was edited or cut short, copy the directory again"
            )
    elif length != expected["bytes"]:
        raise FormatError(
            f"{path}: {length} bytes, expected {expected['bytes']}; the file was edited or cut short, "
            "copy the directory again"
        )


def _corpus_arrays(corpus: Corpus) -> dict[str, np.ndarray]:
    arrays = {f"index.{name}": array for name, array in corpus.index.to_arrays().items()}
    if corpus.i2if is not None:
        arrays |= corpus.i2if.to_arrays()
    for kind, tables in (("embedding", corpus.embeddings), ("codebook", corpus.codebooks)):
        arrays |= {f"{kind}.{number}": table for number, table in enumerate(tables, start=1)}
    if corpus.attributes is not None:
        arrays |= corpus.attributes.to_arrays()
    return arrays


def _under(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    start = f"{prefix}."
    return {name[len(start) :]: array for name, array in arrays.items() if name.startswith(start)}


def _numbered(prefix: str, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    found = _under(prefix, arrays)
    if not all(number.isdecimal() for number in found):
        raise FormatError(
            f"index.hsnn: arrays {sorted(found)} under {prefix}, expected numbers; export the snapshot again"
        )
    return [np.asarray(found[number]) for number in sorted(found, key=int)]


def _smoke_bytes(smoke: Smoke) -> bytes:
    buffer = io.BytesIO()
    users = {f"user.{name}": value for name, value in smoke.users.items()}
    np.savez(buffer, item_ids=smoke.item_ids, probabilities=smoke.probabilities, **users)
    return buffer.getvalue()


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}
