"""The python-based backends without a server: joining requests, refusing what cannot be served."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fake_pb_utils
import fake_tensorrt
import numpy as np
import pytest
from fake_pb_utils import Request

SOURCES = Path(__file__).parents[2] / "hsnn_server" / "backends"


class TritonModelException(Exception):
    """Stands in for Triton's own."""


@pytest.fixture
def pb_utils(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = fake_pb_utils.make(lambda request: fake_pb_utils.InferenceResponse())
    module.TritonModelException = TritonModelException  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    return module


def backend(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The backend's model.py as Triton's stub imports it: with ``responses`` beside it."""
    monkeypatch.setitem(sys.modules, "responses", load("responses", SOURCES / "responses.py"))
    return load("model", SOURCES / name / "model.py")


def load(name: str, file: Path) -> ModuleType:
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tensorrt(pb_utils: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return backend("tensorrt", monkeypatch)


@pytest.fixture
def onnx(pb_utils: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return backend("onnxruntime", monkeypatch)


class Doubler:
    """y = 2 x, rows: how many rows each call had; refuses a width of 13."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[str]]] = []

    def __call__(self, inputs: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
        x = inputs["x"]
        if x.shape[1] == 13:
            raise ValueError("unlucky")
        self.calls.append((len(x), outputs))
        return [{"y": 2 * x, "z": -x}[name] for name in outputs]


def request(rows: int, columns: int, *outputs: str) -> Request:
    x = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns) + rows
    return Request({"x": x}, outputs=outputs)


def test_alike_requests_are_one_call_and_each_gets_its_rows(onnx: ModuleType) -> None:
    network = Doubler()
    requests = [request(2, 3, "y"), request(1, 4, "y"), request(3, 3, "y", "z"), request(1, 3, "z")]
    responses = onnx.respond(requests, network, batched=True)
    assert [(rows, set(names)) for rows, names in network.calls] == [(6, {"y", "z"}), (1, {"y"})]
    for sent, response in zip(requests, responses):
        x = sent.inputs()[0].as_numpy()
        assert set(response.tensors) == sent.requested_output_names()
        for name, value in response.tensors.items():
            np.testing.assert_array_equal(value, {"y": 2 * x, "z": -x}[name])


def test_without_a_batch_axis_every_request_is_its_own_call(onnx: ModuleType) -> None:
    network = Doubler()
    onnx.respond([request(2, 3, "y"), request(2, 3, "y")], network, batched=False)
    assert network.calls == [(2, ["y"]), (2, ["y"])]


def test_one_request_is_not_copied(onnx: ModuleType) -> None:
    seen = []
    alone = request(2, 3, "y")
    onnx.respond([alone], lambda inputs, outputs: seen.append(inputs["x"]) or [inputs["x"]], batched=True)
    assert seen[0] is alone.inputs()[0].as_numpy()


def test_a_failed_call_is_an_error_to_its_own_requests_only(onnx: ModuleType) -> None:
    requests = [request(1, 3, "y"), request(1, 13, "y"), request(2, 13, "y"), request(2, 3, "y")]
    responses = onnx.respond(requests, Doubler(), batched=True)
    assert [response.has_error() for response in responses] == [False, True, True, False]
    assert responses[1].error().message() == "ValueError on x [1, 13]: unlucky"


@pytest.mark.parametrize(
    ("users", "candidates", "sizes"),
    [(1, 7, [3, 3, 1]), (2, 3, [1, 1, 1]), (1, 2, [2]), (9, 2, [1, 1]), (2, 0, [0]), (0, 2, [2])],
)
def test_a_message_is_computed_in_pieces(
    onnx: ModuleType, users: int, candidates: int, sizes: list[int]
) -> None:
    rng = np.random.default_rng(0)
    user, item = rng.random((users, 4)), rng.random((users, candidates, 4))
    seen = []

    def network(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        seen.append(inputs["item"].shape[1])
        assert all(value.flags.c_contiguous for value in inputs.values())
        return [inputs["user"][:, None] * inputs["item"], inputs["item"] + 1]

    found = onnx.in_pieces(network, {"user": user, "item": item}, {"item"}, 3)
    assert seen == sizes
    for ours, expected in zip(found, (user[:, None] * item, item + 1)):
        np.testing.assert_array_equal(ours, expected)


def test_a_thread_count_that_is_none_is_refused(onnx: ModuleType) -> None:
    config = {"parameters": {"intra_op_thread_count": {"string_value": "many"}}}
    with pytest.raises(TritonModelException, match="intra_op_thread_count is 'many', expected a number"):
        onnx._session_options(config)


def test_the_parameter_overrules_the_servers_limit(onnx: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert onnx._session_options({}).intra_op_num_threads == 3
    config = {"parameters": {"intra_op_thread_count": {"string_value": "5"}}}
    assert onnx._session_options(config).intra_op_num_threads == 5


@pytest.mark.parametrize("shape", [["B", 4], [None, "C"], [8, 4]])
def test_open_sizes_fit_any(onnx: ModuleType, shape: list[object]) -> None:
    assert onnx._fits([-1, 4], shape)


@pytest.mark.parametrize("shape", [["B", 5], ["B"], ["B", 4, 1]])
def test_other_sizes_do_not_fit(onnx: ModuleType, shape: list[object]) -> None:
    assert not onnx._fits([-1, 4], shape)


def tensorrt_arguments(engine: str = "tensorrt") -> dict[str, str]:
    config = {"max_batch_size": 8, "parameters": {"engine": {"string_value": engine}}}
    return {
        "model_config": json.dumps(config),
        "model_name": "hsnn_scorer_l1",
        "model_version": "4",
        "model_repository": "/nowhere",
        "model_instance_device_id": "0",
    }


@pytest.mark.parametrize(("engine", "package"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_a_missing_tensorrt_says_what_to_install(
    tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch, engine: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = f"hsnn_scorer_l1 version 4: its plans need the Python package {package} .*pip install {engine}"
    with pytest.raises(TritonModelException, match=message):
        tensorrt.TritonPythonModel().initialize(tensorrt_arguments(engine))


def test_a_missing_gpu_is_said(tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False), __version__="2.13.0+cpu")
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(TritonModelException, match=r"needs an NVIDIA GPU, PyTorch 2\.13\.0\+cpu sees none"):
        tensorrt.TritonPythonModel().initialize(tensorrt_arguments())


def test_the_profile_is_the_first_that_every_input_fits(tensorrt: ModuleType) -> None:
    profiles = [
        {"user": ((1, 8), (64, 8)), "item": ((1, 32, 4), (64, 32, 4))},
        {"user": ((1, 8), (64, 8)), "item": ((1, 256, 4), (64, 256, 4))},
    ]
    assert tensorrt.fitting_profile(profiles, {"user": (2, 8), "item": (2, 256, 4)}) == 1
    with pytest.raises(
        ValueError, match=r"covers user \[2, 8\], item \[2, 64, 4\]; .*\[1, 32, 4\] to \[64, 32, 4\]"
    ):
        tensorrt.fitting_profile(profiles, {"user": (2, 8), "item": (2, 64, 4)})


@pytest.fixture
def plan(tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Arguments of a model whose plan the stand-in for TensorRT reads."""
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.library())
    monkeypatch.setitem(sys.modules, "torch", fake_tensorrt.torch_with_a_gpu())
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "model.plan").write_bytes(b"plan")
    return {**tensorrt_arguments(), "model_repository": str(tmp_path)}


def test_a_plan_runs_in_the_profile_that_fits(tensorrt: ModuleType, plan: dict[str, str]) -> None:
    model = tensorrt.TritonPythonModel()
    model.initialize(plan)
    requests = [request(2, 4, "y"), request(1, 16, "z", "y"), request(3, 4, "z"), request(1, 5, "y")]
    *served, refused = model.execute(requests)
    for sent, response in zip(requests, served):
        x = sent.inputs()[0].as_numpy()
        assert set(response.tensors) == sent.requested_output_names()
        for name, value in response.tensors.items():
            np.testing.assert_array_equal(value, {"y": 2 * x, "z": -x}[name])
    assert "no optimisation profile covers x [1, 5]" in refused.error().message()
    assert [context.profile for context in model._engine.contexts] == [0, 1], "one context each, reused"


def test_a_plan_that_cannot_be_read_says_why(tensorrt: ModuleType, plan: dict[str, str]) -> None:
    file = Path(plan["model_repository"], "4", "model.plan")
    file.write_bytes(b"other")
    with pytest.raises(TritonModelException, match="can't read .*model.plan: a plan is bound to the version"):
        tensorrt.TritonPythonModel().initialize(plan)
    file.unlink()
    with pytest.raises(TritonModelException, match="model.plan is missing, expected a TensorRT plan"):
        tensorrt.TritonPythonModel().initialize(plan)
