"""How Triton hands over requests with and without the optional inputs of the orchestrator's configuration."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny_snapshot import SCHEMA
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

from clients.encode import UserEncoder, context_tensors
from clients.wire import MODEL
from export import pbtxt
from hsnn_core.schema import Schema
from hsnn_server.triton import TritonServer

pytestmark = pytest.mark.triton

TARGETED = Schema.from_dict(
    SCHEMA
    | {
        "eligibility": {
            "market": {"kind": "set", "ask": 2},
            "running": {"kind": "range", "from": "start", "until": "end"},
        }
    }
)
# Says how many requests came together, which tensors this one has, and what it excludes.
SPY = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.02)
        responses = []
        for request in requests:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            excluded = inputs.get("exclude_items", np.zeros((len(inputs["age"]), 0), np.int64))
            seen = np.stack([[len(requests), len(inputs), *excluded[row]] for row in range(len(excluded))])
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("item_ids", seen.astype(np.int64))]))
        return responses
"""


def test_requests_with_other_optional_inputs_are_all_answered_and_alike_ones_go_together(
    tmp_path: Path,
) -> None:
    config = pbtxt.orchestrator_config(TARGETED, 1, 10, (), pbtxt.ServingOptions())
    (tmp_path / MODEL / "1").mkdir(parents=True)
    (tmp_path / MODEL / "1" / "model.py").write_text(SPY)
    (tmp_path / MODEL / pbtxt.CONFIG_FILE).write_text(pbtxt.to_text(config))
    encoder = UserEncoder(TARGETED)

    with TritonServer(tmp_path, models=[MODEL]) as server:
        client = InferenceServerClient(server.urls.grpc)

        def ask(number: int, context: dict[str, int] | None) -> np.ndarray:
            users = 1 + number % 3
            tensors = encoder.encode([{}] * users)
            if context is not None:
                tensors |= context_tensors(TARGETED, users, context, list(range(number % 7)))
            names = {np.float32: "FP32", np.float64: "FP64", np.int64: "INT64"}
            inputs = []
            for name, values in tensors.items():
                inputs.append(InferInput(name, list(values.shape), names[values.dtype.type]))
                inputs[-1].set_data_from_numpy(values)
            seen = client.infer(MODEL, inputs, outputs=[InferRequestedOutput("item_ids")]).as_numpy(
                "item_ids"
            )
            assert (seen[:, 1] == len(tensors)).all()
            expected = [] if context is None else list(range(number % 7))
            assert seen[:, 2:].tolist() == [expected] * users
            return seen[:, 0]

        with ThreadPoolExecutor(16) as pool:
            mixed = list(pool.map(lambda n: ask(n, {"market": n} if n % 2 else None), range(60)))
            alike = list(pool.map(lambda n: ask(n, {"market": n}), range(60)))
        client.close()
    assert len(mixed) == 60
    assert max(together.max() for together in alike) > 3, "though they exclude other numbers of items"
