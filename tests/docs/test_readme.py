"""README and docs say what is there: commands parse, names exist, the recipe is the one that the pipeline trains."""

import argparse
import ast
import importlib
import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest
import yaml

from clients.retrieval import Hit, RetrievalClient
from hsnn_cli.main import DESCRIPTION, parser
from hsnn_core.schema import Schema
from hsnn_train.recipe import RECIPES, load_recipe, recipe_from_dict

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DESIGN = (ROOT / "docs" / "design.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(language: str) -> list[str]:
    return [body for found, body in FENCE.findall(README) if found == language]


def commands() -> dict[str, argparse.ArgumentParser]:
    return parser()._subparsers._group_actions[0].choices


def command_lines(text: str) -> list[str]:
    """`hsnn ...` at the start of a line, without a pipe, a comment or an explanation after two spaces."""
    lines = (line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines())
    return [re.split(r"\s{2,}| [|<] ", line)[0] for line in lines if line.startswith("hsnn ")]


def helps(command: argparse.ArgumentParser) -> list[str]:
    """What a command and all its sub-commands say of themselves, options apart."""
    below = command._subparsers._group_actions[0].choices.values() if command._subparsers else ()
    own = f"# {command.prog}\n{command.description or ''}\n{command.epilog or ''}"
    return [own, *(text for sub in below for text in helps(sub))]


def test_every_command_teaches_by_example():
    assert [
        text.splitlines()[0]
        for command in commands().values()
        for text in helps(command)
        if "example" not in text
    ] == []


def examples() -> list[str]:
    helped = [text for command in commands().values() for text in helps(command)]
    return [line for text in (*blocks(""), DESCRIPTION, *helped) for line in command_lines(text)]


@pytest.mark.parametrize("line", examples())
def test_every_command_shown_parses(line):
    try:
        options = parser().parse_args(shlex.split(line, comments=True)[1:])
    except SystemExit:
        pytest.fail(f"does not parse: {line}")
    assert callable(options.run_command)


def test_examples_are_found_at_all():
    assert len(examples()) > 25
    assert {line.split()[1] for line in examples()} == set(commands())


def test_the_table_of_commands_is_complete():
    cells = re.findall(r"^\| `hsnn (\w+)([^`]*)` \|", README, re.M)
    assert {name for name, _ in cells} == set(commands())
    kinds = next(arguments for name, arguments in cells if name == "data").strip().split(r"\|")
    assert set(kinds) == set(commands()["data"]._subparsers._group_actions[0].choices)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make (\w+)", "\n".join(blocks("")), re.M)) <= targets


def test_the_recipe_for_own_logs_is_one_and_its_schema_has_15_lines(tmp_path):
    text, targeting = blocks("yaml")
    recipe = recipe_from_dict(yaml.safe_load(text), "shop", tmp_path)
    targeted = yaml.safe_load(text)["schema"] | yaml.safe_load(targeting)
    assert [a.kind for a in Schema.from_dict(targeted).eligibility] == ["set", "range", "flag", "key"]
    assert len(recipe.model.monns()) == len(recipe.model.codebooks) + 1
    assert len(text[: text.index("data:")].splitlines()) == 15


def test_the_pipeline_trains_the_recipe_of_the_readme():
    path = ROOT / "tests" / "pipeline" / "own_logs.py"
    spec = importlib.util.spec_from_file_location("own_logs_of_the_pipeline", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shown, trained = yaml.safe_load(blocks("yaml")[0]), yaml.safe_load(module.OWN_LOGS)
    assert trained["schema"] == shown["schema"]
    assert trained["data"] == shown["data"]
    assert shown.keys() - trained.keys() == set()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_recipes(path):
    assert load_recipe(path.stem).name == path.stem


def named_paths() -> list[str]:
    prose = FENCE.sub("", README) + DESIGN
    quoted = re.findall(r"`([^`\s]+)`", prose)
    paths = [q for q in quoted if re.fullmatch(r"[\w.-]+(/[\w.-]+)*(/|\.(py|md|yaml|svg|Dockerfile))", q)]
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", prose) if "://" not in link]
    return sorted({*paths, *links})


@pytest.mark.parametrize("name", named_paths())
def test_every_file_and_folder_that_is_named_exists(name):
    beside = [ROOT, ROOT / "docs", ROOT / "model_repository" / "hsnn_retrieve", ROOT / "hsnn_train"]
    assert any((folder / name).exists() for folder in beside), name


def dotted_names() -> list[str]:
    packages = "hsnn_core|hsnn_train|hsnn_cli|export|clients|hsnn_server"
    return sorted(set(re.findall(rf"`((?:{packages})(?:\.\w+)+)`", FENCE.sub("", README) + DESIGN)))


@pytest.mark.parametrize("name", dotted_names())
def test_every_python_name_in_prose_exists(name):
    module, _, last = name.rpartition(".")
    if importlib.util.find_spec(module) is not None and hasattr(importlib.import_module(module), last):
        return
    assert importlib.util.find_spec(name) is not None


def test_the_client_snippet_uses_what_the_client_has():
    for text in blocks("python"):
        check_snippet(text)


def check_snippet(text: str) -> None:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert hasattr(importlib.import_module(node.module), alias.name)
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "retrieve"
        ):
            signature = inspect.signature(RetrievalClient.retrieve)
            signature.bind(None, *node.args, **{k.arg: k.value for k in node.keywords})
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hit":
            assert node.attr in Hit.__annotations__


def test_trained_tasks_are_the_scores_that_the_snippet_reads():
    text = blocks("python")[0]
    tasks = [task["name"] for task in yaml.safe_load(blocks("yaml")[0])["schema"]["tasks"]]
    assert re.findall(r'scores\["(\w+)"\]', text) == tasks
