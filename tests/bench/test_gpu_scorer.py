"""The scorer that `hsnn bench gpu` times: parts of a batch are the whole, precisions keep the same nodes."""

import pytest
import torch

from hsnn_bench import gpu_scorer
from hsnn_core.errors import SchemaError


@torch.inference_mode()
@pytest.mark.parametrize("precision", list(gpu_scorer.PRECISIONS))
def test_a_batch_in_parts_is_the_batch(precision):
    scorer = gpu_scorer.Scorer("small", 100, 5, precision, torch.device("cpu"))
    whole = scorer()
    scorer.parts = 3
    logits, kept = scorer()
    assert torch.allclose(logits, whole[0], atol=1e-5)
    assert torch.equal(kept, whole[1])
    assert logits.shape == (5, gpu_scorer.KEPT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_what_is_missing():
    with pytest.raises(SchemaError, match="sees 0 GPUs on this machine; install a CUDA build of torch"):
        gpu_scorer.measure(gpu_scorer.GpuOptions())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch")
def test_a_gpu_is_measured(tmp_path):
    options = gpu_scorer.GpuOptions(presets=("small",), batches=(1, 2), nodes=100)
    page = gpu_scorer.run_gpu(options, "hsnn bench gpu", tmp_path).read_text()
    assert page.count("| small |") == 6
    assert torch.cuda.get_device_name() in page
