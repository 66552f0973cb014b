"""hsnn train --follow as a person types it: snapshots of a stream, Ctrl-C, failures that keep what is served."""

import os
import shutil
import signal
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from clients.retrieval import RetrievalClient
from export.publish import publish
from export.repository import versions
from export.rollout import promote
from export.signing import check_signature
from hsnn_cli import follow
from hsnn_cli.main import main
from hsnn_core.bundle import Bundle
from hsnn_core.errors import PublishError
from hsnn_server.triton import TritonServer
from hsnn_train.checkpoint import load_run
from hsnn_train.follow import Follower
from hsnn_train.follow_report import read_rows


def write_stream(folder, files=3, rows=128, item=1000):
    """Files of impressions that come after those of the shop; the last row of each is of ``item``."""
    rng = np.random.default_rng(5)
    folder.mkdir()
    for number in range(files):
        sku = 1001 + rng.integers(0, 199, rows)
        sku[-1] = item
        click = rng.integers(0, 2, rows)
        impressions = pa.table({
            "user_id": rng.integers(0, 150, rows), "sku": sku, "time": 10_000 + number * rows + np.arange(rows),
            "click": click, "buy": click * rng.integers(0, 2, rows),
        })  # fmt: skip
        pa.parquet.write_table(impressions, folder / f"{number}.parquet")


@pytest.fixture
def own(shop, tmp_path):
    """A shop of one's own: its tables may change."""
    for name in ("impressions.parquet", "users.csv", "items.parquet", "shop.yaml"):
        shutil.copy(shop / name, tmp_path / name)
    shutil.copytree(shop / "run", tmp_path / "run")
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.replace(str(shop), str(tmp_path)))
    write_stream(tmp_path / "stream")
    return tmp_path


def arguments(folder, *more):
    return ["train", "--follow", str(folder / "stream"), "--from", str(folder / "run"),
            "--run", str(folder / "live"), *more]  # fmt: skip


def test_a_snapshot_has_the_items_of_the_moment_and_what_was_learnt(own, capsys):
    before = load_run(own / "run")
    items = pa.parquet.read_table(own / "items.parquet")
    new = items[:1].set_column(0, "sku", pa.array([5000]))
    pa.parquet.write_table(pa.concat_tables([items[1:], new]), own / "items.parquet")
    (own / "stream" / "1.parquet").write_bytes(b"PAR1 and no more")
    assert main(arguments(own, "--once", "--repository", str(own / "repository"))) == 0
    out = capsys.readouterr().out
    assert "0.parquet: 127 impressions (1 left out), click NE" in out  # sku 1000 is gone
    assert "skipped, nothing learnt from it: impressions (1.parquet): cannot be read" in out
    assert "published version 1" in out
    assert "2 files, 254 impressions learnt from, 2 left out" in out
    assert "1 bad files skipped: 1.parquet" in out
    bundle = Bundle.open(own / "repository" / "hsnn_retrieve" / "1", verify=True)
    assert 5000 in bundle.index.item_ids and 1000 not in bundle.index.item_ids
    assert len(bundle.index.item_ids) == 200
    live = load_run(own / "live")
    assert live.step > before.step
    assert (own / "live" / "plots" / "follow.png").read_bytes().startswith(b"\x89PNG")
    assert main(["info", str(own / "live")]) == 0
    assert "follows" in capsys.readouterr().out

    write_stream(own / "more", item=5000)
    (own / "more" / "0.parquet").rename(own / "stream" / "9.parquet")
    assert main(arguments(own, "--once", "--repository", str(own / "repository"))) == 0
    assert "9.parquet: 128 impressions" in capsys.readouterr().out
    assert versions(own / "repository") == [1, 2]
    assert [row["file"] for row in read_rows(own / "live")] == ["0.parquet", "2.parquet", "9.parquet"]
    assert main(arguments(own, "--once", "--repository", str(own / "repository"))) == 0
    assert versions(own / "repository") == [1, 2]  # nothing new, no snapshot
    for command in (["evaluate"], ["train", "--resume"]):
        assert main([*command, str(own / "live")]) == 1
        assert "follows a stream; hsnn train --follow goes on with it" in capsys.readouterr().err


def test_a_gate_that_fails_keeps_what_is_published_and_training_goes_on(own, capsys, monkeypatch):
    calls = []

    def fails_first(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise PublishError("graph scorer_l1: differs by 1.0, allowed are 1e-05")
        return export_run(*args, **options)

    (own / "stream" / "2.parquet").unlink()
    export_run = follow.export_run
    monkeypatch.setattr(follow, "export_run", fails_first)
    monkeypatch.setattr(follow, "LOOK_SECONDS", 0.0)
    options = ("--repository", str(own / "repository"), "--publish-every", "1e-9", "--once")
    assert main(arguments(own, *options)) == 0
    out = capsys.readouterr().out
    assert (
        "not published: graph scorer_l1: differs by 1.0, allowed are 1e-05; what was served before is" in out
    )
    assert "1.parquet: 128 impressions" in out
    assert versions(own / "repository") == [1]

    def fails(*_, **__):
        raise PublishError("no space")

    write_stream(own / "more", 1)
    (own / "more" / "0.parquet").rename(own / "stream" / "9.parquet")
    monkeypatch.setattr(follow, "export_run", fails)
    assert main(arguments(own, *options)) == 1
    assert "hsnn: not published: no space" in capsys.readouterr().err
    assert versions(own / "repository") == [1]
    assert len(read_rows(own / "live")) == 3


@pytest.mark.triton
def test_a_running_server_takes_over_what_was_learnt(own, capsys):
    repository = own / "repository"
    publish(own / "run", repository)
    with TritonServer(repository) as server:
        promote(repository, server.admin)
        key, public = str(own / "sign.key"), str(own / "sign.pub")
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
        subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
        options = ("--once", "--repository", str(repository), "--url", server.urls.grpc, "--sign-key", key)
        assert main(arguments(own, *options, "--key-file", str(server.key_file))) == 0
        check_signature(repository, 2, own / "sign.pub")
        assert f"published version 2, served at {server.urls.grpc}" in capsys.readouterr().out
        with RetrievalClient(server.urls.grpc, timeout=20) as client:
            assert client.retrieve([{"age": 31, "country": "IT"}], k=5).version == "2"


def test_ctrl_c_ends_after_the_file_and_the_same_command_goes_on(own, capsys, monkeypatch):
    learn = Follower.learn

    def hit(follower, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return learn(follower, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Follower, "learn", hit)
        assert main(arguments(own)) == 1
    assert (
        f"stopped after 1 files; the checkpoint is in {own / 'live'}; the same command goes on"
        in capsys.readouterr().err
    )
    assert main(arguments(own, "--once")) == 0
    assert [row["file"] for row in read_rows(own / "live")] == ["0.parquet", "1.parquet", "2.parquet"]
    assert main(arguments(own, "--once", "--repository", str(own / "repository"))) == 0  # not a new file, yet
    assert versions(own / "repository") == [1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--publish-every", "5"], "--publish-every: is about snapshots; give their --repository too"),
        (["--repository", "r", "--publish-every", "0"], "--publish-every: got 0, expected minutes above 0"),
        (["--repository", "r", "--url", "127.0.0.1:1"], "--url and --key-file: give both"),
        (
            ["--set", "train.lr=1"],
            "goes on with a finished run's own recipe; leave out RECIPE, --resume, --set",
        ),
    ],
)
def test_arguments_that_do_not_go_together(tmp_path, capsys, more, message):
    assert main(arguments(tmp_path, *more)) == 1
    assert message in capsys.readouterr().err


def test_following_arguments_without_a_stream(capsys):
    assert main(["train", "synthetic", "--from", "runs/ads", "--once"]) == 1
    assert "--from, --once: is for following a stream; give --follow FOLDER too" in capsys.readouterr().err


def test_two_cannot_follow_into_one_run(own, capsys):
    with follow.alone(own / "live"):
        assert main(arguments(own, "--once")) == 1
    assert "another process follows a stream there; stop it first" in capsys.readouterr().err
