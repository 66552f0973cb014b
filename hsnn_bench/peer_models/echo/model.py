"""echo: reads the request's tensors and answers with constant ones of the right shape: the floor of the server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Answers of the shapes of hsnn_retrieve, K from the request's parameter ``k``."""

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        outputs = {tensor["name"]: tensor["dims"] for tensor in config["output"]}
        self._tasks = int(outputs["probabilities"][-1])
        self._k = int(config["parameters"]["k"]["string_value"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        users = max(len(tensor.as_numpy()) for tensor in request.inputs())
        k = int(json.loads(request.parameters() or "{}").get("k", self._k))
        answer = {
            "item_ids": np.zeros((users, k), np.int64),
            "probabilities": np.zeros((users, k, self._tasks), np.float32),
            "rank_score": np.zeros((users, k), np.float32),
            "valid": np.full((users, 1), k, np.int32),
        }
        wanted = request.requested_output_names()
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, value) for name, value in answer.items() if name in wanted]
        )
