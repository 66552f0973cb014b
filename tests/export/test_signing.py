"""A signature holds for exactly the files that were published, by a key that is trusted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from export.signing import check_signature
from hsnn_cli.main import main
from hsnn_core import signature
from hsnn_core.errors import FormatError, PublishError

MODELS = ("hsnn_user_tower", "hsnn_item_tower", "hsnn_scorer_l1", "hsnn_index")
MANIFEST = {
    "models": {"user_tower": MODELS[0], "item_tower": MODELS[1], "scorers": [MODELS[2]], "index": MODELS[3]}
}


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    """A repository with a signed version 3 and the same, signed, as version 4."""
    root = tmp_path / "repository"
    for version in (3, 4):
        directories = {model: root / model / str(version) for model in (*MODELS, "hsnn_retrieve")}
        for model, directory in directories.items():
            directory.mkdir(parents=True)
            (directory / "model.onnx").write_text(model)
        code = directories["hsnn_retrieve"]
        (code / "manifest.json").write_text(json.dumps(MANIFEST))
        (code / "hsnn_core").mkdir()
        (code / "hsnn_core" / "bundle.py").write_text("# code")
        signature.sign(directories, "hsnn_retrieve", version, keys[0])
    return root


def test_what_was_published_is_trusted(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    cache = signed / "hsnn_retrieve" / "3" / "hsnn_core" / "__pycache__"
    cache.mkdir()
    (cache / "bundle.pyc").write_text("planted")
    check_signature(signed, 3, keys[1])
    assert not cache.exists(), "Python would run it in place of the code that was signed"
    several = tmp_path / "several.pub"
    other = _pair(tmp_path, "other")[1]
    several.write_text(other.read_text() + keys[1].read_text())
    check_signature(signed, 3, several)
    with pytest.raises(PublishError, match="version 3 is not loaded: .*not signed by a key of .*other.pub"):
        check_signature(signed, 3, other)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a network": (lambda root: (root / "hsnn_scorer_l1/3/model.onnx").write_text("x"), "hsnn_scorer_l1/model.onnx has"),
    "code": (lambda root: (root / "hsnn_retrieve/3/hsnn_core/bundle.py").write_text("x"), "hsnn_core/bundle.py has"),
    "one more file": (lambda root: (root / "hsnn_index/3/sitecustomize.py").write_text("x"), "that it is not there"),
    "one file less": (lambda root: (root / "hsnn_index/3/model.onnx").unlink(), "none .missing."),
    "a link": (lambda root: (root / "hsnn_index/3/x").symlink_to("/etc/passwd"), "a link, expected files alone"),
    "a linked folder": (
        lambda root: (root / "hsnn_index/3").symlink_to((root / "hsnn_index/3").rename(root / "elsewhere")),
        "hsnn_index/3: a link, expected files alone",
    ),
    "another signature.json": (
        lambda root: (root / "hsnn_index/3/signature.json").write_text("x"),
        "that it is not there",
    ),
    "no signature": (lambda root: (root / "hsnn_retrieve/3/signature.json").unlink(), "publish with --sign-key"),
    "another version's": (
        lambda root: (root / "hsnn_retrieve/4/signature.json").rename(root / "hsnn_retrieve/3/signature.json"),
        "signs snapshot 4, expected 3: signatures were exchanged",
    ),
    "a changed list": (
        lambda root: _edit(root / "hsnn_retrieve/3/signature.json", lambda s: s["files"].popitem()),
        "not signed by a key of",
    ),
    "no base64": (
        lambda root: _edit(root / "hsnn_retrieve/3/signature.json", lambda s: s.update(signature="!!")),
        "not a signature",
    ),
    "nonsense": (
        lambda root: (root / "hsnn_retrieve/3/signature.json").write_bytes(b"\xff["),
        "cannot be read as text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_any_change_is_refused(signed: Path, keys: tuple[Path, Path], what: str) -> None:
    change, message = CHANGES[what]
    change(signed)
    with pytest.raises(PublishError, match=message):
        check_signature(signed, 3, keys[1])


def test_keys_that_are_none(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    key, public = keys
    (rsa := tmp_path / "rsa.key").write_bytes(
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed448"], check=True, capture_output=True).stdout
    )
    directories = {"hsnn_retrieve": signed / "hsnn_retrieve" / "3"}
    for path, message in ((rsa, "expected Ed25519; make a pair with"), (public, "no private key as PEM")):
        with pytest.raises(FormatError, match=message):
            signature.sign(directories, "hsnn_retrieve", 3, path)
    with pytest.raises(PublishError, match="no public key there, expected PEM of Ed25519"):
        check_signature(signed, 3, key)
    with pytest.raises(PublishError, match="absent.pub: cannot be read"):
        check_signature(signed, 3, tmp_path / "absent.pub")


def test_a_python_without_cryptography_refuses(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.serialization", None)
    with pytest.raises(PublishError, match="lacks the package cryptography .*install it there"):
        check_signature(signed, 3, keys[1])


def _pair(folder: Path, name: str) -> tuple[Path, Path]:
    key, public = folder / f"{name}.key", folder / f"{name}.pub"
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True, capture_output=True
    )
    subprocess.run(
        ["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True, capture_output=True
    )
    return key, public


def _edit(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_rollback_goes_to_a_signed_snapshot_only(
    signed: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (signed / "hsnn_index/3/model.onnx").write_text("changed")
    for model in (*MODELS, "hsnn_retrieve"):
        (signed / model / "config.pbtxt").touch()
    asked = [
        "rollout",
        "rollback",
        "--repository",
        str(signed),
        "--url",
        "127.0.0.1:9",
        "--verify-key",
        str(keys[1]),
    ]
    for more in ([], ["--to", "3"]):
        assert main([*asked, *more]) == 1
        assert "version 3 is not loaded: " in capsys.readouterr().err
