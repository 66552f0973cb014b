"""The command line on own logs, without a server: what it writes, what it prints, what it refuses."""

import json
import shutil

import pytest
from own_logs import OWN_LOGS, write_logs

from hsnn_cli.main import main, parser


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
    for plot in ("training.png", "occupancy.png"):
        assert (run / "plots" / plot).read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((run / "metrics.json").read_text())
    assert {row["layer"] for row in metrics["pointwise"]} == {1, 2, 3}
    assert metrics["retrieval"]["search_recall"]["@10"] > 0.5
    assert (run / "export" / "bundle" / "manifest.json").exists()


def test_own_logs_need_no_more_than_this_schema():
    """The README promises a schema of about 15 lines."""
    schema = OWN_LOGS[: OWN_LOGS.index("data:")]
    assert len(schema.splitlines()) <= 16


def test_check_evaluate_and_info_describe(shop, capsys):
    assert main(["data", "check", str(shop / "shop.yaml")]) == 0
    assert main(["evaluate", str(shop / "run"), "--split", "valid"]) == 0
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


def test_query_without_a_server_says_what_to_do(capsys):
    assert main(["query", "--url", "127.0.0.1:1", "--timeout", "0.5"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err
    assert main(["query", "--user", "[1]"]) == 1
    assert "expected a JSON object" in capsys.readouterr().err
