"""The small world as a data set, and recipes for it."""

import pytest
import torch
from tiny_world import recipe, tables

from hsnn_train.calibration import calibrate
from hsnn_train.data.dataset import build_dataset
from hsnn_train.data.splits import Split
from hsnn_train.evaluate import pointwise
from hsnn_train.trainer import Trainer, evaluation_batches


@pytest.fixture(scope="session")
def dataset():
    torch.set_num_threads(1)
    log = tables()
    return build_dataset(log.schema, log, Split.from_dict({"by": "time"}), seed=1)


@pytest.fixture(scope="session")
def make_recipe():
    return recipe


@pytest.fixture
def calibrated(dataset, tmp_path):
    """Recipe -> a model that was trained and calibrated by it, its index, and what it says of validation by then."""

    def train(recipe):
        trainer = Trainer(recipe, dataset, tmp_path / "run", progress=False)
        model, batches = trainer.train(), evaluation_batches(dataset, recipe)

        def values():
            return pointwise(model, batches, dataset.valid, trainer.state, 1, parts=True)

        calibrate(model, values())
        return model, trainer.state, values

    return train
