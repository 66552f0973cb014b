"""hsnn_retrieve: Triton on one side, the layer-wise search on the other (paper Algorithm 2, Fig. 5).

A version directory is self-contained: this file and its neighbours, hsnn_core as it was when the snapshot was
published, and the bundle (index, transform, embeddings). The towers and scorers are the Triton models of the
same version, or their ONNX graphs run in here.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute().parent
# An installed package named hsnn_core would otherwise win over this snapshot's own.
sys.path.insert(0, str(HERE))

import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402
from bls_runner import BlsRunner  # noqa: E402
from item_follower import items_of  # noqa: E402
from request_decoding import Ask, Deadline, decode_ask  # noqa: E402
from retriever import Retriever, answer_tensors  # noqa: E402
from serving_config import ServingConfig  # noqa: E402
from serving_metrics import LayerUse, ServingMetrics  # noqa: E402
from warm_up import NoNetworks, warm_up  # noqa: E402
from worker_pool import DeadlineUnmeetable, Job, QueueFull, WorkerPool  # noqa: E402

import hsnn_core  # noqa: E402
from hsnn_core import signature  # noqa: E402
from hsnn_core.bundle import Bundle  # noqa: E402
from hsnn_core.errors import (  # noqa: E402
    DeadlineExceeded,
    FeatureError,
    HsnnError,
    RequestError,
    SchemaMismatch,
    ServerError,
)
from hsnn_core.manifest import read_manifest  # noqa: E402
from hsnn_core.onnx_runner import OnnxRunner  # noqa: E402


class TritonPythonModel:
    """Answers through response senders: ``execute`` hands requests to a bounded pool and returns at once."""

    def initialize(self, args: dict[str, str]) -> None:
        _check_own_core()
        version = int(args["model_version"])
        _check_signature(version)
        config = ServingConfig.from_triton(args["model_config"])
        bundle = Bundle.open(HERE, verify=True)
        if bundle.schema.hash != config.schema_hash:
            raise SchemaMismatch(
                f"{HERE}: the bundle's schema is {bundle.schema.hash}, config.pbtxt says {config.schema_hash} "
                f"(first difference: {config.first_difference(bundle.schema)}); a new schema needs a new model "
                "repository, publish into an empty one"
            )
        layers = bundle.index.layers
        if len(config.widths) != layers - 1:
            raise ServerError(
                f"config.pbtxt: parameter widths: got {list(config.widths)}, expected {layers - 1} "
                f"numbers for an index of {layers} layers"
            )
        self._items = items_of(bundle, HERE.parent.parent / config.item_log, version)
        if config.mode == "bls":
            runner = BlsRunner(version, bundle.manifest["models"])
            self._retriever = Retriever(bundle, runner, self._items, runner.within)
            cold = Retriever(bundle, NoNetworks(bundle), self._items)
        else:
            onnx = _onnx_runner(version, bundle.manifest["models"])
            cold = self._retriever = Retriever(bundle, onnx, self._items)
        self._schema = bundle.schema
        self._max_k = int(bundle.manifest["max_k"])
        # All versions share one config.pbtxt, whose k may be one that only a later snapshot allows.
        self._default = Ask(min(config.k, self._max_k), config.widths, tuple(bundle.schema.rank.tolist()))
        warm_up(bundle, cold, self._default)
        self._metrics = ServingMetrics(version, layers, self._items)
        self._pool = WorkerPool(config.workers, config.queue)

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            call = _Call(request)
            self._metrics.started()
            job = Job(call.users, call.deadline, partial(self._answer, call), partial(self._fail, call))
            try:
                self._pool.submit(job)
            except HsnnError as error:
                self._fail(call, error)

    def finalize(self) -> None:
        self._pool.drain()
        self._items.close()
        self._metrics.close()

    def _answer(self, call: _Call) -> float | None:
        began = time.perf_counter()
        try:
            ask = decode_ask(call.parameters, self._default, self._max_k, self._schema)
            result = self._retriever.retrieve(call.inputs, ask, call.deadline)
            call.send(answer_tensors(result))
        except Exception as error:  # whatever it is, it must reach this request's client and no other's
            self._fail(call, error)
            # A search that was cut off would have taken longer still; other failures say nothing of a search.
            return time.perf_counter() - began if isinstance(error, DeadlineExceeded) else None
        self._metrics.finished(
            "ok",
            call.deadline.seconds_since_start(),
            [LayerUse(layer.microseconds / 1e6, int(layer.candidates.sum())) for layer in result.layers],
        )
        return time.perf_counter() - began

    def _fail(self, call: _Call, error: Exception) -> None:
        outcome, code = _meaning(error)
        if not isinstance(error, HsnnError):
            pb_utils.Logger.log_error("hsnn_retrieve: " + "".join(traceback.format_exception(error)))
        call.fail(f"{type(error).__name__}: {error}", code)
        self._metrics.finished(outcome, call.deadline.seconds_since_start())


class _Call:
    """One request: what ``execute`` must copy out of it, and where its answer goes."""

    def __init__(self, request: Any) -> None:
        # Triton's memory behind the inputs is only promised while ``execute`` runs.
        self.inputs = {tensor.name(): tensor.as_numpy().copy() for tensor in request.inputs()}
        self.parameters: str = request.parameters()
        self.users = max((len(values) for values in self.inputs.values()), default=1)
        self.deadline = Deadline(request.timeout())
        self._outputs = set(request.requested_output_names())
        self._sender = request.get_response_sender()

    def send(self, tensors: dict[str, np.ndarray]) -> None:
        outputs = [pb_utils.Tensor(name, value) for name, value in tensors.items() if name in self._outputs]
        self._sender.send(
            pb_utils.InferenceResponse(outputs), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        )

    def fail(self, message: str, code: int) -> None:
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
        try:
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:  # the client is gone, or the answer was already sent
            pb_utils.Logger.log_warn(f"hsnn_retrieve: could not send {message!r}: {error}")


def _meaning(error: Exception) -> tuple[str, int]:
    """The outcome to count and the status code to answer with."""
    codes = pb_utils.TritonError
    if isinstance(error, QueueFull):
        return "overload", codes.UNAVAILABLE
    if isinstance(error, DeadlineUnmeetable):
        return "unmeetable", codes.UNAVAILABLE
    if isinstance(error, DeadlineExceeded):
        return (
            "deadline",
            codes.CANCELLED,
        )  # Triton has no code for a deadline; this one is not retried blindly
    if isinstance(error, FeatureError | RequestError | SchemaMismatch):
        return "invalid", codes.INVALID_ARG
    return "error", codes.INTERNAL


def _check_own_core() -> None:
    theirs, ours = Path(hsnn_core.__file__ or "").resolve().parent, (HERE / "hsnn_core").resolve()
    if theirs != ours:
        raise ServerError(
            f"hsnn_core was imported from {theirs}, expected this snapshot's own copy {ours}; "
            "publish again, or remove the other copy from the server's Python path"
        )


def _check_signature(version: int) -> None:
    """Where the machine has trusted keys, only a snapshot that one of them signed is served. Code that was changed
    would not check: this is for data and networks; code is checked by who loads it (hsnn rollout --verify-key)."""
    if signature.TRUSTED.exists():
        models = read_manifest(HERE)["models"]
        singles = [models[name] for name in ("user_tower", "item_tower", "index") if name in models]
        directories = {
            name: HERE.parent.parent / name / str(version) for name in (*singles, *models["scorers"])
        }
        signature.check(directories | {"hsnn_retrieve": HERE}, "hsnn_retrieve", version, signature.TRUSTED)


def _onnx_runner(version: int, models: Mapping[str, Any]) -> OnnxRunner:
    repository = HERE.parent.parent
    named = [models["user_tower"], *models["scorers"]]
    user_tower, *scorers = [repository / model / str(version) / "model.onnx" for model in named]
    return OnnxRunner(user_tower, scorers)
