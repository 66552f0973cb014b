"""From Triton's requests to one call of a network and back: what the python-based backends share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

Network = Callable[[dict[str, np.ndarray], list[str]], Sequence[np.ndarray]]


def respond(requests: Sequence[Any], network: Network, batched: bool) -> list[Any]:
    """One response per request, in their order.

    ``network(inputs, outputs)`` returns the named outputs. Where the model has a batch axis (``batched``),
    requests whose tensors differ only in it are computed in one call: the dynamic batcher brings them
    together, but leaves joining them to the backend. A failed call is an error to its own requests only.
    """
    inputs = [{tensor.name(): tensor.as_numpy() for tensor in request.inputs()} for request in requests]
    outputs = [list(request.requested_output_names()) for request in requests]
    responses: list[Any] = [None] * len(requests)
    for members in _alike(inputs) if batched else [[i] for i in range(len(requests))]:
        try:
            results = _compute([inputs[i] for i in members], [outputs[i] for i in members], network)
        except Exception as error:  # every library has exceptions of its own; none may end the stub
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs[members[0]].items())
            failure = pb_utils.TritonError(f"{type(error).__name__} on {shapes}: {error}")
            for i in members:
                responses[i] = pb_utils.InferenceResponse(error=failure)
            continue
        for i, result in zip(members, results):
            responses[i] = pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, array) for name, array in result.items()]
            )
    return responses


def _alike(inputs: Sequence[dict[str, np.ndarray]]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for i, tensors in enumerate(inputs):
        key = tuple(sorted((name, array.dtype.str, array.shape[1:]) for name, array in tensors.items()))
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _compute(
    inputs: Sequence[dict[str, np.ndarray]], outputs: Sequence[list[str]], network: Network
) -> list[dict[str, np.ndarray]]:
    wanted = list(dict.fromkeys(name for names in outputs for name in names))
    if len(inputs) == 1:
        return [dict(zip(wanted, network(inputs[0], wanted)))]
    rows = [next(iter(tensors.values())).shape[0] for tensors in inputs]
    joined = {name: np.concatenate([tensors[name] for tensors in inputs]) for name in inputs[0]}
    computed = dict(zip(wanted, network(joined, wanted)))
    ends = np.cumsum(rows)
    return [
        {name: computed[name][end - count : end] for name in names}
        for names, count, end in zip(outputs, rows, ends)
    ]
