"""Training on a GPU gives what training on the CPU gives, up to rounding; what is no device is refused."""

import numpy as np
import pytest
import torch

from hsnn_core.errors import SchemaError
from hsnn_train.batches import step_rng
from hsnn_train.checkpoint import load_run
from hsnn_train.device import find_device, moved
from hsnn_train.evaluate import evaluate
from hsnn_train.hsnn import NodeBatch
from hsnn_train.trainer import Trainer, make_batches

GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"
)


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:99"])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(SchemaError, match=f"--device.*{name}"):
        find_device(name)


def test_all_tensors_of_a_nested_tuple_move_and_the_rest_stays():
    rows = np.arange(3)
    node = NodeBatch(None, torch.zeros(2, 3), torch.zeros(4))
    (found, other), same = moved(((node, rows), "text"), torch.device("meta"))
    assert isinstance(found, NodeBatch)
    assert found.dense is None
    assert found.ids.is_meta
    assert found.of.is_meta
    assert other is rows
    assert same == "text"


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("index", ["joint", "em"])
@pytest.mark.parametrize(
    "train", [{}, {"pool": 64, "unlabelled": 0, "hard": 2, "negatives": 4, "commitment": 1.0}]
)
def test_a_gpu_trains_evaluates_and_leaves_a_run_for_the_cpu(dataset, make_recipe, tmp_path, index, train):
    recipe = make_recipe(model={"index": index}, train=train)
    trainer = Trainer(recipe, dataset, tmp_path / "run", progress=False, device=torch.device("cuda"))
    model = trainer.train()
    assert all(parameter.is_cuda for parameter in model.parameters())
    report = evaluate(model, dataset, recipe, trainer.state, progress=False)
    run = load_run(tmp_path / "run")
    assert not any(parameter.is_cuda for parameter in run.model.parameters())
    again = evaluate(run.model, dataset, recipe, run.index, progress=False)
    for on_gpu, on_cpu in zip(report["pointwise"], again["pointwise"], strict=True):
        assert on_gpu["ne"] == pytest.approx(on_cpu["ne"], abs=1e-4)
    batch = make_batches(dataset, recipe).make(dataset.valid, np.arange(8), run.index, step_rng(1, 0))
    there = model(moved(batch, model.device), None).logits[-1].cpu()
    assert torch.allclose(there, run.model(batch, None).logits[-1], atol=1e-3)
    resumed = Trainer(recipe, dataset, tmp_path / "run", resume=True, progress=False)
    assert resumed.finished
