"""Training is a function of its seed with several threads too, on batches large enough to be split among them."""

import torch
from tiny_world import recipe, tables

from hsnn_train.data.dataset import build_dataset
from hsnn_train.data.splits import Split
from hsnn_train.trainer import Trainer


def test_two_threads_give_the_same_weights_twice(tmp_path):
    log = tables(users=300, items=400, rows=9000)
    dataset = build_dataset(log.schema, log, Split.from_dict({"by": "time"}), seed=1)
    settings = recipe(
        model={"layers": ["cpu_s", "small", "small"]},
        train={"max_steps": 8, "batch_size": 1024, "unlabelled": 2, "refresh_steps": 4},
    )
    threads, runs = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for name in "ab":
            model = Trainer(settings, dataset, tmp_path / name, progress=False).train()
            runs.append({key: value.clone() for key, value in model.state_dict().items()})
    finally:
        torch.set_num_threads(threads)
    assert [key for key in runs[0] if not torch.equal(runs[0][key], runs[1][key])] == []
    assert not torch.are_deterministic_algorithms_enabled()
