"""The orchestrator's own logic, driven with a fake pb_utils; the real server: test_orchestrator_triton.py."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from threading import Event
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_pb_utils
import numpy as np
import pytest
from fake_pb_utils import InferenceResponse, Request, Tensor, TritonError
from tiny_snapshot import (
    ORCHESTRATOR,
    SCHEMA,
    TinySnapshot,
    item_ids,
    orchestrator_parameters,
    write_snapshot,
)

from hsnn_core.errors import FormatError
from hsnn_core.keys import KEY_MISSING
from hsnn_core.onnx_runner import OnnxRunner
from hsnn_core.schema import Schema

VERSION = 3
OTHER = Schema.from_dict(SCHEMA | {"name": "other"})


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> TinySnapshot:
    return write_snapshot(tmp_path_factory.mktemp("repository"), VERSION)


class Orchestrator:
    """A loaded model.py and the fake server around it."""

    def __init__(self, snapshot: TinySnapshot, module: ModuleType, pb_utils: ModuleType) -> None:
        self.snapshot, self.pb_utils = snapshot, pb_utils
        self.model = module.TritonPythonModel()
        self.alarms: list[int] = []

    def start(self, **parameters: Any) -> Orchestrator:
        facts = orchestrator_parameters(self.snapshot.schema) | {k: str(v) for k, v in parameters.items()}
        config = {"parameters": {name: {"string_value": value} for name, value in facts.items()}}
        self.model.initialize(
            {"model_config": json.dumps(config), "model_name": "hsnn_retrieve", "model_version": str(VERSION)}
        )
        return self

    def ask(
        self, rows: Any = slice(0, 1), context: dict[str, np.ndarray] | None = None, **options: Any
    ) -> Request:
        users = {name: value[rows] for name, value in self.snapshot.users.items()}
        request = Request(users | (context or {}), **options)
        assert self.model.execute([request]) is None
        return request

    def error(self, rows: Any = slice(0, 1), **options: Any) -> tuple[str, int]:
        error = self.ask(rows, **options).sender.wait().error()
        assert error is not None
        return error.message(), error.code()


@pytest.fixture
def bls_hook() -> dict[str, Callable[[Any], None]]:
    """Tests put something under "before" that happens in every BLS call."""
    return {"before": lambda request: None}


@pytest.fixture
def orchestrator(
    snapshot: TinySnapshot, bls_hook: dict[str, Callable[[Any], None]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Orchestrator]:
    networks = OnnxRunner(snapshot.user_tower, snapshot.scorers)

    def call(request: Any) -> InferenceResponse:
        bls_hook["before"](request)
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs}
        if request.model_name == "hsnn_user_tower":
            outputs = networks.user_tower(inputs)
        else:
            layer = int(request.model_name.removeprefix("hsnn_scorer_l"))
            outputs = dict(zip(("monn", "logits"), networks.score(layer, inputs)))
        return InferenceResponse([Tensor(name, outputs[name]) for name in request.requested_output_names])

    pb_utils = fake_pb_utils.make(call)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb_utils)
    monkeypatch.setattr(sys, "path", [str(snapshot.version_directory), *sys.path])
    names = [path.stem for path in ORCHESTRATOR.glob("*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    loaded = Orchestrator(snapshot, importlib.import_module("model"), pb_utils)
    monkeypatch.setattr(signal, "alarm", loaded.alarms.append)  # it is for a process of its own
    yield loaded
    if hasattr(loaded.model, "_opened"):
        loaded.model.finalize()
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("mode", ["bls", "in_process"])
def test_answers_equal_the_offline_search(orchestrator: Orchestrator, mode: str) -> None:
    orchestrator.start(mode=mode)
    answer = orchestrator.ask(slice(0, 4), k=5, widths="2,3").sender.wait()
    expected = orchestrator.snapshot.offline(slice(0, 4), widths=(2, 3), k=5)
    assert set(answer.tensors) == {"item_ids", "probabilities", "rank_score", "valid"}
    np.testing.assert_array_equal(answer.tensors["item_ids"], expected.item_ids)
    np.testing.assert_array_equal(answer.tensors["probabilities"], expected.probabilities)
    np.testing.assert_array_equal(answer.tensors["rank_score"], expected.rank_score)
    np.testing.assert_array_equal(answer.tensors["valid"], expected.valid[:, None])


def test_a_default_k_beyond_this_snapshots_is_its_most(orchestrator: Orchestrator) -> None:
    """All versions share one config.pbtxt; after a rollback it may be that of a snapshot that allows more."""
    answer = orchestrator.start(k=5000).ask().sender.wait()
    assert answer.tensors["item_ids"].shape == (1, 100)


def test_bls_calls_pin_the_version_and_pass_on_the_time_left(orchestrator: Orchestrator) -> None:
    orchestrator.start().ask(slice(0, 2), timeout=5_000_000).sender.wait()
    calls = orchestrator.pb_utils.calls
    models = list(dict.fromkeys(call.model_name for call in calls))  # a layer may be scored in pieces
    assert models == ["hsnn_user_tower", "hsnn_scorer_l1", "hsnn_scorer_l2", "hsnn_scorer_l3"]
    assert {call.model_version for call in calls} == {VERSION}
    left = [call.timeout for call in calls]
    assert 5_000_000 > left[0] > left[1] > left[2] > left[3] > 0  # microseconds
    assert {len(call.inputs[0].as_numpy()) for call in calls} == {2}, "users of one request go together"
    assert calls[0].preferred_memory == (orchestrator.pb_utils.TRITONSERVER_MEMORY_CPU, 0)


def test_stages_come_only_when_asked_for(orchestrator: Orchestrator) -> None:
    stages = orchestrator.start().ask(slice(0, 2), outputs=("item_ids", "stage_us")).sender.wait().tensors
    assert set(stages) == {"item_ids", "stage_us"}
    assert stages["stage_us"].shape == (2, 5)
    assert (stages["stage_us"] >= 0).all()
    assert (stages["stage_us"][:, -1] >= stages["stage_us"][:, :-1].sum(axis=1)).all()


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"k": 0}, "RequestError: k: got 0, expected a whole number >= 1"),
        ({"k": 1.5}, "RequestError: k: got 1.5, expected a whole number >= 1"),
        ({"k": True}, "RequestError: k: got True, expected a whole number >= 1"),
        ({"k": 10**6}, "RequestError: k: got 1000000, expected at most 100 (the snapshot's max_k)"),
        ({"widths": "4"}, "RequestError: widths: got '4', expected 2 numbers separated by commas"),
        ({"widths": "4,x"}, "RequestError: widths: got 'x', expected a whole number >= 1"),
        (
            {"width": "4,8"},
            "RequestError: unknown request parameters ['width'], expected among ['k', 'widths'",
        ),
        (
            {"schema_hash": "0" * 16},
            f"SchemaMismatch: the client encodes by schema {'0' * 16}, this snapshot",
        ),
    ],
)
def test_wrong_parameters_are_the_clients_error(
    orchestrator: Orchestrator, parameters: dict[str, Any], text: str
) -> None:
    message, code = orchestrator.start().error(**parameters)
    assert text in message
    assert code == TritonError.INVALID_ARG


def test_one_failing_request_fails_no_other(orchestrator: Orchestrator) -> None:
    orchestrator.start()
    good = {name: value[:2] for name, value in orchestrator.snapshot.users.items()}
    bad = good | {"age": np.full_like(good["age"], np.nan)}
    requests = [Request(good), Request(bad), Request(good, k=0), Request(good)]
    orchestrator.model.execute(requests)
    first, nan, zero, last = (request.sender.wait() for request in requests)
    assert nan.error().code() == zero.error().code() == TritonError.INVALID_ARG
    assert "FeatureError" in nan.error().message()
    assert "age" in nan.error().message()
    np.testing.assert_array_equal(first.tensors["item_ids"], last.tensors["item_ids"])


def test_inputs_are_copied_before_execute_returns(
    orchestrator: Orchestrator, bls_hook: dict[str, Callable[[Any], None]]
) -> None:
    entered, go = Event(), Event()

    def hold(_: Any) -> None:
        entered.set()
        assert go.wait(20)

    orchestrator.start(workers=1)
    expected = orchestrator.ask().sender.wait().tensors
    bls_hook["before"] = hold
    blocker = orchestrator.ask()
    assert entered.wait(20)
    inputs = {name: value[:1].copy() for name, value in orchestrator.snapshot.users.items()}
    waiting = Request(inputs)
    orchestrator.model.execute([waiting])
    for value in inputs.values():
        value[:] = 0  # as Triton may reuse the memory
    go.set()
    blocker.sender.wait()
    np.testing.assert_array_equal(waiting.sender.wait().tensors["rank_score"], expected["rank_score"])


def test_a_full_queue_refuses_at_once_and_loses_nothing(
    orchestrator: Orchestrator, bls_hook: dict[str, Callable[[Any], None]]
) -> None:
    entered, go = Event(), Event()

    def hold(_: Any) -> None:
        entered.set()
        assert go.wait(20)

    bls_hook["before"] = hold
    orchestrator.start(workers=1, queue=1)
    running = orchestrator.ask()
    assert entered.wait(20)
    waiting, refused = orchestrator.ask(), orchestrator.ask()
    assert refused.sender.done.is_set(), "refused without waiting"
    error = refused.sender.wait().error()
    assert error.code() == TritonError.UNAVAILABLE
    assert error.message().startswith("QueueFull: 1 requests are running and 1 are waiting")
    go.set()
    assert not running.sender.wait().has_error()
    assert not waiting.sender.wait().has_error()
    assert not orchestrator.ask().sender.wait().has_error()


def test_the_deadline_stops_the_search_between_layers(
    orchestrator: Orchestrator, bls_hook: dict[str, Callable[[Any], None]]
) -> None:
    def slow_first_layer(request: Any) -> None:
        if request.model_name == "hsnn_scorer_l1":
            time.sleep(0.1)

    bls_hook["before"] = slow_first_layer
    message, code = orchestrator.start().error(timeout=50_000)
    assert message.startswith("DeadlineExceeded: the request took ")
    assert "allowed are 50.0 ms" in message
    assert code == TritonError.CANCELLED
    assert "hsnn_scorer_l2" not in {call.model_name for call in orchestrator.pb_utils.calls}


def test_time_in_the_queue_counts(
    orchestrator: Orchestrator, bls_hook: dict[str, Callable[[Any], None]]
) -> None:
    bls_hook["before"] = lambda request: time.sleep(0.05)
    orchestrator.start(workers=1, queue=4)
    first = orchestrator.ask()
    late = orchestrator.ask(timeout=20_000)
    assert not first.sender.wait().has_error()
    assert late.sender.wait().error().message().startswith(("DeadlineUnmeetable", "DeadlineExceeded"))
    assert len(orchestrator.pb_utils.calls) == 4, "nothing was computed for the late one"


def test_what_cannot_meet_its_deadline_is_refused_at_once(
    orchestrator: Orchestrator, bls_hook: dict[str, Callable[[Any], None]]
) -> None:
    entered, go = Event(), Event()

    def hold(_: Any) -> None:
        entered.set()
        assert go.wait(20)

    bls_hook["before"] = lambda request: time.sleep(0.02)
    orchestrator.start(workers=1, queue=4)
    orchestrator.ask().sender.wait()  # takes at least 80 ms: four calls
    bls_hook["before"] = hold
    running = orchestrator.ask()
    assert entered.wait(20)
    patient, hurried = orchestrator.ask(timeout=60_000_000), orchestrator.ask(timeout=50_000)
    assert hurried.sender.done.is_set(), "refused without waiting"
    error = hurried.sender.wait().error()
    assert error.code() == TritonError.UNAVAILABLE
    assert error.message().startswith("DeadlineUnmeetable: the request has ")
    assert "with 1 running and 1 waiting it would need about " in error.message()
    go.set()
    assert not running.sender.wait().has_error()
    assert not patient.sender.wait().has_error()
    orchestrator.model.finalize()
    made = orchestrator.pb_utils.MetricFamily.made
    counts = {metric.labels["outcome"]: metric.value for metric in made["hsnn_requests_total"]}
    assert (counts["ok"], counts["unmeetable"]) == (3, 1)
    assert len(made["hsnn_request_seconds"][0].observed) == 3, "a refusal is no wait for an answer"


def test_a_failing_model_is_named(
    orchestrator: Orchestrator, bls_hook: dict[str, Callable[[Any], None]]
) -> None:
    orchestrator.start()

    def unavailable(request: Any) -> None:
        if request.model_name == "hsnn_scorer_l2":
            raise RuntimeError("stub is gone")

    bls_hook["before"] = unavailable
    message, code = orchestrator.error()
    assert message == "RuntimeError: stub is gone"
    assert code == TritonError.INTERNAL
    orchestrator.model.finalize()
    failures = orchestrator.pb_utils.MetricFamily.made["hsnn_bls_failures_total"]
    assert {m.labels["model"]: m.value for m in failures if m.value} == {"hsnn_scorer_l2": 1}
    assert "stub is gone" in orchestrator.pb_utils.Logger.lines[-1], "the unexpected is in the server's log"


def test_tracebacks_are_sampled_like_the_lines_of_the_log(
    orchestrator: Orchestrator, bls_hook: dict[str, Callable[[Any], None]]
) -> None:
    orchestrator.start()

    def unavailable(request: Any) -> None:
        raise RuntimeError("stub is gone")

    bls_hook["before"] = unavailable
    before = len(orchestrator.pb_utils.Logger.lines)
    for _ in range(40):
        assert orchestrator.error()[0] == "RuntimeError: stub is gone"
    orchestrator.model.finalize()
    assert 10 <= len(orchestrator.pb_utils.Logger.lines) - before <= 20, "ten a second"


@pytest.mark.parametrize("context", ["", "{", "[]", "7", '{"traceparent": 7}', '{"tracestate": "a=1"}'])
def test_a_trace_context_that_cannot_be_read_is_no_trace(orchestrator: Orchestrator, context: str) -> None:
    request = Request({})
    request.context = context
    assert sys.modules["request_spans"].Parent.of(request) is None


def test_parameters_that_cannot_be_read_fail_their_request_alone(orchestrator: Orchestrator) -> None:
    orchestrator.start(workers=1)
    users = {name: value[:1] for name, value in orchestrator.snapshot.users.items()}
    for text in ("{", "[1]", "[" * 100_000):
        request = Request(users)
        request.parameters = lambda text=text: text  # type: ignore[method-assign]
        orchestrator.model.execute([request])
        assert request.sender.wait().has_error()
    assert not orchestrator.ask().sender.wait().has_error(), "the one worker goes on"


def test_an_error_that_is_no_utf_8_is_answered_with_escapes(orchestrator: Orchestrator) -> None:
    orchestrator.start(workers=1)
    message, code = orchestrator.error(schema_hash="\ud800")
    assert message.startswith("SchemaMismatch: the client encodes by schema \\ud800, this snapshot serves")
    assert code == TritonError.INVALID_ARG
    assert not orchestrator.ask().sender.wait().has_error(), "the one worker goes on"


def test_an_error_that_cannot_be_built_is_answered_all_the_same(
    orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Narrow(TritonError):
        def __init__(self, message: str, code: int = 1) -> None:
            if message != "internal error":
                raise MemoryError("no room")
            super().__init__(message, code)

    orchestrator.start(workers=1)
    monkeypatch.setattr(orchestrator.pb_utils, "TritonError", Narrow)
    assert orchestrator.error(k=0) == ("internal error", TritonError.INTERNAL)
    assert not orchestrator.ask().sender.wait().has_error()


def test_an_error_of_a_network_names_model_and_version(
    orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    orchestrator.start()
    failed = InferenceResponse(error=TritonError("not ready"))
    monkeypatch.setattr(orchestrator.pb_utils.InferenceRequest, "exec", lambda self: failed)
    message, code = orchestrator.error()
    assert message.startswith(
        "ServerError: hsnn_user_tower version 3 failed: not ready; every model of a snapshot"
    )
    assert code == TritonError.INTERNAL


def test_a_request_that_cannot_be_read_fails_alone(orchestrator: Orchestrator) -> None:
    """Over HTTP an id or a parameter may hold any bytes."""

    def not_text() -> str:
        return b"\xff".decode()

    def gone() -> str:
        raise RuntimeError("memory is gone")

    orchestrator.start()
    users = {name: value[:1] for name, value in orchestrator.snapshot.users.items()}
    requests = [Request(users) for _ in range(4)]
    requests[1].parameters = requests[3].request_id = not_text  # type: ignore[method-assign]
    requests[2].inputs = gone  # type: ignore[method-assign,assignment]
    orchestrator.model.execute(requests)
    errors = [request.sender.wait().error() for request in requests]
    assert errors[0] is None
    assert [error.code() for error in errors[1:]] == [
        TritonError.INVALID_ARG,
        TritonError.INTERNAL,
        TritonError.INVALID_ARG,
    ]
    assert (
        errors[1]
        .message()
        .startswith("RequestError: the request's id or the name or text of a parameter is not")
    )


def test_execute_does_not_raise(orchestrator: Orchestrator) -> None:
    """Triton would drop the answers to all requests that it handed over together."""

    def gone() -> Any:
        raise RuntimeError("user 31 is gone")

    orchestrator.start()
    users = {name: value[:1] for name, value in orchestrator.snapshot.users.items()}
    requests = [Request(users) for _ in range(4)]
    requests[1].timeout = requests[2].get_response_sender = gone  # type: ignore[method-assign]
    assert orchestrator.model.execute(requests) is None
    assert not requests[0].sender.wait().has_error() and not requests[3].sender.wait().has_error()
    assert requests[1].sender.wait().error().message() == "RuntimeError: user 31 is gone"
    assert "RuntimeError: user # is gone" in "".join(orchestrator.pb_utils.Logger.lines)


def test_a_load_that_fails_leaves_no_thread(
    orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise RuntimeError("can't start new thread")

    before = threading.active_count()
    monkeypatch.setattr(sys.modules["model"], "WorkerPool", no_room)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        orchestrator.start()
    assert threading.active_count() == before
    assert orchestrator.alarms == []


def test_finalize_waits_for_nobody_for_ever(
    orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton waits for the end of the process, and whoever promotes the next snapshot waits for Triton."""
    orchestrator.start()
    entered, go = Event(), Event()

    def hang(value: float) -> None:
        entered.set()
        go.wait(20)

    monkeypatch.setattr(sys.modules["serving_metrics"], "_PATIENCE", 0.05)
    monkeypatch.setattr(orchestrator.model._metrics._gauges["hsnn_items"], "set", hang)
    assert entered.wait(20)
    began = time.monotonic()
    orchestrator.model.finalize()
    assert time.monotonic() - began < 5
    assert orchestrator.alarms == [30]
    go.set()


def test_a_follower_that_hangs_is_left_behind(
    orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, entered, go, closed = sys.modules["item_follower"], Event(), Event(), Event()

    def hang() -> int:
        entered.set()
        assert go.wait(20)
        return 0

    follower = SimpleNamespace(catch_up=lambda: 0, unusable=[], behind=hang)
    monkeypatch.setattr(module, "LogReader", lambda *_: SimpleNamespace(close=closed.set))
    monkeypatch.setattr(module, "LogFollower", lambda *_: follower)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)
    items = module.ItemFollower(
        SimpleNamespace(schema=SimpleNamespace(hash=""), path=tmp_path), tmp_path / "log.db", VERSION
    )
    assert entered.wait(20)
    items.close()
    assert not closed.is_set(), "it may be reading"
    go.set()
    items.close()
    assert closed.is_set()


def test_finalize_finishes_what_was_accepted(
    orchestrator: Orchestrator, bls_hook: dict[str, Callable[[Any], None]]
) -> None:
    bls_hook["before"] = lambda request: time.sleep(0.02)
    orchestrator.start(workers=2)
    requests = [orchestrator.ask() for _ in range(6)]
    orchestrator.model.finalize()
    assert all(request.sender.done.is_set() and not request.sender.wait().has_error() for request in requests)


def test_metrics(orchestrator: Orchestrator) -> None:
    orchestrator.start()
    orchestrator.ask(slice(0, 2), k=3, widths="1,1").sender.wait()
    orchestrator.ask(k=0).sender.wait()
    orchestrator.model.finalize()
    made = orchestrator.pb_utils.MetricFamily.made
    counts = {metric.labels["outcome"]: metric.value for metric in made["hsnn_requests_total"]}
    assert counts == {"ok": 1, "invalid": 1, "deadline": 0, "overload": 0, "unmeetable": 0, "error": 0}
    (seconds,) = made["hsnn_request_seconds"][0].observed
    assert 0 < seconds < made["hsnn_under_way_seconds_total"][0].value, "the wrong request took time, too"
    assert [len(metric.observed) for metric in made["hsnn_layer_seconds"]] == [1, 1, 1]
    first = made["hsnn_candidates_total"][0]
    assert first.labels == {"version": "3", "layer": "1"}
    assert first.value == 2 * orchestrator.snapshot.index.nodes(1)
    assert made["hsnn_requests_in_flight"][0].value == 0
    assert made["hsnn_items"][0].value == 60
    assert made["hsnn_items_changed"][0].value == made["hsnn_item_log_behind"][0].value == 0
    assert (made["hsnn_users_total"][0].value, made["hsnn_empty_results_total"][0].value) == (2, 0)
    assert made["hsnn_workers"][0].value == 4
    created = datetime.fromisoformat(orchestrator.snapshot.bundle.manifest["created"])
    assert made["hsnn_snapshot_created_seconds"][0].value == created.timestamp()
    assert made["hsnn_eligible_share"][0].observed == [], "nothing was filtered"
    networks = {metric.labels["model"]: metric.value for metric in made["hsnn_bls_failures_total"]}
    assert networks == dict.fromkeys(["hsnn_user_tower", *(f"hsnn_scorer_l{n}" for n in (1, 2, 3))], 0)


def test_metrics_of_filtered_requests(orchestrator: Orchestrator) -> None:
    """A quarter of the items excluded by one user, all by the other."""
    every = item_ids()
    excluded = np.stack([np.where(np.arange(60) < 15, every, KEY_MISSING), every])
    orchestrator.start()
    assert orchestrator.ask(slice(0, 2), context={"exclude_items": excluded}).sender.wait().tensors[
        "valid"
    ].tolist() == [[10], [0]]
    orchestrator.model.finalize()
    made = orchestrator.pb_utils.MetricFamily.made
    assert made["hsnn_eligible_share"][0].observed == [0.75, 0.0]
    assert (made["hsnn_users_total"][0].value, made["hsnn_empty_results_total"][0].value) == (2, 1)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"mode": "remote"}, "parameter mode: got 'remote', expected one of ['bls', 'in_process']"),
        ({"workers": "0"}, "parameter workers: got '0', expected a whole number >= 1"),
        ({"queue": "-1"}, "parameter queue: got '-1', expected a whole number >= 0"),
        ({"widths": "4"}, "parameter widths: got [4], expected 2 numbers for an index of 3 layers"),
        ({"widths": "4,none"}, "parameter widths: got 'none', expected a whole number >= 1"),
        (
            {"schema_hash": "f" * 16},
            f"config.pbtxt says {'f' * 16} (first difference: none but the hash, which was edited); a new schema",
        ),
        (
            {"schema_hash": OTHER.hash, "schema": OTHER.to_json()},
            f"config.pbtxt says {OTHER.hash} (first difference: name: 'tiny' != 'other'); a new schema needs",
        ),
    ],
)
def test_a_wrong_config_does_not_load(
    orchestrator: Orchestrator, parameters: dict[str, str], text: str
) -> None:
    with pytest.raises(Exception, match="config.pbtxt") as failure:
        orchestrator.start(**parameters)
    assert text in str(failure.value)


def test_a_core_from_elsewhere_does_not_load(
    orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = sys.modules["model"]
    shutil.copytree(orchestrator.snapshot.version_directory, tmp_path / "3")
    monkeypatch.setattr(module, "HERE", tmp_path / "3")
    with pytest.raises(Exception, match="hsnn_core was imported from .*, expected this snapshot's own copy"):
        orchestrator.start()


def test_where_keys_are_trusted_an_unsigned_snapshot_is_not_served(
    orchestrator: Orchestrator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trusted := tmp_path / "trusted.pem").write_text("")
    monkeypatch.setattr("hsnn_core.signature.TRUSTED", trusted)
    with pytest.raises(
        FormatError, match="signature.json: missing, but .*trusted.pem asks for snapshots to be signed"
    ):
        orchestrator.start()
