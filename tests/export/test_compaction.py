from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.compaction import compact
from export.export_run import Source, _newest, export_source
from export.exported import Exported, open_export
from export.forgetting import forget
from export.pbtxt import ServingOptions
from export.publish import publish
from export.repository import versions
from hsnn_core.bundle import Bundle
from hsnn_core.errors import DataError, LogError, PublishError
from hsnn_core.item_log import ItemLog, LogReader
from hsnn_core.item_updates import Update

KNOWN = np.arange(100, 160)  # the stand-in's items


def upsert(item: int, sequence: int, price: float = 5.0) -> Update:
    return Update(item, sequence, features={"category": [item % 7], "price": price})


@pytest.fixture
def log(tmp_path: Path, exported: Exported):
    schema = Bundle.open(exported.bundle, verify=False).schema
    with ItemLog.open(tmp_path / "items" / "log.db", schema.hash) as opened:
        yield opened


def test_the_log_is_in_the_next_snapshot(exported: Exported, log: ItemLog, tmp_path: Path) -> None:
    log.append([upsert(5000, 1), upsert(100, 1, price=9.0), Update(101, 1, deleted=True), upsert(5001, 1)])
    position = log.append([Update(5001, 2, deleted=True)]).position
    done = compact(exported.path, tmp_path / "items" / "log.db", tmp_path / "next", progress=False)
    bundle = open_export(tmp_path / "next").verify()
    assert done.path == tmp_path / "next"
    assert sorted(bundle.index.item_ids) == [100, *range(102, 160), 5000]
    assert bundle.log == (position, log.identity)
    assert bundle.manifest["nodes"][-1] == 60
    prices = bundle.records.features.dense[np.flatnonzero(bundle.index.item_ids == 100)]
    before = exported.verify()
    old = before.records.features.dense[np.flatnonzero(before.index.item_ids == 100)]
    assert not np.allclose(prices, old)
    # A compaction goes on from a compaction, and replays what came after it only.
    log.append([upsert(5002, 3)])
    again = compact(tmp_path / "next", tmp_path / "items" / "log.db", tmp_path / "third", progress=False)
    assert 5002 in again.verify().index.item_ids
    # It is published like any other export.
    options = ServingOptions(item_log=str(tmp_path / "items" / "log.db"))
    publish(exported.path, tmp_path / "repository", options=options)
    publish(tmp_path / "third", tmp_path / "repository")
    assert versions(tmp_path / "repository") == [1, 2]


def test_without_updates_the_index_is_the_same(exported: Exported, log: ItemLog, tmp_path: Path) -> None:
    compacted = compact(exported.path, tmp_path / "items" / "log.db", tmp_path / "next", progress=False)
    ours, theirs = compacted.verify(), exported.verify()
    for name, array in theirs.index.to_arrays().items():
        np.testing.assert_array_equal(ours.index.to_arrays()[name], array)
    for mine, other in zip(ours.embeddings, theirs.embeddings):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours.smoke().item_ids, theirs.smoke().item_ids)


def test_another_log_is_refused(exported: Exported, log: ItemLog, tmp_path: Path) -> None:
    log.append([upsert(5000, 1)])
    compact(exported.path, tmp_path / "items" / "log.db", tmp_path / "next", progress=False)
    schema = exported.verify().schema
    with ItemLog.open(tmp_path / "other.db", schema.hash) as other:
        other.append([upsert(5000, 1), upsert(5001, 1)])
    with pytest.raises(
        LogError, match=r"contains the updates up to position 1 of the item log \w+, but the log"
    ):
        compact(tmp_path / "next", tmp_path / "other.db", tmp_path / "third", progress=False)
    assert not (tmp_path / "third").exists()


def test_nothing_is_overwritten_or_half_written(exported: Exported, log: ItemLog, tmp_path: Path) -> None:
    with pytest.raises(
        PublishError, match="exists already; give another folder, exports are not overwritten"
    ):
        compact(exported.path, tmp_path / "items" / "log.db", tmp_path, progress=False)
    log.append([Update(int(item), 1, deleted=True) for item in KNOWN])
    with pytest.raises(DataError, match="no item is live"):
        compact(exported.path, tmp_path / "items" / "log.db", tmp_path / "next", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items"]


def test_what_all_snapshots_contain_may_be_forgotten(
    exported: Exported, log: ItemLog, tmp_path: Path
) -> None:
    repository, path = tmp_path / "repository", tmp_path / "items" / "log.db"
    options = ServingOptions(item_log=str(tmp_path / "items" / "log.db"))
    with pytest.raises(PublishError, match="no complete snapshot there, expected at least one that contains"):
        forget(repository)
    publish(exported.path, repository, options=options)
    position = log.append([upsert(5000, 1), upsert(5001, 1)]).position
    compact(exported.path, path, tmp_path / "next", progress=False)
    publish(tmp_path / "next", repository)
    log.append([upsert(5002, 1)])
    assert forget(repository) == (0, 0)  # version 1 has none of them
    for model in repository.iterdir():
        shutil.rmtree(model / "1", ignore_errors=True)
    assert forget(repository) == (position, 2)
    with LogReader(path, log_schema(exported)) as reader:
        assert [entry.item for entry in reader.since(position, 10)] == [5002]
    # What lacks them could not follow any more; what has them can.
    with pytest.raises(
        PublishError, match=r"up to position 0, but those up to 2 are forgotten there; train with"
    ):
        publish(exported.path, repository)
    compact(tmp_path / "next", path, tmp_path / "third", progress=False)
    publish(tmp_path / "third", repository)


def log_schema(exported: Exported) -> str:
    return Bundle.open(exported.bundle, verify=False).schema.hash


def test_an_export_with_another_logs_updates_is_not_published(
    exported: Exported, log: ItemLog, tmp_path: Path
) -> None:
    log.append([upsert(5000, 1)])
    compact(exported.path, tmp_path / "items" / "log.db", tmp_path / "next", progress=False)
    with pytest.raises(
        PublishError, match=r"updates of the item log \w+, but that of the repository, .* empty"
    ):
        publish(tmp_path / "next", tmp_path / "elsewhere")


def test_an_item_table_that_has_the_updates_says_so(source: Source, log: ItemLog, tmp_path: Path) -> None:
    log.append([upsert(100, 1)])
    told = replace(source, log=_newest(tmp_path / "items" / "log.db", source.schema))
    assert export_source(told, tmp_path / "export", progress=False).verify().log == (1, log.identity)
