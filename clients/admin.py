"""Model control of a running Triton: load, unload, what is there, is it sound. Needs the server's admin key."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from hsnn_core.errors import ServerError

from .tls import Tls, handshake_failure, open_client

KEY_HEADER = "triton-grpc-protocol-admin-key"


@dataclass(frozen=True)
class ModelVersion:
    """One version of one model: ``state`` is READY, LOADING, UNLOADING or UNAVAILABLE (``reason`` says why).

    ``version`` is None for a model that was never loaded."""

    model: str
    version: int | None
    state: str
    reason: str


class RepositoryAdmin:
    """Explicit model control over gRPC; may be shared between threads.

    >>> with RepositoryAdmin("localhost:8001", key) as admin:
    ...     admin.load("hsnn_retrieve")
    ...     print(admin.ready("hsnn_retrieve"), admin.versions("hsnn_retrieve"))

    ``url``: host:port. ``key``: the server's admin key, None where these calls are not restricted.
    ``timeout``: seconds that one call may take (a load warms the model up); ``tls``: None for plain text. Every
    failure is a ServerError.
    """

    def __init__(
        self, url: str, key: str | None = None, timeout: float = 120.0, tls: Tls | None = None
    ) -> None:
        self._url, self._timeout = url, timeout
        self._headers = {KEY_HEADER: key} if key else None
        self._grpc = open_client(InferenceServerClient, url, tls)

    def load(self, model: str) -> None:
        """Load the versions that ``model``'s configuration selects; returns when they are ready.

        Versions that are ready and unchanged go on without a break. When a new one fails, ServerError has
        its own message and the others go on serving."""
        self._call(f"load {model}", self._grpc.load_model, model)

    def unload(self, model: str) -> None:
        """Unload all versions of ``model``; returns when their requests are answered and their memory is
        free."""
        deadline = time.monotonic() + self._timeout
        self._call(f"unload {model}", self._grpc.unload_model, model)
        while any(entry.state in ("READY", "UNLOADING") for entry in self.index() if entry.model == model):
            if time.monotonic() >= deadline:
                raise ServerError(
                    f"{self._url}: {model} is still unloading after {self._timeout:g} s; "
                    "its last requests are not answered yet, or its process hangs: see the server's log"
                )
            time.sleep(0.05)

    def index(self) -> list[ModelVersion]:
        """Every version of every model the server knows, by name and version."""
        answer = self._call("list the models", self._grpc.get_model_repository_index)
        entries = [
            ModelVersion(model.name, int(model.version) if model.version else None, model.state, model.reason)
            for model in answer.models
        ]
        return sorted(entries, key=lambda entry: (entry.model, entry.version or 0))

    def versions(self, model: str) -> list[int]:
        """The versions of ``model`` that answer requests now, ascending."""
        return [
            entry.version
            for entry in self.index()
            if entry.model == model and entry.state == "READY" and entry.version is not None
        ]

    def states(self, model: str) -> dict[int, str]:
        """READY, LOADING, UNLOADING or UNAVAILABLE by version of ``model``, of those that the server ever knew."""
        return {
            entry.version: entry.state
            for entry in self.index()
            if entry.model == model and entry.version is not None
        }

    def calls_of(self, version: int) -> dict[str, int]:
        """Calls so far of this version of every model that has it ready, by model; those that failed are counted,
        those under way are not. Needs no key."""
        answer = self._call("read the statistics", self._grpc.get_inference_statistics)
        return {
            of.name: of.inference_stats.success.count + of.inference_stats.fail.count
            for of in answer.model_stats
            if of.version == str(version)
        }

    def instances(self, model: str, version: int) -> int:
        """How many instances of a version that is ready there are: each has a process where the model is in Python.
        Needs no key."""
        what = f"read the configuration of {model} version {version}"
        config = self._call(what, self._grpc.get_model_config, model, str(version)).config
        return max(1, sum(group.count * max(1, len(group.gpus)) for group in config.instance_group))

    def ready(self, model: str, version: int | None = None) -> bool:
        """Whether ``model`` (its newest version, or the given one) answers requests; needs no key."""
        wanted = "" if version is None else str(version)
        return bool(self._call(f"ask for {model}", self._grpc.is_model_ready, model, wanted))

    def infer(
        self, model: str, version: int, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]
    ) -> list[np.ndarray]:
        """One call of one version of ``model``, as a check before it gets traffic: named tensors (B, ...) in,
        the named outputs in their order. Needs no key."""
        tensors = []
        for name, values in inputs.items():
            tensors.append(InferInput(name, list(values.shape), np_to_triton_dtype(values.dtype)))
            tensors[-1].set_data_from_numpy(np.ascontiguousarray(values))
        asked = [InferRequestedOutput(name) for name in outputs]
        what = f"run {model} version {version}"
        result = self._call(what, self._grpc.infer, model, tensors, str(version), asked)
        return [result.as_numpy(name) for name in outputs]

    def close(self) -> None:
        self._grpc.close()

    def __enter__(self) -> RepositoryAdmin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments, headers=self._headers, client_timeout=self._timeout)
        except InferenceServerException as error:
            raise ServerError(f"{self._url}: can't {what}: {self._explain(error)}") from error

    def _explain(self, error: InferenceServerException) -> str:
        status, text = (error.status() or "").removeprefix("StatusCode."), error.message().strip()
        if "protocol is restricted" in text:
            given = "the key that was given is not the server's" if self._headers else "no key was given"
            return f"model control is restricted and {given}; use the admin key the server was started with"
        if status == "DEADLINE_EXCEEDED":
            return f"no answer within {self._timeout:g} s; see the server's log, or allow a longer timeout"
        if (failure := handshake_failure(text)) is not None:
            return f"{failure} ({text})"
        if status == "UNAVAILABLE":
            return f"no server answers there ({text}); check the address and that Triton runs"
        if "failed to poll from model repository" in text:
            return f"{text}: its repository has no such model, or its config.pbtxt is invalid (see the log)"
        return text
