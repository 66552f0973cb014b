"""hsnn_retrieve: Triton on one side, the layer-wise search on the other (paper Algorithm 2, Fig. 5).

A version directory is self-contained: this file and its neighbours, hsnn_core as it was when the snapshot was
published, and the bundle (index, transform, embeddings). The towers and scorers are the Triton models of the
same version, or their ONNX graphs run in here.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute().parent
# An installed package named hsnn_core would otherwise win over this snapshot's own.
sys.path.insert(0, str(HERE))

import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402
from admission import DeadlineUnmeetable, Job, QueueFull  # noqa: E402
from bls_runner import BlsRunner  # noqa: E402
from item_follower import items_of  # noqa: E402
from request_decoding import Ask, Deadline, decode_ask  # noqa: E402
from request_spans import Parent, SpanExporter, Spans, Stage  # noqa: E402
from retriever import Found, Retriever, answer_tensors  # noqa: E402
from serving_config import ServingConfig  # noqa: E402
from serving_metrics import Answered, LayerUse, ServingMetrics, Snapshot  # noqa: E402
from warm_up import NoNetworks, warm_up  # noqa: E402
from worker_pool import WorkerPool  # noqa: E402

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
from hsnn_core.request_log import (  # noqa: E402
    Refused,
    RequestLog,
    text_of,
    traceback_without_features,
    without_features,
)
from hsnn_core.scorer import PAIRS_PER_MESSAGE  # noqa: E402

# After this, what a version's end hangs in is given up: the process is killed, and Triton ends the unload.
FINALIZE_SECONDS = 30


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
        with ExitStack() as opened:  # a load that fails leaves no thread that could keep the process
            self._open(opened, args["model_name"], version, config, bundle)
            self._opened = opened.pop_all()

    def _open(
        self, opened: ExitStack, name: str, version: int, config: ServingConfig, bundle: Bundle
    ) -> None:
        """Start what follows, counts, logs and works; ``opened`` closes it in the reverse order."""
        layers = bundle.index.layers
        items = self._items = items_of(bundle, HERE.parent.parent / config.item_log, version)
        opened.callback(items.close)
        failures: Mapping[str, int] = {}
        if config.mode == "bls":
            runner = BlsRunner(version, bundle.manifest["models"])
            self._retriever = Retriever(bundle, runner, items, runner.within, PAIRS_PER_MESSAGE)
            failures = runner.failures
            cold = Retriever(bundle, NoNetworks(bundle), items)
        else:
            onnx = _onnx_runner(version, bundle.manifest["models"])
            cold = self._retriever = Retriever(bundle, onnx, items)
        self._schema = bundle.schema
        self._max_k = int(bundle.manifest["max_k"])
        # All versions share one config.pbtxt, whose k may be one that only a later snapshot allows.
        self._default = Ask(min(config.k, self._max_k), config.widths, tuple(bundle.schema.rank.tolist()))
        warm_up(bundle, cold, self._default)
        created = datetime.fromisoformat(bundle.manifest["created"]).timestamp()
        self._metrics = ServingMetrics(
            Snapshot(version, layers, created, config.workers, list(failures)), items, failures
        )
        opened.callback(self._metrics.close)
        self._log = RequestLog(name, version)
        opened.callback(self._log.close)
        self._spans = SpanExporter.from_environment(version)
        if self._spans is not None:
            opened.callback(self._spans.close)
        self._pool = WorkerPool(config.workers, config.queue, report=_report)
        opened.callback(self._pool.drain)

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            try:
                self._accept(request)
            except Exception as error:  # or Triton would drop the answers to all that it handed over together
                _report(error)

    def finalize(self) -> None:
        # Triton waits for the end of this process without bound, and with it whoever promotes the next snapshot. The
        # alarm's default action needs no Python, so it also ends an interpreter that hangs as it shuts down.
        signal.alarm(FINALIZE_SECONDS)
        self._opened.close()

    def _accept(self, request: Any) -> None:
        call = _Call(request, traced=self._spans is not None)
        self._metrics.started()
        if call.unreadable is not None:
            self._fail(call, call.unreadable)
            return
        job = Job(call.users, call.deadline, partial(self._answer, call), partial(self._fail, call))
        try:
            self._pool.submit(job)
        except Exception as error:
            self._fail(call, error)

    def _answer(self, call: _Call) -> float | None:
        began, call.began = time.perf_counter(), time.time_ns()
        try:
            ask = decode_ask(call.parameters, self._default, self._max_k, self._schema)
            found = self._retriever.retrieve(call.inputs, ask, call.deadline)
            call.send(answer_tensors(found.result))
        except Exception as error:  # whatever it is, it must reach this request's client and no other's
            self._fail(call, error)
            # A search that was cut off would have taken longer still; other failures say nothing of a search.
            return time.perf_counter() - began if isinstance(error, DeadlineExceeded) else None
        result = found.result
        self._metrics.finished(
            "ok",
            call.deadline.seconds_since_start(),
            Answered(
                [LayerUse(layer.microseconds / 1e6, int(layer.candidates.sum())) for layer in result.layers],
                users=len(result.valid),
                empty=int((result.valid == 0).sum()),
                eligible=found.eligible,
            ),
        )
        if self._spans is not None and call.parent is not None:
            self._spans.add(Spans(call.parent, call.whole("ok"), [*call.waited(), *_stages(call, found)]))
        return time.perf_counter() - began

    def _fail(self, call: _Call, error: Exception) -> None:
        outcome, code = _meaning(error)
        call.fail(error, code)
        seconds = call.deadline.seconds_since_start()
        self._metrics.finished(outcome, seconds)
        trace = None if call.parent is None else call.parent.trace
        facts = {"users": call.users, "k": call.asked_k()}
        refused = Refused(outcome, _NAMES[outcome], error, facts, call.request_id, seconds, trace)
        if self._log.add(refused) and not isinstance(error, HsnnError):
            _report(error)
        if self._spans is not None and call.parent is not None:
            text = f"{type(error).__name__}: {without_features(error)}"
            self._spans.add(Spans(call.parent, call.whole(outcome), call.waited(), text))


class _Call:
    """One request: what ``execute`` must copy out of it, and where its answer goes.

    ``unreadable``: why it could not be copied; then it is answered with that.
    """

    def __init__(self, request: Any, traced: bool) -> None:
        self.arrived = time.time_ns()
        self.began = 0  # unix nanoseconds at which a worker took it
        self._sender = request.get_response_sender()
        self.deadline = Deadline(0)
        self.users, self.parameters, self.request_id = 1, "", ""
        self.parent: Parent | None = None
        self.unreadable: Exception | None = None
        try:
            self._read(request, traced)
        except UnicodeDecodeError:
            self.unreadable = RequestError(
                "the request's id or the name or text of a parameter is not valid UTF-8, expected text; "
                "encode it, or leave it out"
            )
        except Exception as error:
            self.unreadable = error

    def _read(self, request: Any, traced: bool) -> None:
        self.deadline = Deadline(request.timeout())
        # Triton's memory behind the inputs is only promised while ``execute`` runs.
        self.inputs = {tensor.name(): tensor.as_numpy().copy() for tensor in request.inputs()}
        self.users = max((len(values) for values in self.inputs.values()), default=1)
        self._outputs = set(request.requested_output_names())
        self.parent = Parent.of(request) if traced else None
        self.request_id = request.request_id()
        self.parameters = request.parameters()

    def send(self, tensors: dict[str, np.ndarray]) -> None:
        outputs = [pb_utils.Tensor(name, value) for name, value in tensors.items() if name in self._outputs]
        self._sender.send(
            pb_utils.InferenceResponse(outputs), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        )

    def asked_k(self) -> int | None:
        """The k that it asks for; None for the default, for no number, or where its parameters can't be read."""
        try:
            k = json.loads(self.parameters or "{}").get("k")
        except Exception:  # nested too deeply, for one
            return None
        return k if isinstance(k, int) else None

    def whole(self, outcome: str) -> Stage:
        """The request from its arrival until now."""
        return Stage(
            "hsnn.retrieve", self.arrived, time.time_ns(), {"hsnn.outcome": outcome, "hsnn.users": self.users}
        )

    def waited(self) -> list[Stage]:
        """Its time before a worker took it, if one did."""
        return [Stage("hsnn.wait", self.arrived, self.began, {})] if self.began else []

    def fail(self, error: Exception, code: int) -> None:
        try:
            text = f"{type(error).__name__}: {text_of(error)}"
            response = pb_utils.InferenceResponse(error=pb_utils.TritonError(text, code))
        except Exception:
            response = pb_utils.InferenceResponse(error=pb_utils.TritonError("internal error"))
        try:
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as reason:  # the client is gone, or the answer was already sent
            pb_utils.Logger.log_warn(f"hsnn_retrieve: an answer could not be sent: {text_of(reason)}")


# The gRPC statuses of `_meaning`, by outcome.
_NAMES = {
    "overload": "UNAVAILABLE",
    "unmeetable": "UNAVAILABLE",
    "deadline": "CANCELLED",
    "invalid": "INVALID_ARGUMENT",
    "error": "INTERNAL",
}


def _stages(call: _Call, found: Found) -> list[Stage]:
    """What followed the wait, one stage after the other."""
    result, at = found.result, found.began
    stages = [Stage("hsnn.prepare", call.began, at, {})]
    named: list[tuple[str, int, dict[str, int]]] = [("hsnn.user_tower", result.user_microseconds, {})]
    named += [
        (
            f"hsnn.layer.{number}",
            layer.microseconds,
            {"hsnn.candidates": int(layer.candidates.sum()), "hsnn.kept": int(layer.kept.sum())},
        )
        for number, layer in enumerate(result.layers, start=1)
    ]
    for name, microseconds, attributes in named:
        stages.append(Stage(name, at, at + microseconds * 1000, attributes))
        at += microseconds * 1000
    return stages


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


def _report(error: Exception) -> None:
    """Into the server's log, what should not happen."""
    pb_utils.Logger.log_error("hsnn_retrieve: " + traceback_without_features(error))


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
