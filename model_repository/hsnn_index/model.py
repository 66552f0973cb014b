"""hsnn_index: item upserts and deletes, written to the log that every orchestrator of the server follows.

Answers when the updates are on the disk. A bad update is refused alone; a log that cannot be written (full disk,
another server's, another schema's) fails all of a call, with the reason, and keeps nothing else from working.
"""

from __future__ import annotations

import json
import sys
import traceback
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
from hsnn_core.errors import HsnnError, RequestError, SchemaMismatch, ServerError  # noqa: E402
from hsnn_core.item_updates import STATUSES  # noqa: E402
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
        self._metrics = _Metrics(int(args["model_version"]))
        try:
            self._updater.open()
        except HsnnError as error:
            pb_utils.Logger.log_error(f"hsnn_index: item updates are refused for now: {error}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        self._updater.close()

    def _answer(self, request: Any) -> Any:
        try:
            clock = _clock(json.loads(request.parameters() or "{}"))
            texts = pb_utils.get_input_tensor_by_name(request, "updates").as_numpy().tolist()
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
            return _failure(error)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, value) for name, value in tensors.items() if name in asked]
        )


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


def _failure(error: Exception) -> Any:
    codes = pb_utils.TritonError
    code = codes.INVALID_ARG if isinstance(error, RequestError | SchemaMismatch) else codes.INTERNAL
    if not isinstance(error, HsnnError):
        pb_utils.Logger.log_error("hsnn_index: " + "".join(traceback.format_exception(error)))
    return pb_utils.InferenceResponse(error=codes(f"{type(error).__name__}: {error}", code))


def _check_own_core() -> None:
    theirs, ours = Path(hsnn_core.__file__ or "").resolve().parent, (HERE / "hsnn_core").resolve()
    if theirs != ours:
        raise ServerError(
            f"hsnn_core was imported from {theirs}, expected this snapshot's own copy {ours}; "
            "publish again, or remove the other copy from the server's Python path"
        )
