"""Following a stream: exactly once, bit for bit after a restart, honest figures, items that come and go."""

import copy
import errno
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from stream_world import arrive, clicks, grown_items, later, with_column, write_base

from hsnn_core.errors import DataError, FeatureError, HsnnError
from hsnn_train.checkpoint import load_checkpoint, load_run, save_checkpoint
from hsnn_train.data.dataset import recipe_tables
from hsnn_train.data.splits import TRAIN, Split
from hsnn_train.data.tables import check_tables
from hsnn_train.follow import Follower
from hsnn_train.follow_report import read_rows
from hsnn_train.steps import Diverged
from hsnn_train.trainer import NotSaved

NAMES = [f"{number:03d}.parquet" for number in range(4)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def stream(tmp_path):
    for number, name in enumerate(NAMES):
        arrive(tmp_path / "stream", later(number), name)
    return tmp_path / "stream"


def content(run):
    """Everything that a checkpoint holds, as plain values."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return value.tolist() if isinstance(value, torch.Tensor) else value

    return plain(load_checkpoint(run / "checkpoint.pt", load_run(run).schema))


def test_killed_and_started_again_it_ends_as_if_never_stopped(base, stream, tmp_path):
    whole = Follower(stream, tmp_path / "whole", base)
    for name in NAMES:
        whole.take(name)
    whole.save()

    cut = Follower(stream, tmp_path / "cut", base)
    cut.take(NAMES[0])
    cut.save()
    cut.take(NAMES[1])  # and is killed before the next checkpoint
    with (tmp_path / "cut" / "follow.jsonl").open("a") as file:
        file.write('{"file": "001.parquet", "half a line')
    for _ in range(2):
        cut = Follower(stream, tmp_path / "cut")
        assert cut.waiting() == NAMES[len(cut.files) :]
        for name in cut.waiting()[:2]:
            cut.take(name)
        cut.save()
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    reports = [(tmp_path / name / "follow.jsonl").read_text() for name in ("cut", "whole")]
    assert reports[0] == reports[1]
    assert [row["file"] for row in read_rows(tmp_path / "cut")] == NAMES
    assert cut.waiting() == []
    assert cut.seen == 400


def test_a_file_that_comes_late_is_taken_and_none_twice(base, stream, tmp_path):
    late = tmp_path / "late"
    (stream / NAMES[1]).rename(late)
    (stream / ".hidden.parquet").write_bytes(b"")
    (stream / "notes.txt").write_bytes(b"")
    follower = Follower(stream, tmp_path / "run", base)
    for name in follower.waiting():
        follower.take(name)
    assert follower.waiting() == []
    late.rename(stream / NAMES[1])
    assert follower.waiting() == [NAMES[1]]


def test_a_file_is_predicted_before_it_is_learnt_from(base, stream, tmp_path):
    follower = Follower(stream, tmp_path / "run", base)
    follower.take(NAMES[0])
    follower.save()
    frozen = Follower(stream, tmp_path / "run")
    expected = frozen.validate(frozen.read(NAMES[1]))
    row, _ = follower.take(NAMES[1])
    assert row["pointwise"] == expected
    assert {(own["layer"], own["task"]) for own in expected} == {
        (n, t) for n in (1, 2, 3) for t in ("click", "conversion")
    }
    after = follower.validate(frozen.read(NAMES[1]))
    assert after[-2]["ne"] < expected[-2]["ne"]  # and then it has learnt


def test_following_beats_standing_still_where_the_world_changes(base, tmp_path):
    rng = np.random.default_rng(1)
    items = pa.parquet.read_table(base.parent / "items.parquet")
    groups = pa.parquet.read_table(base.parent / "users.parquet")["group"].to_numpy()
    category = dict(zip(items["item_id"].to_pylist(), (row[0] for row in items["category"].to_pylist())))
    follower = Follower(tmp_path / "stream", tmp_path / "run", base)
    frozen, frozen_index = copy.deepcopy(follower.model), follower.state
    still, moving = [], []
    for number in range(5):
        table = pa.concat_tables([later(0), later(1), later(2), later(3)])
        table = with_column(table, "t", 2000 + 400 * number + np.arange(400))
        theirs = np.array([category[key] for key in table["item_id"].to_pylist()]) % 4
        liked = theirs == (groups[table["user_id"].to_numpy()] + 1) % 4  # it was the group's own number
        table = with_column(table, "click", (rng.random(400) < np.where(liked, 0.8, 0.1)).astype(np.int64))
        arrive(tmp_path / "stream", table, NAMES[0].replace("0", str(number)))
        name = follower.waiting()[0]
        still.append(follower.validate(follower.read(name), frozen, frozen_index)[-2]["ne"])
        moving.append(follower.take(name)[0]["pointwise"][-2]["ne"])
    assert moving[0] == still[0]
    assert np.mean(moving[1:]) < np.mean(still[1:]) - 0.02


def test_items_come_and_go_with_their_table(tmp_path, base):
    folder = tmp_path / "base"
    own = write_base(folder, schema={"bid": "price"})
    gone = int(load_run(own).item_ids[5])
    arrive(tmp_path / "stream", with_column(later(0), "item_id", [99_999] * 50 + [gone] * 50), "a.parquet")
    arrive(tmp_path / "stream", later(1), "b.parquet")
    follower = Follower(tmp_path / "stream", tmp_path / "run", own)
    assert follower.update_tables() == ""
    grown_items(folder, 99_999, gone)
    assert follower.update_tables() == "items read again: 1 new, 1 gone, 120 in all"
    row, _ = follower.take("a.parquet")
    assert (row["impressions"], row["dropped"]) == (50, 50)
    follower.take("b.parquet")
    follower.save()
    run = load_run(tmp_path / "run")
    assert run.item_ids[0] == 99_999 and gone not in run.item_ids
    assert len(run.index.paths) == 120
    assert run.items.ids[0, 0] == 1  # unknown as an id, with the features of the item it was copied from
    before = load_run(own).items.ids[0]
    assert np.array_equal(run.items.ids[0, 1:4], before[1:4]) and before[4:].all()
    assert not run.items.ids[0, 4:].any()  # nobody has gone on from it yet
    assert np.array_equal(run.attributes.bids[:1], load_run(own).attributes.bids[:1])
    again = Follower(tmp_path / "stream", tmp_path / "run")
    assert np.array_equal(again.items.item_counts, follower.items.item_counts)
    assert again.items.item_counts[0] == sum(later(0)["click"].to_pylist()[:50])

    items = (folder / "items.parquet").read_bytes()
    (folder / "items.parquet").write_bytes(items[:100])
    assert "tables not read again: items (items.parquet): cannot be read" in follower.update_tables()
    assert follower.update_tables() == ""  # said once
    assert len(follower.items.item_keys) == 120


def test_keys_that_the_run_never_saw_are_unknown(base, tmp_path):
    table = with_column(later(0), "user_id", [70_000] * 100)
    arrive(tmp_path / "stream", table, "a.parquet")
    follower = Follower(tmp_path / "stream", tmp_path / "run", base)
    found = follower.read("a.parquet")
    group = follower.recipe.schema.layout("user").slots[0]
    assert not found.examples.users.ids[:, group.start].any()  # not in the users table: missing
    clicked = np.flatnonzero(found.examples.labels[:, 0])[0]
    assert not found.examples.users.ids[: clicked + 1, 1:].any()
    assert found.examples.users.ids[clicked + 1 :, 1].all()  # the file's own clicks are its history
    assert follower.take("a.parquet")[0]["impressions"] == 100


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (lambda t: b"no parquet", r"impressions \(b.parquet\): cannot be read"),
        (lambda t: t.drop_columns(["click"]), r"column 'click' is missing \(label of task click\)"),
        (
            lambda t: with_column(t, "click", [2] * 100),
            r"column 'click', row 0: got 2, expected a label 0 or 1",
        ),
        (lambda t: with_column(t, "item_id", [77_777] * 100), "not one of 100 rows has an item of items"),
        (
            lambda t: t.append_column("group", pa.array([9] * 100)),
            r"column 'group', row 0: got 9, expected 0 to 3",
        ),
        (
            lambda t: t.append_column("group", pa.array([2**63 + 5] * 100, pa.uint64())),
            r"\(b.parquet\): column 'group': Integer value 9223372036854775813 not in range: .*expected whole numbers",
        ),
    ],
)
def test_a_bad_file_is_named_and_nothing_is_learnt_from_it(base, tmp_path, table, message):
    stream = tmp_path / "stream"
    arrive(stream, later(0), "a.parquet")
    follower = Follower(stream, tmp_path / "run", base)
    follower.take("a.parquet")
    before = {name: value.clone() for name, value in follower.model.state_dict().items()}
    made = table(later(1))
    if isinstance(made, bytes):
        (stream / "b.parquet").write_bytes(made)
    else:
        arrive(stream, made, "b.parquet")
    with pytest.raises((DataError, FeatureError), match=message):
        follower.take("b.parquet")
    assert follower.waiting() == []
    assert list(follower.bad) == ["b.parquet"]
    assert all(torch.equal(before[name], value) for name, value in follower.model.state_dict().items())
    follower.save()
    follower = Follower(stream, tmp_path / "run")
    assert follower.waiting() == []
    arrive(stream, later(1), "b.parquet")  # put right
    assert follower.waiting() == ["b.parquet"]
    follower.take("b.parquet")
    assert not follower.bad and follower.seen == 200


def test_a_file_without_rows_is_none(base, tmp_path):
    arrive(tmp_path / "stream", later(0)[:0], "a.parquet")
    follower = Follower(tmp_path / "stream", tmp_path / "run", base)
    assert follower.take("a.parquet") == (None, [])
    assert follower.waiting() == []


HIERARCHY = {"index": "hierarchy", "codebooks": [], "columns": ["shop", "shop"]}


@pytest.mark.parametrize(
    "model", [{"index": "kmeans"}, HIERARCHY, {"layers": ["two_tower_xs"], "codebooks": []}]
)
def test_other_indexes_are_followed_too(tmp_path, stream, model):
    follower = Follower(stream, tmp_path / "run", write_base(tmp_path / "base", model=model))
    follower.take(NAMES[0])
    follower.save()
    follower.take(NAMES[1])
    again = Follower(stream, tmp_path / "run")
    again.take(NAMES[1])
    same = zip(follower.model.state_dict().values(), again.model.state_dict().values())
    assert all(torch.equal(one, other) for one, other in same)
    assert np.array_equal(follower.state.paths, again.state.paths)


def test_a_log_of_positives_alone(tmp_path):
    train = {"negatives": 4, "hard": 2, "pool": 32, "unlabelled": 0}
    base = write_base(tmp_path / "base", positives=True, **train)
    arrive(tmp_path / "stream", clicks(later(0)), "a.parquet")
    arrive(tmp_path / "stream", later(1), "b.parquet")
    follower = Follower(tmp_path / "stream", tmp_path / "run", base)
    trunk, rest = (group["lr"] for group in follower.optimizer.param_groups)
    assert (trunk, rest) == pytest.approx(
        (0.01 * 0.1 * 0.2, 0.01 * 0.1)
    )  # where the schedules of training ended
    row, _ = follower.take("a.parquet")
    assert row["impressions"] == len(clicks(later(0)))
    with pytest.raises(
        DataError, match=r"b.parquet\): has rows with click = 0, expected positives alone, as the run"
    ):
        follower.take("b.parquet")


def test_a_task_that_is_given_another_is_measured_where_the_other_has_a_label(tmp_path):
    tasks = [{"name": "click"}, {"name": "conversion", "weight": 0.5, "given": "click"}]
    base = write_base(tmp_path / "base", schema={"tasks": tasks})
    arrive(tmp_path / "stream", later(0), "a.parquet")
    none = with_column(with_column(later(1), "click", [0] * 100), "conversion", [0] * 100)
    arrive(tmp_path / "stream", none, "b.parquet")
    follower = Follower(tmp_path / "stream", tmp_path / "run", base)
    recipe = follower.recipe
    log = check_tables(recipe_tables(recipe.schema, recipe.data, recipe.base))
    click, conversion = log.labels[Split.from_dict(recipe.split).assign(log) == TRAIN].T
    assert follower.rates == pytest.approx([click.mean(), conversion[click == 1].mean()])
    row, _ = follower.take("a.parquet")
    assert all(np.isfinite(figure["ne"]) for figure in row["pointwise"])
    row, _ = follower.take("b.parquet")
    figures = [(figure["task"], figure["ne"] is None) for figure in row["pointwise"]]
    assert figures == [("click", False), ("conversion", True)] * 3


def test_a_checkpoint_of_before_tasks_could_be_given_others_goes_on_with_its_rates(base, stream, tmp_path):
    follower = Follower(stream, tmp_path / "run", base)
    follower.take(NAMES[0])
    follower.save()
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt", follower.recipe.schema)
    rates = saved["follow"].pop("base_rates")
    saved["follow"]["rates"] = rates * (1 + follower.recipe.train.negatives)
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", saved)
    assert np.array_equal(Follower(stream, tmp_path / "run").rates, follower.rates)


def test_matches_of_items_that_share_the_unknown_id_stay_zeros(tmp_path):
    base = write_base(tmp_path / "base", model={"min_positives": 2})
    arrive(tmp_path / "stream", later(0), "a.parquet")
    follower = Follower(tmp_path / "stream", tmp_path / "run", base)
    shared = follower.model.trunks[0].lookup.alias[2:] == 1
    assert 0 < shared.sum() < len(shared)
    weight = follower.model.layer(1).interaction.tables.weight("item")
    before = weight.detach().clone()
    follower.take("a.parquet")
    assert not weight[2:][shared].any()
    assert not torch.equal(weight[2:][~shared], before[2:][~shared])


def test_divergence_names_the_file_and_keeps_the_checkpoint_from_before(base, stream, tmp_path):
    follower = Follower(stream, tmp_path / "run", base)
    before = content(tmp_path / "run")
    with torch.no_grad():
        follower.model.ensemble[2].bias.fill_(float("nan"))
    with pytest.raises(
        Diverged, match=r"at step 7, in 000.parquet: .*; the checkpoint in .* is from before that file"
    ):
        follower.take(NAMES[0])
    assert content(tmp_path / "run") == before


def test_a_full_disk_keeps_the_checkpoint_before(base, stream, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    follower = Follower(stream, tmp_path / "run", base)
    before = content(tmp_path / "run")
    follower.take(NAMES[0])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotSaved, match=r"after 1 files could not be .*No space left"):
        follower.save()
    monkeypatch.undo()
    assert content(tmp_path / "run") == before
    assert Follower(stream, tmp_path / "run").waiting() == NAMES
    assert read_rows(tmp_path / "run") == []


def test_beginnings_that_make_no_sense_are_refused(base, stream, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(
        HsnnError, match=r"does not follow a stream yet; say which finished run .* \(--from\)"
    ):
        Follower(stream, run)
    with pytest.raises(HsnnError, match="expected a folder of its own"):
        Follower(stream, base, base)
    Follower(stream, run, base)
    with pytest.raises(
        DataError, match=r"the stream is .*stream, got .*other; give that one, or another --run"
    ):
        Follower(tmp_path / "other", run)
    with pytest.raises(HsnnError, match="follows a stream itself; go on with it: --run"):
        Follower(stream, tmp_path / "second", run)
    assert json.loads(json.dumps(content(run)["follow"]["files"])) == []
    with pytest.raises(DataError, match="expected a folder into which Parquet files arrive"):
        Follower(tmp_path / "nowhere", tmp_path / "third", base).waiting()
