"""Files that somebody else may have written: nothing in them is run, and no name in them leads out of their folder."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.exported import open_export
from export.pbtxt import ServingOptions
from export.repository import snapshot_models
from hsnn_core.bundle import Bundle
from hsnn_core.errors import FormatError, HsnnError, PublishError
from hsnn_core.manifest import check_models, inside
from hsnn_train.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
SOURCES = (
    "hsnn_core",
    "hsnn_train",
    "export",
    "model_repository",
    "hsnn_server",
    "clients",
    "hsnn_cli",
    "hsnn_bench",
)
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
REQUIRED = {  # of calls that would otherwise run what a file says
    "np.load": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
}
SAFE_YAML = {"safe_load", "safe_dump", "YAMLError"}


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_code_can_come_out_of_a_file() -> None:
    found = []
    for source in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(source.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found += [f"{source}: {name}" for name in names if name.split(".")[0] in BANNED_MODULES]
            if (
                isinstance(node, ast.Attribute)
                and ast.unparse(node.value) == "yaml"
                and node.attr not in SAFE_YAML
            ):
                found.append(f"{source}:{node.lineno}: yaml.{node.attr}")
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            if call in BANNED_CALLS:
                found.append(f"{source}:{node.lineno}: {call}")
            if call in REQUIRED:
                name, value = REQUIRED[call]
                given = {word.arg: word.value for word in node.keywords}.get(name)
                if not (isinstance(given, ast.Constant) and given.value is value):
                    found.append(f"{source}:{node.lineno}: {call} without {name}={value}")
    assert found == []


def test_a_checkpoint_with_code_in_it(tmp_path: Path) -> None:
    path, made = tmp_path / "checkpoint.pt", tmp_path / "made"
    torch.save({"format": 2, "model": Bomb(made)}, path)
    with pytest.raises(FormatError, match="checkpoint.pt: cannot be read .*Weights only load failed"):
        load_checkpoint(path, None)  # type: ignore[arg-type]
    path.write_bytes(pickle.dumps(Bomb(made)))
    with pytest.raises(FormatError, match="checkpoint.pt: cannot be read"):
        load_checkpoint(path, None)  # type: ignore[arg-type]
    assert not made.exists()


def test_a_smoke_request_with_code_in_it(tmp_path: Path) -> None:
    made = tmp_path / "made"
    array = io.BytesIO()
    np.save(array, np.array([Bomb(made)], object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "smoke.npz", "w") as parts:
        parts.writestr("item_ids.npy", array.getvalue())
    bundle = Bundle(tmp_path, *[None] * 9)  # type: ignore[arg-type]
    with pytest.raises(
        FormatError, match="not the smoke request of a bundle .Object arrays cannot be loaded"
    ):
        bundle.smoke()
    assert not made.exists()


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "", ".", "..", ".hidden", "a\0b", "a\nb", "ü"]
)
def test_file_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="lies elsewhere.*expected one of this very directory"):
        inside(tmp_path, name)


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "1"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "index.hsnn").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match="index.hsnn' lies elsewhere .*/secret.*without links"):
        inside(folder, "index.hsnn")
    (folder / "there").write_text("x")
    (folder / "link").symlink_to(folder / "there")
    assert inside(folder, "link").read_text() == "x"


@pytest.mark.parametrize(
    "name", ["../hsnn_x", "hsnn_x/../y", "/hsnn_x", "", ".", "hsnn_X", 7, None, "hsnn_a\n"]
)
def test_model_names_that_may_be_no_folder_of_a_repository(tmp_path: Path, name: Any) -> None:
    models = {"user_tower": "hsnn_user_tower", "item_tower": "hsnn_item_tower", "scorers": [name]}
    with pytest.raises(
        FormatError, match="expected user_tower, item_tower and scorers, named like hsnn_user_tower"
    ):
        check_models(tmp_path, models)
    version = tmp_path / "hsnn_retrieve" / "1"
    version.mkdir(parents=True)
    (version / "manifest.json").write_text(json.dumps({"models": models}))
    with pytest.raises(FormatError, match="models is"):
        snapshot_models(tmp_path, 1)


def test_a_graph_outside_its_export(tmp_path: Path) -> None:
    graph = {
        "signature": {"stem": "x", "inputs": [], "outputs": []},
        "file": "../x.onnx",
        "sha256": "",
        "buckets": [],
    }
    content = {
        "format": "hsnn-export",
        "format_version": 1,
        "engine": "onnxruntime",
        "graphs": [graph],
        "parity": [],
    }
    (tmp_path / "export.json").write_text(json.dumps(content))
    with pytest.raises(HsnnError, match=r"'\.\./x.onnx' lies elsewhere"):
        open_export(tmp_path).verify()


@pytest.mark.parametrize("path", ["../log.db", "a/../../log.db", "/var/../etc/log.db", "log\0.db"])
def test_item_logs_that_leave_their_place(path: str) -> None:
    with pytest.raises(PublishError, match="without .."):
        ServingOptions(item_log=path)
