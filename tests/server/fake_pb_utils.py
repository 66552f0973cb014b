"""A stand-in for triton_python_backend_utils: as much of it as the orchestrator touches, and no server.

Tests that use it check the orchestrator's own logic; what Triton really does, those marked triton check.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any, ClassVar

import numpy as np


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._values


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = 1) -> None:
        message.encode()  # the real one raises, too, for what no UTF-8 text can hold
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: Any = (), error: TritonError | None = None) -> None:
        self.tensors = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}
        self._error = error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


@dataclass
class Sender:
    """Collects the one final response of a request."""

    responses: list[InferenceResponse] = field(default_factory=list)
    done: Event = field(default_factory=Event)

    def send(self, response: InferenceResponse, flags: int) -> None:
        assert flags == 1, "a non-decoupled model sends exactly one, final response"
        assert not self.responses
        self.responses.append(response)
        self.done.set()

    def wait(self) -> InferenceResponse:
        assert self.done.wait(20), "no response was sent"
        return self.responses[0]


class Request:
    """What ``execute`` is handed."""

    def __init__(
        self,
        inputs: dict[str, np.ndarray],
        outputs: tuple[str, ...] = ("item_ids", "probabilities", "rank_score", "valid"),
        timeout: int = 0,
        **parameters: Any,
    ) -> None:
        self._inputs, self._outputs, self._timeout, self._parameters = inputs, outputs, timeout, parameters
        self.sender = Sender()
        self.context: str | None = None  # of its trace, as Triton gives it

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, values) for name, values in self._inputs.items()]

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def request_id(self) -> str:
        return "ad-17"

    def trace(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(get_context=lambda: self.context)

    def timeout(self) -> int:
        return self._timeout

    def requested_output_names(self) -> set[str]:
        return set(self._outputs)

    def get_response_sender(self) -> Sender:
        return self.sender


class Metric:
    def __init__(self, labels: dict[str, str], buckets: Any = None) -> None:
        self.labels, self.value, self.observed = labels, 0.0, []  # type: ignore[var-annotated]

    def increment(self, by: float) -> None:
        self.value += by

    def set(self, value: float) -> None:
        self.value = value

    def observe(self, value: float) -> None:
        self.observed.append(value)


class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = range(3)
    made: dict[str, list[Metric]]

    def __init__(self, name: str, description: str, kind: int) -> None:
        self.metrics = self.made[name] = []  # type: ignore[var-annotated]

    def Metric(self, labels: dict[str, str], **options: Any) -> Metric:
        self.metrics.append(Metric(labels, **options))
        return self.metrics[-1]


def make(call: Callable[[Any], InferenceResponse]) -> types.ModuleType:
    """The module; ``call`` answers BLS requests (model_name, model_version, timeout, inputs, ...)."""
    module = types.ModuleType("triton_python_backend_utils")
    lock = Lock()

    class InferenceRequest(types.SimpleNamespace):
        def exec(self) -> InferenceResponse:
            with lock:
                module.calls.append(self)  # type: ignore[attr-defined]
            return call(self)

    class Logger:
        lines: ClassVar[list[str]] = []

        @classmethod
        def log_error(cls, line: str) -> None:
            cls.lines.append(line)

        log_warn = log_error

    facts: dict[str, Any] = {
        "calls": [],
        "Tensor": Tensor,
        "TritonError": TritonError,
        "InferenceRequest": InferenceRequest,
        "InferenceResponse": InferenceResponse,
        "MetricFamily": type("MetricFamily", (MetricFamily,), {"made": {}}),
        "Logger": Logger,
        "PreferredMemory": lambda kind, device: (kind, device),
        "TRITONSERVER_MEMORY_CPU": 0,
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": 1,
        "get_input_tensor_by_name": lambda request, name: Tensor(name, request._inputs[name]),
        "get_output_tensor_by_name": lambda response, name: Tensor(name, response.tensors[name]),
    }
    for name, value in facts.items():
        setattr(module, name, value)
    return module
