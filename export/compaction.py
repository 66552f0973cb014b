"""Folding the item updates of a log into the next snapshot: the same networks over the items that are live now.

A server keeps the changes since its snapshot in memory, and replays them when it starts. A compaction makes both short
again: it brings an export up to the log as a server does, builds the index anew over what is live, and writes an export
that `publish` takes like any other. It runs beside the servers, and needs none.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from export.build_index import OnnxItemTower
from export.candidate import publish_and_promote
from export.exported import BUNDLE_DIR, EXPORT_FILE, Exported, open_export
from export.loading import Admin
from export.retire import retire
from hsnn_core.bundle import Bundle, Smoke, write_bundle
from hsnn_core.corpus import Corpus
from hsnn_core.errors import DataError, PublishError
from hsnn_core.files import copy_file, sync_directory
from hsnn_core.item_log import LogReader
from hsnn_core.log_following import LogFollower
from hsnn_core.onnx_runner import OnnxRunner
from hsnn_core.scorer import LayerScorer
from hsnn_core.search import search

ITEM_TOWER = "item_tower.onnx"
PREFIX = "compacted-"
KEPT = 2  # snapshots on the disk: the one in service and one to roll back to


def compact(source: str | Path, log: str | Path, target: str | Path, progress: bool = True) -> Exported:
    """An export at ``target`` of the networks at ``source`` (a run directory or an export folder) over the items that
    are live by the log; returns it.

    Raises PublishError when the target exists or cannot be written (nothing is left there), LogError when the log
    cannot be read or is not the one that the source contains updates of, DataError when no item is live or an update
    cannot be used.
    """
    exported, target = open_export(Path(source)), Path(target)
    if target.exists():
        raise PublishError(f"{target}: exists already; give another folder, exports are not overwritten")
    bundle = exported.verify()
    if not Path(log).is_file():
        raise PublishError(
            f"{log}: no item log there, expected the one that the servers of this export follow"
        )
    with LogReader(log, bundle.schema.hash) as reader:
        follower = LogFollower(bundle, reader, OnnxItemTower(exported.path / ITEM_TOWER))
        start = bundle.log.position
        with tqdm(total=follower.behind(), desc="replay", unit="positions", disable=not progress) as bar:
            follower.catch_up(lambda position: bar.update(position - start - bar.n))
    if follower.unusable:
        named = "; ".join(f"item {item}: {why}" for item, why in follower.unusable[:5])
        raise DataError(
            f"{log}: {len(follower.unusable)} updates cannot be used by these networks ({named}); send them again "
            "mended, or delete the items, before they are folded in"
        )
    corpus = follower.live.compact()
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for path in sorted(exported.path.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                copy_file(path, aside / path.name)
        manifest = bundle.manifest
        write_bundle(
            aside / BUNDLE_DIR, bundle.schema, bundle.transform, corpus, smoke_over(bundle, exported, corpus),
            widths=manifest["widths"], k=manifest["k"], max_k=manifest["max_k"], buckets=manifest["buckets"],
            engine=manifest["engine"], models=manifest["models"], item_tower=exported.path / ITEM_TOWER,
            log=follower.log,
        )  # fmt: skip
        sync_directory(aside)
        aside.rename(target)
        sync_directory(target.parent)
    except OSError as error:
        raise PublishError(f"{target}: {error}; nothing was written there") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return dataclasses.replace(exported, path=target)


def smoke_over(bundle: Bundle, exported: Exported, corpus: Corpus) -> Smoke:
    """The smoke request of an export's ``bundle``, with the answer of its networks over another ``corpus``."""
    scorers = [exported.path / f"{graph.signature.stem}.onnx" for graph in exported.graphs[2:]]
    runner = OnnxRunner(exported.path / "user_tower.onnx", scorers)
    scorer = LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, runner, bundle.manifest["buckets"])
    raw = bundle.smoke().users
    users = bundle.transform.encode_users(raw)
    manifest = bundle.manifest
    found = search(corpus.index, scorer, users, manifest["widths"], manifest["k"], bundle.schema.rank)
    return Smoke(
        {name: np.array(values) for name, values in raw.items()}, found.item_ids, found.probabilities
    )


class Compactor:
    """Keeps the served snapshot close to its log: a compaction when enough has changed, published, checked, promoted.

    ``run``: the run that is served; ``folder``: where compactions go, one at a time, named by the log's position; a
    newer one is made of the one before, so that only what came since is replayed. One of other networks is not used.
    ``sign_key``: as in `publish`.
    """

    def __init__(
        self,
        run: str | Path,
        repository: str | Path,
        log: str | Path,
        folder: str | Path,
        sign_key: Path | None = None,
    ) -> None:
        self._sign_key = sign_key
        self._run, self._repository = Path(run), Path(repository)
        self._log, self._folder = Path(log), Path(folder)

    def pending(self) -> int:
        """Positions of the log that the newest export does not contain."""
        bundle = Bundle.open(self._source().bundle, verify=False)
        with LogReader(self._log, bundle.schema.hash) as reader:
            return reader.position() - bundle.log.position

    def compact(self, admin: Admin, progress: bool = True) -> int:
        """One compaction, as the snapshot that the server serves; returns its version. Raises what `compact` and
        `candidate.publish_and_promote` raise: the server goes on with what it serves."""
        source = self._source()
        with LogReader(self._log, Bundle.open(source.bundle, verify=False).schema.hash) as reader:
            target = self._folder / f"{PREFIX}{reader.position()}"
        self._folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)  # one that was made and not published
        compact(source.path, self._log, target, progress)
        version = publish_and_promote(target, self._repository, admin, self._sign_key)
        retire(self._repository, admin, KEPT)
        for path in self._folder.glob(f"{PREFIX}*"):
            if path != target:
                shutil.rmtree(path)
        return version

    def _source(self) -> Exported:
        """The newest compaction of the run's networks, else the run's own export."""
        own = open_export(self._run)
        made = [path for path in self._folder.glob(f"{PREFIX}*") if (path / EXPORT_FILE).is_file()]
        for path in sorted(made, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True):
            exported = open_export(path)
            if [graph.sha256 for graph in exported.graphs] == [graph.sha256 for graph in own.graphs]:
                return exported
        return own
