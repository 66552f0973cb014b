"""The small world as a data set, and recipes for it."""

import pytest
import torch
from tiny_world import recipe, tables

from hsnn_train.data.dataset import build_dataset
from hsnn_train.data.splits import Split


@pytest.fixture(scope="session")
def dataset():
    torch.set_num_threads(1)
    log = tables()
    return build_dataset(log.schema, log, Split.from_dict({"by": "time"}), seed=1)


@pytest.fixture(scope="session")
def make_recipe():
    return recipe
