"""hsnn_index: item upserts and deletes, written to the log that every orchestrator of the server follows.

Answers when the updates are on the disk. A bad update is refused alone; a log that cannot be written (full disk,
another server's, another schema's) fails all of a call, with the reason, and keeps nothing else from working.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute().parent
# An installed package named hsnn_core would otherwise win over this snapshot's own.
sys.path.insert(0, str(HERE))

import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402
from updater import Outcome, Updater  # noqa: E402

import hsnn_core  # noqa: E402
from hsnn_core.errors import (  # noqa: E402
    FeatureError,
    HsnnError,
    LogError,
    RequestError,
    SchemaMismatch,
    ServerError,
)
from hsnn_core.item_updates import FAILED, REFUSED, STATUSES  # noqa: E402
from hsnn_core.request_log import (  # noqa: E402
    Refused,
    RequestLog,
    text_of,
    traceback_without_features,
)
from hsnn_core.schema import Schema  # noqa: E402

PARAMETERS = ("clock",)  # the client's, microseconds since the epoch, where its sequences come from it


class TritonPythonModel:
    """Called by Triton: ``initialize`` once, then ``execute`` with one call after another."""

    def initialize(self, args: dict[str, str]) -> None:
        _check_own_core()
        parameters = json.loads(args["model_config"]).get("parameters", {})
        facts = {name: value["string_value"] for name, value in parameters.items()}
        lacking = [name for name in ("schema_hash", "item_log") if not facts.get(name)]
        if lacking:
            raise ServerError(
                f"config.pbtxt: parameters {lacking} are missing, got {sorted(facts)}; publish again"
            )
        schema = Schema.from_json((HERE / "schema.json").read_text())
        if schema.hash != facts["schema_hash"]:
            raise SchemaMismatch(
                f"{HERE}: schema.json has hash {schema.hash}, config.pbtxt says {facts['schema_hash']}; a new "
                "schema needs a new model repository, publish into an empty one"
            )
        repository = HERE.parent.parent
        self._updater = Updater(repository / facts["item_log"], schema)
        version = int(args["model_version"])
        self._metrics = _Metrics(version)
        self._log = RequestLog(args["model_name"], version, "updates")
        try:
            self._updater.open()
        except HsnnError as error:
            pb_utils.Logger.log_error(f"hsnn_index: item updates are refused for now: {error}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        self._updater.close()
        self._log.close()

    def _answer(self, request: Any) -> Any:
        began, sent = time.perf_counter(), None
        try:
            clock = _clock(json.loads(request.parameters() or "{}"))
            texts = pb_utils.get_input_tensor_by_name(request, "updates").as_numpy().tolist()
            sent = len(texts)
            outcome = self._updater.apply(texts, clock)
            self._metrics.add(outcome)
            tensors = {
                "status": np.array([STATUSES.index(status) for status in outcome.status], np.int32),
                "message": np.array([text.encode() for text in outcome.messages], np.object_),
                "position": np.array([outcome.position], np.int64),
            }
            asked = set(request.requested_output_names())
            if "stats" in asked:
                tensors["stats"] = np.array([json.dumps(self._updater.stats()).encode()], np.object_)
        except Exception as error:  # whatever it is, this call's client must hear of it
            return self._failure(request, error, sent, time.perf_counter() - began)
        self._report(request, outcome, time.perf_counter() - began)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, value) for name, value in tensors.items() if name in asked]
        )

    def _failure(self, request: Any, error: Exception, updates: int | None, seconds: float) -> Any:
        """The answer to a call of which nothing was taken, and its line in the log."""
        codes = pb_utils.TritonError
        invalid = isinstance(error, RequestError | SchemaMismatch)
        outcome, name = ("invalid", "INVALID_ARGUMENT") if invalid else ("error", "INTERNAL")
        logged = self._log.add(
            Refused(outcome, name, error, {"updates": updates}, _request_id(request), seconds)
        )
        if logged and not isinstance(error, HsnnError):
            pb_utils.Logger.log_error("hsnn_index: " + traceback_without_features(error))
        code = codes.INVALID_ARG if invalid else codes.INTERNAL
        return pb_utils.InferenceResponse(error=codes(f"{type(error).__name__}: {text_of(error)}", code))

    def _report(self, request: Any, outcome: Outcome, seconds: float) -> None:
        """A line in the log for a call of which some updates were refused or could not be written."""
        refused, failed = outcome.status.count(REFUSED), outcome.status.count(FAILED)
        if not refused and not failed:
            return
        status = FAILED if failed else REFUSED
        first = outcome.messages[outcome.status.index(status)]
        error = LogError(first) if failed else FeatureError(_without_values(first))
        facts = {"updates": len(outcome.status), "refused": refused, "failed": failed}
        self._log.add(Refused(status, "OK", error, facts, _request_id(request), seconds))


class _Metrics:
    """hsnn_item_updates_total{outcome} and hsnn_item_log_position, labelled with the model's version."""

    def __init__(self, version: int) -> None:
        labels = {"version": str(version)}
        family = pb_utils.MetricFamily
        # The families are kept: a metric goes when its family is collected.
        self._families = (
            family(
                name="hsnn_item_updates_total", description="Item updates by outcome", kind=family.COUNTER
            ),
            family(
                name="hsnn_item_log_position",
                description="The item log's newest position after the last call",
                kind=family.GAUGE,
            ),
        )
        self._updates = {s: self._families[0].Metric(labels=labels | {"outcome": s}) for s in STATUSES}
        self._position = self._families[1].Metric(labels=labels)

    def add(self, outcome: Outcome) -> None:
        for status, metric in self._updates.items():
            if count := outcome.status.count(status):
                metric.increment(count)
        self._position.set(outcome.position)


def _clock(parameters: dict[str, Any]) -> int | None:
    unknown = sorted(name for name in parameters if name not in PARAMETERS and not name.startswith("triton_"))
    if unknown:
        raise RequestError(f"unknown request parameters {unknown}, expected among {list(PARAMETERS)}")
    clock = parameters.get("clock")
    if clock is not None and (isinstance(clock, bool) or not isinstance(clock, int)):
        raise RequestError(f"clock: got {clock!r}, expected microseconds since the epoch as a whole number")
    return clock


def _without_values(text: str) -> str:
    """Why an update was refused, as far as it holds no value of an item: what is wrong, not what was got. The client
    has the whole text."""
    what, got, _ = text.partition(": got ")
    return f"{what}: not as expected" if got else what.replace('"', "'").partition("'")[0].rstrip()


def _request_id(request: Any) -> str:
    """What the client called its call; nothing when that is no text."""
    try:
        return str(request.request_id())
    except UnicodeDecodeError:
        return ""


def _check_own_core() -> None:
    theirs, ours = Path(hsnn_core.__file__ or "").resolve().parent, (HERE / "hsnn_core").resolve()
    if theirs != ours:
        raise ServerError(
            f"hsnn_core was imported from {theirs}, expected this snapshot's own copy {ours}; "
            "publish again, or remove the other copy from the server's Python path"
        )
