"""The networks of one snapshot as Triton models, called from inside the server (business logic scripting)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock, local
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from request_decoding import Deadline

from hsnn_core.errors import ServerError

SCORER_OUTPUTS = ("monn", "logits")


class BlsRunner:
    """A ``Runner`` that calls user tower and scorers 1..N of exactly ``version``, by the names of the manifest's
    ``models``.

    One call per layer for all users of the request. Shared by the worker threads: each sets its own request's
    deadline with ``within``, and every call is sent with the time that is left. ``failures``: calls that failed so
    far, by model.
    """

    def __init__(self, version: int, models: Mapping[str, Any]) -> None:
        self._version = version
        self._user_tower, self._scorers = models["user_tower"], models["scorers"]
        self._user_outputs = [f"user_l{layer}" for layer in range(1, len(self._scorers) + 1)]
        self._thread = local()
        self._lock = Lock()
        self.failures = dict.fromkeys((self._user_tower, *self._scorers), 0)

    @contextmanager
    def within(self, deadline: Deadline) -> Iterator[None]:
        """Calls made inside by this thread belong to a request with this deadline."""
        self._thread.deadline = deadline
        try:
            yield
        finally:
            del self._thread.deadline

    def user_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """user_dense (B, Du) f32, user_ids (B, Su) i32 -> "user_l1".."user_lN": (B, U_l) f32."""
        values = self._call(self._user_tower, inputs, self._user_outputs)
        return dict(zip(self._user_outputs, values))

    def score(self, layer: int, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Layer ``layer`` (from 1) on user (B, U_l), item (B, C, E_l), ... -> monn, logits (B, C, T) f32."""
        monn, logits = self._call(self._scorers[layer - 1], inputs, SCORER_OUTPUTS)
        return monn, logits

    def _call(self, model: str, inputs: dict[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        request = pb_utils.InferenceRequest(
            model_name=model,
            model_version=self._version,
            inputs=[pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in inputs.items()],
            requested_output_names=list(outputs),
            timeout=self._thread.deadline.microseconds_left(),
            # A tower on a GPU would otherwise leave its outputs there; the search needs them here.
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        try:
            response = request.exec()
        except Exception:
            self._failed(model)
            raise
        if response.has_error():
            self._failed(model)
            raise ServerError(
                f"{model} version {self._version} failed: {response.error().message()}; "
                "every model of a snapshot must be loaded in the same version"
            )
        return [pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in outputs]

    def _failed(self, model: str) -> None:
        with self._lock:
            self.failures[model] += 1
