"""The log of two halves as a data set, and as files under a recipe."""

import pyarrow.parquet
import pytest
import torch
import yaml
from halves_world import SCHEMA, log

from hsnn_train.data.dataset import build_dataset
from hsnn_train.data.splits import Split


@pytest.fixture(scope="session")
def halves():
    torch.set_num_threads(1)
    tables = log()
    return build_dataset(tables.schema, tables, Split.from_dict({"by": "leave_one_out"}), seed=1)


@pytest.fixture
def recipe_file(tmp_path):
    """The log as files under a recipe."""
    tables = log()
    pyarrow.parquet.write_table(tables.impressions, tmp_path / "impressions.parquet")
    pyarrow.parquet.write_table(tables.items, tmp_path / "items.parquet")
    raw = {
        "schema": SCHEMA,
        "data": {"impressions": "impressions.parquet", "items": "items.parquet"},
        "split": {"by": "leave_one_out"},
        "model": {"layers": ["small", "two_tower_xs"], "codebooks": [4]},
        "train": {
            "epochs": 1,
            "max_steps": 4,
            "batch_size": 32,
            "negatives": 2,
            "unlabelled": 0,
            "lr": 0.02,
        },
        "search": {"widths": [2], "k": 5, "max_k": 24, "candidates": "new"},
    }
    path = tmp_path / "halves.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path
