"""The code of a Python model's version: its sources and hsnn_core, copied in and recorded with their hashes.

A version serves with the code it was published with: an installed or newer hsnn_core can't change it.
"""

from __future__ import annotations

import json
from pathlib import Path

import hsnn_core
from hsnn_core.errors import FormatError, PublishError
from hsnn_core.files import copy_file, file_sha256, sync_directory, write_bytes

CODE_FILE = "code.json"
_SOURCES = Path(__file__).resolve().parents[1] / "model_repository"
ORCHESTRATOR_SOURCES = _SOURCES / "hsnn_retrieve"
INDEX_SOURCES = _SOURCES / "hsnn_index"


def code_files(sources: Path = ORCHESTRATOR_SOURCES) -> dict[str, Path]:
    """Relative path in the version directory -> source file, sorted; no tests, no caches."""
    files = {path.name: path for path in sources.glob("*.py")}
    if "model.py" not in files:
        raise PublishError(
            f"{sources}: no model.py there; publishing needs the project's source tree "
            "(install it with pip install -e)"
        )
    core = Path(hsnn_core.__file__).resolve().parent
    for path in core.rglob("*.py"):
        relative = path.relative_to(core)
        if not {"tests", "__pycache__"} & set(relative.parts):
            files[f"{core.name}/{relative.as_posix()}"] = path
    return dict(sorted(files.items()))


def vendor(target: Path, sources: Path = ORCHESTRATOR_SOURCES) -> dict[str, str]:
    """Copy the code into the version directory `target` and record sha256 per file in code.json; return
    them."""
    hashes = {}
    for relative, source in code_files(sources).items():
        copy = target / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source, copy)
        hashes[relative] = file_sha256(copy)
    for directory in {(target / relative).parent for relative in hashes}:
        sync_directory(directory)
    write_bytes(target / CODE_FILE, (json.dumps(hashes, indent=1) + "\n").encode())
    return hashes


def verify_code(version: Path) -> None:
    """FormatError when a version directory's code is not what was published."""
    record = version / CODE_FILE
    if not record.is_file():
        raise FormatError(f"{record}: missing; publish again")
    for relative, expected in json.loads(record.read_text()).items():
        path = version / relative
        got = file_sha256(path) if path.is_file() else "none (missing)"
        if got != expected:
            raise FormatError(f"{path}: sha256 {got}, expected {expected}; publish again")
