"""The command line on own logs, without a server: what it writes, what it prints, what it refuses."""

import errno
import json
import os
import shutil
import signal

import pyarrow.parquet
import pytest
from own_logs import OWN_LOGS, write_logs

from hsnn_cli.main import main, parser
from hsnn_core.errors import PublishError
from hsnn_train import beam, calibration, evaluate
from hsnn_train.trainer import Trainer


def test_a_run_directory_holds_everything(shop):
    run = shop / "run"
    for name in (
        "recipe.yaml",
        "schema.json",
        "transform.hsnn",
        "checkpoint.pt",
        "history.jsonl",
        "metrics.json",
    ):
        assert (run / name).stat().st_size > 0, name
    for plot in ("training.png", "index.png", "occupancy.png"):
        assert (run / "plots" / plot).read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((run / "metrics.json").read_text())
    assert {row["layer"] for row in metrics["pointwise"]} == {1, 2, 3}
    assert metrics["retrieval"]["search_recall"]["@10"] > 0.5
    assert (run / "export" / "bundle" / "manifest.json").exists()


def test_own_logs_need_no_more_than_this_schema():
    """The README promises a schema of about 15 lines."""
    schema = OWN_LOGS[: OWN_LOGS.index("data:")]
    assert len(schema.splitlines()) <= 15


def test_check_evaluate_and_info_describe(shop, capsys):
    assert main(["data", "check", str(shop / "shop.yaml")]) == 0
    test = (shop / "run" / "metrics.json").read_bytes()
    assert main(["evaluate", str(shop / "run"), "--split", "valid"]) == 0
    assert (shop / "run" / "metrics.json").read_bytes() == test
    assert json.loads((shop / "run" / "metrics-valid.json").read_text())["split"] == "valid"
    assert main(["info", str(shop / "run")]) == 0
    assert main(["info", str(shop / "repository")]) == 0
    out = capsys.readouterr().out
    for text in ("200 items", "click rate", "search recall", "3 layers: small, small, small", "versions 1"):
        assert text in out, text


def test_every_command_teaches_by_example(capsys):
    commands = parser()._subparsers._group_actions[0].choices
    assert set(commands) >= {
        "data",
        "train",
        "evaluate",
        "export",
        "publish",
        "serve",
        "query",
        "info",
        "demo",
    }
    for name, command in commands.items():
        text = command.format_help()
        assert "examples:" in text, name
        assert f"hsnn {name}" in text.split("examples:")[1], name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"price:    {kind: dense}": "weight:   {kind: dense}"}, "column 'weight'"),
        ({"users.csv": "nobody.csv"}, "nobody.csv"),
        ({"layers: [small": "layers: [smal"}, "unknown preset 'smal'"),
        ({"item: category}": "item: categori}"}, "interactions.taste.item: got 'categori'"),
        ({"codebooks: [6, 4]": "codebooks: [600, 4]"}, "600 codewords for 200 items"),
    ],
)
def test_bad_recipes_are_refused_with_the_name_of_what_is_wrong(tmp_path, capsys, change, message):
    recipe = write_logs(tmp_path, rows=600)
    text = recipe.read_text()
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text)
    assert main(["train", str(recipe), "--run", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_overrides_change_one_value(tmp_path, capsys):
    recipe = write_logs(tmp_path, rows=600)
    arguments = ["train", str(recipe), "--run", str(tmp_path / "run"), "--no-evaluate"]
    assert main([*arguments, "--set", "train.epochs=2", "--set", "model.codebooks=[3, 2]"]) == 0
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "epochs: 2" in text
    assert main([*arguments, "--set", "train.epochs"]) == 1
    assert "expected SECTION.KEY=VALUE" in capsys.readouterr().err


def test_an_unfinished_run_cannot_be_exported(tmp_path, capsys):
    assert main(["export", str(tmp_path / "none")]) == 1
    assert "no recipe.yaml there" in capsys.readouterr().err


def test_an_edited_export_cannot_be_published(shop, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(shop / "run", run)
    graph = run / "export" / "scorer_l2.onnx"
    graph.write_bytes(graph.read_bytes() + b"x")
    assert main(["publish", str(run), "--repository", str(tmp_path / "repo")]) == 1
    assert "scorer_l2.onnx" in capsys.readouterr().err
    assert not (tmp_path / "repo" / "hsnn_retrieve" / "1").exists()


def test_notes_of_an_error_are_printed(capsys, monkeypatch):
    error = PublishError("candidate 2: no")
    error.add_note("and then: nobody answers")

    def fails(options):
        raise error

    monkeypatch.setattr("hsnn_cli.commands_training.run_info", fails)
    assert main(["info", "run"]) == 1
    assert capsys.readouterr().err == "hsnn: candidate 2: no\nhsnn: and then: nobody answers\n"


def test_query_without_a_server_says_what_to_do(capsys):
    assert main(["query", "--url", "127.0.0.1:1", "--timeout", "0.5"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err
    assert main(["query", "--user", "[1]"]) == 1
    assert "expected a JSON object" in capsys.readouterr().err


def figures(run):
    """metrics.json without times, and its figures of calibrated probabilities as one list."""
    metrics = json.loads((run / "metrics.json").read_text(), parse_constant=pytest.fail)
    del metrics["seconds"], metrics["retrieval"]["seconds_per_request"]
    rows = metrics.pop("pointwise")
    return metrics, [row[name] for row in rows for name in ("ne", "calibration")]


def test_stopped_anywhere_and_resumed_a_run_ends_as_if_never_stopped(tmp_path, capsys, monkeypatch):
    """Ctrl-C in training, in calibration and in evaluation; then a resume of the finished run."""
    recipe = str(write_logs(tmp_path, rows=900))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", recipe, "--run", str(whole)]) == 0

    one_step = Trainer._one_step

    def hit_in_step_3(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return one_step(self)

    def hit(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_one_step", hit_in_step_3)
    assert main(["train", recipe, "--run", str(cut)]) == 1
    assert f"stopped at step 3 of 6; the checkpoint is in {cut}; go on with" in capsys.readouterr().err
    monkeypatch.setattr(Trainer, "_one_step", one_step)
    for module, name in ((calibration, "calibrate"), (beam, "fit_beam"), (evaluate, "retrieval")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, hit)
            assert main(["train", "--resume", str(cut)]) == 1
        assert "stopped after training, before the end of calib" in capsys.readouterr().err
        assert not (cut / "metrics.json").exists()
    for _ in range(2):
        assert main(["train", "--resume", str(cut)]) == 0
        assert (cut / "history.jsonl").read_text() == (whole / "history.jsonl").read_text()
        (ours, calibrated), (theirs, wanted) = figures(cut), figures(whole)
        assert ours == theirs
        assert calibrated == pytest.approx(wanted, abs=1e-6)


def test_a_resume_takes_no_other_settings(shop, capsys):
    assert main(["train", "--resume", str(shop / "run"), "--set", "train.epochs=9"]) == 1
    assert (
        "goes on with the run's own recipe; leave out --set, --run and --restart" in capsys.readouterr().err
    )


def test_tables_that_changed_since_training_are_refused(shop, tmp_path, capsys):
    for name in ("impressions.parquet", "users.csv", "items.parquet", "shop.yaml"):
        shutil.copy(shop / name, tmp_path / name)
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "shop.yaml"), "--run", str(run), "--no-evaluate"]) == 0
    items = pyarrow.parquet.read_table(tmp_path / "items.parquet")
    pyarrow.parquet.write_table(items.take(list(range(len(items)))[::-1]), tmp_path / "items.parquet")
    for command in (["evaluate", str(run)], ["train", "--resume", str(run)]):
        assert main(command) == 1
        assert "the tables have changed since it was trained" in capsys.readouterr().err


def test_a_split_without_valid_or_test_still_trains(tmp_path, capsys):
    recipe = str(write_logs(tmp_path, rows=600))
    run = tmp_path / "run"
    assert main(["train", recipe, "--run", str(run), "--set", "split.fractions=[1, 0, 0]"]) == 0
    out = capsys.readouterr().out
    assert "not calibrated: the split leaves no impressions for valid" in out
    assert "not evaluated: the split leaves no impressions for test" in out
    assert main(["evaluate", str(run)]) == 1
    assert "this split is empty; change the recipe's split:" in capsys.readouterr().err
    assert (
        main(["pipeline", recipe, "--work", str(tmp_path / "w"), "--set", "split.fractions=[1, 0, 0]"]) == 1
    )
    assert "nothing served could be checked" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_says_what_to_do(shop, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main(["evaluate", str(shop / "run")]) == 1
    assert (
        "No space left on device; what was complete before is still there: make room"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [("train.epochs.x=1", "train.epochs is a value, not a section"), ("train.lr=[", "the value is not YAML")],
)
def test_bad_overrides_are_named(tmp_path, capsys, change, message):
    assert main(["train", str(write_logs(tmp_path, rows=50)), "--set", change]) == 1
    assert message in capsys.readouterr().err


def test_an_interrupted_run_is_not_trained_over(tmp_path, capsys, monkeypatch):
    recipe = write_logs(tmp_path, rows=600)
    train = ["train", str(recipe), "--run", str(tmp_path / "run"), "--no-evaluate"]
    one_step = Trainer._one_step

    def stop_at_two(trainer):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return one_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", stop_at_two)
        assert main(train) == 1
    kept = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert main(train) == 1
    message = capsys.readouterr().err
    assert "interrupted at step 3" in message
    assert f"hsnn train --resume {tmp_path / 'run'}" in message
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == kept
    assert main([*train, "--restart"]) == 0
    assert main(train) == 0  # a finished run may be trained anew
