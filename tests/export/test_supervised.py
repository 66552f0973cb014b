"""A dead stub is loaded again only where a load brings back that very version."""

from __future__ import annotations

from pathlib import Path

import pytest

from export import pbtxt
from export.supervised import Served
from hsnn_core.errors import ServerError


class Server:
    def __init__(self) -> None:
        self.revived: list[tuple[str, int]] = []

    def revive(self, model: str, version: int) -> None:
        self.revived.append((model, version))


def repository(root: Path, **versions: tuple[int, ...]) -> Path:
    """Of models that hold two versions, the orchestrator one."""
    for model, numbers in versions.items():
        held = 1 if model == pbtxt.ORCHESTRATOR else 2
        for number in numbers:
            (root / model / str(number)).mkdir(parents=True)
        (root / model / "config.pbtxt").write_text(f"version_policy {{ latest {{ num_versions: {held} }} }}")
    return root


def test_what_is_newest_or_still_held_is_loaded_again(tmp_path: Path) -> None:
    root = repository(tmp_path, hsnn_retrieve=(5,), hsnn_scorer_l1=(4, 5, 6))
    served = Served(server := Server(), root)  # type: ignore[arg-type]
    served.revive("hsnn_retrieve", 5)
    served.revive("hsnn_scorer_l1", 5)  # of a candidate's networks there may be newer ones
    assert server.revived == [("hsnn_retrieve", 5), ("hsnn_scorer_l1", 5)]


def test_a_load_must_not_promote_what_was_only_published(tmp_path: Path) -> None:
    root = repository(tmp_path, hsnn_retrieve=(5, 6), hsnn_scorer_l1=(4, 5, 6))
    served = Served(server := Server(), root)  # type: ignore[arg-type]
    for model, version in (("hsnn_retrieve", 5), ("hsnn_scorer_l1", 4)):
        with pytest.raises(
            ServerError, match=f"version 6 of {model} is the newest there, so a load would not"
        ):
            served.revive(model, version)
    assert not server.revived
