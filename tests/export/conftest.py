from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

from standin_world import standin_source  # noqa: E402

from export.export_run import Source, export_source  # noqa: E402
from export.exported import Exported  # noqa: E402


@pytest.fixture(scope="session")
def source() -> Source:
    return standin_source()


@pytest.fixture(scope="session")
def exported(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A finished export of the three-layer StandIn for onnxruntime. Not to be changed."""
    return export_source(source, tmp_path_factory.mktemp("run") / "export", progress=False)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A pair as the documentation makes it."""
    key, public = tmp_path / "sign.key", tmp_path / "sign.pub"
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True, capture_output=True
    )
    subprocess.run(
        ["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True, capture_output=True
    )
    return key, public
