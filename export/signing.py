"""Whether a snapshot of a repository is signed by somebody who is trusted; see `hsnn_core.signature`."""

from __future__ import annotations

from pathlib import Path

from export.pbtxt import ORCHESTRATOR
from export.repository import orchestrator_directory, snapshot_models
from hsnn_core.errors import FormatError, PublishError
from hsnn_core.signature import check


def check_signature(repository: str | Path, version: int, trusted: Path) -> None:
    """PublishError unless a key in ``trusted`` signed this version, candidate or not, as it lies there now."""
    repository = Path(repository)
    *networks, _ = snapshot_models(repository, version)
    directories = {model: repository / model / str(version) for model in networks}
    directories[ORCHESTRATOR] = orchestrator_directory(repository, version)
    try:
        check(directories, ORCHESTRATOR, version, trusted)
    except FormatError as error:
        raise PublishError(f"{repository}: version {version} is not loaded: {error}") from error
