"""Own logs, from files to a published repository, by the commands a person types."""

import pytest
import torch
from own_logs import write_logs

from hsnn_cli.main import main


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """A folder with shop.yaml, a trained and exported run, and a repository with version 1."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("shop")
    recipe = write_logs(folder)
    for command in (
        ["train", str(recipe), "--run", str(folder / "run")],
        ["export", str(folder / "run")],
        ["publish", str(folder / "run"), "--repository", str(folder / "repository")],
    ):
        assert main(command) == 0, command
    return folder
