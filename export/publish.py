"""Publishing a snapshot: all models get the same new version, and the repository is never half-changed.

Every version directory is written aside, verified and flushed to the disk; then one rename per model, the
orchestrator last. That rename is the commit: before it the repository serves what it served, whenever the
process is killed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import Message

from export import pbtxt
from export.exported import Exported, check_sha256, open_export
from export.pbtxt import CONFIG_FILE, INDEX, ORCHESTRATOR, ServingOptions
from export.repository import CANARY, STAGING, candidate, locked, next_version, recover, versions
from export.vendor import INDEX_SOURCES, ORCHESTRATOR_SOURCES, vendor, verify_code
from hsnn_core.bundle import Bundle
from hsnn_core.errors import PublishError
from hsnn_core.files import copy_file, sync_directory, write_bytes
from hsnn_core.item_log import LogReader
from hsnn_core.signature import sign


@dataclass(frozen=True)
class _Plan:
    """What a publish is going to do. `configs`: text per model in load order, `orchestrator` last, which is the
    canary's name for a candidate."""

    exported: Exported
    repository: Path
    version: int
    configs: Mapping[str, str]
    orchestrator: str

    def staging(self, model: str) -> Path:
        return self.repository / model / f"{STAGING}{self.version}"

    def target(self, model: str) -> Path:
        return self.repository / model / str(self.version)


def publish(
    source: str | Path,
    repository: str | Path,
    version: int | None = None,
    options: ServingOptions | None = None,
    as_candidate: bool = False,
    sign_key: Path | None = None,
) -> int:
    """Publish an export as the next snapshot and return its version; no server is told (see
    `rollout.promote`).

    `source`: a run directory or its export folder. `version`: refused unless above every earlier one
    (default: the next). `options`: None keeps those of the repository (`current_options`). `as_candidate`: no
    server takes it into service until it is promoted (see `candidate.promote_candidate`). `sign_key`: PEM of an
    Ed25519 private key that signs all files of the snapshot (`hsnn_core.signature`). Leftovers of a killed
    publish are removed first.

    Raises PublishError: no finished export, a version in use, a candidate that waits, tensor shapes or a schema
    that the repository's other versions don't share, no space; FormatError: a file that changed since the
    export. Nothing is published then."""
    repository = Path(repository)
    exported = open_export(Path(source))
    bundle = exported.verify()
    try:
        repository.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PublishError(f"{repository}: {error}; expected a folder to publish into") from error
    with locked(repository):
        number = _version(repository, version)
        recover(repository)
        if (waiting := candidate(repository)) is not None:
            raise PublishError(
                f"{repository}: candidate {waiting} waits there, and the networks of one more snapshot would push "
                "those that serve out; promote it or roll it back first (hsnn rollout)"
            )
        published = bool(versions(repository))
        chosen = options or current_options(repository)
        _check_log(bundle, repository / chosen.item_log)
        messages = model_configs(exported, bundle, chosen)
        if published:
            _check_compatible(repository, messages)
        if as_candidate:
            messages[-1] = pbtxt.renamed(messages[-1], CANARY)
        configs = {message.name: pbtxt.to_text(message) for message in messages}
        plan = _Plan(exported, repository, number, configs, messages[-1].name)
        try:
            _stage(plan)
            if sign_key is not None:
                directories = {model: plan.staging(model) for model in (*plan.configs,)[:-1]}
                directories[ORCHESTRATOR] = plan.staging(plan.orchestrator)
                sign(directories, ORCHESTRATOR, number, sign_key)
                sync_directory(directories[ORCHESTRATOR])
            if as_candidate or not published:
                _write_configs(plan)
            _commit(plan)
        except BaseException as error:
            recover(repository)
            if isinstance(error, OSError):
                done = "is" if number in (*versions(repository), candidate(repository)) else "was not"
                raise PublishError(f"{repository}: {error}; version {number} {done} published") from error
            raise
        # Committed. What may differ now (defaults, worker counts) suits the earlier versions as well.
        try:
            _write_configs(plan)
        except OSError as error:
            raise PublishError(
                f"{repository}: {error}; version {number} is published, under the configuration before it"
            ) from error
    return number


def current_options(repository: str | Path) -> ServingOptions:
    """The options a repository was published with; the defaults when it is empty. `k` and `widths` are
    None: they follow each snapshot unless given."""
    path = Path(repository) / ORCHESTRATOR / CONFIG_FILE
    if not path.is_file():
        return ServingOptions()
    orchestrator = pbtxt.parse(path.read_text(), str(path))
    tower_path = Path(repository) / "hsnn_user_tower" / CONFIG_FILE
    tower = pbtxt.parse(tower_path.read_text(), str(tower_path))
    return pbtxt.options_of(orchestrator, tower)


def _version(repository: Path, version: int | None) -> int:
    following = next_version(repository)
    if version is None:
        return following
    if version < following:
        raise PublishError(
            f"{repository}: version {version} is not free, expected at least {following}: "
            "numbers are never used again"
        )
    return version


def model_configs(exported: Exported, bundle: Bundle, options: ServingOptions) -> list[Message]:
    """The configuration of every model of an export, in load order. PublishError when its parts do not fit together."""
    if options.mode == "in_process" and exported.engine.name != "onnxruntime":
        raise PublishError(
            f"mode in_process runs ONNX files inside the orchestrator, but the export's engine is "
            f"{exported.engine.name}; publish with mode bls, or export with the engine onnxruntime"
        )
    manifest = bundle.manifest
    if options.k is not None and options.k > manifest["max_k"]:
        raise PublishError(
            f"option k is {options.k}, expected at most {manifest['max_k']}: the max_k of {exported.path}"
        )
    configs = [
        pbtxt.network_config(graph.signature, exported.engine, graph.buckets, options)
        for graph in exported.graphs
    ]
    named = [
        manifest["models"]["user_tower"],
        manifest["models"]["item_tower"],
        *manifest["models"]["scorers"],
    ]
    if [config.name for config in configs] != named:
        raise PublishError(
            f"{exported.path}: graphs of {[config.name for config in configs]}, but the bundle's manifest "
            f"names {named}; export the run again"
        )
    if manifest["models"].get("index") != INDEX:
        raise PublishError(
            f"{exported.path}: the bundle's manifest names {manifest['models'].get('index')!r} for item updates, "
            f"expected {INDEX!r}; export the run again with this release"
        )
    orchestrator = pbtxt.orchestrator_config(
        bundle.schema, int(manifest["layers"]), int(manifest["k"]), manifest["widths"], options
    )
    return [*configs, pbtxt.index_config(bundle.schema, options), orchestrator]


def _check_log(bundle: Bundle, log: Path) -> None:
    """Refuse (PublishError) a bundle that could not follow the log of its repository: it lacks updates that the log has
    forgotten, or contains updates of another log."""
    with LogReader(log, bundle.schema.hash) as reader:
        identity, oldest = reader.identity(), reader.oldest()
    contained = bundle.log
    if contained.identity is not None and contained.identity != identity:
        raise PublishError(
            f"{bundle.path}: contains updates of the item log {contained.identity}, but that of the repository, {log}, "
            f"is {identity or 'empty'}; publish into the repository of its log, or export without updates"
        )
    if contained.position < oldest:
        raise PublishError(
            f"{bundle.path}: contains the updates of {log} up to position {contained.position}, but those up to "
            f"{oldest} are forgotten there; train with an item table that has them and say so "
            "(hsnn export --contains-log), or compact an export that has them"
        )


def _check_compatible(repository: Path, configs: list[Message]) -> None:
    for new in configs:
        path = repository / new.name / CONFIG_FILE
        if not path.is_file():
            raise PublishError(
                f"{repository}: model {new.name} is not there, but versions without it are published; "
                "publish into a new, empty repository (a new generation) and move the traffic there"
            )
        pbtxt.check_compatible(pbtxt.parse(path.read_text(), str(path)), new)


def _stage(plan: _Plan) -> None:
    """Write every version directory aside and verify what the disk holds."""
    engine = plan.exported.engine
    for model in plan.configs:
        plan.staging(model).mkdir(parents=True)
    for graph in plan.exported.graphs:
        staged = plan.staging(graph.signature.model_name) / engine.filename
        copy_file(plan.exported.path / graph.file, staged)
        check_sha256(staged, graph.sha256)
    for model, sources in ((INDEX, INDEX_SOURCES), (plan.orchestrator, ORCHESTRATOR_SOURCES)):
        vendor(plan.staging(model), sources)
        verify_code(plan.staging(model))
    copy_file(plan.exported.bundle / "schema.json", plan.staging(INDEX) / "schema.json")
    directory = plan.staging(plan.orchestrator)
    for path in sorted(plan.exported.bundle.iterdir()):
        copy_file(path, directory / path.name)
    Bundle.open(directory, verify=True)
    for model in plan.configs:
        sync_directory(plan.staging(model))


def _commit(plan: _Plan) -> None:
    for model in plan.configs:
        os.rename(plan.staging(model), plan.target(model))
        sync_directory(plan.target(model).parent)


def _write_configs(plan: _Plan) -> None:
    """Write the configurations that differ; an unchanged file keeps its time, so Triton reloads nothing
    for it."""
    for model, text in plan.configs.items():
        path = plan.repository / model / CONFIG_FILE
        if not path.is_file() or path.read_text() != text:
            write_bytes(path, text.encode())
