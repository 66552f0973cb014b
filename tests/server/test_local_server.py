"""The real Triton of the wheel: what is served, what is refused, and that nothing is left behind."""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as grpc
from server_checks import ended, regions
from tiny_repository import CONFIG, write_config, write_model
from tritonclient.utils import InferenceServerException

from clients.admin import RepositoryAdmin
from hsnn_core.errors import ServerError
from hsnn_server import TritonServer
from hsnn_server.processes import free_ports, wait_until

pytestmark = pytest.mark.triton

BATCHING = "dynamic_batching { max_queue_delay_microseconds: 20000 }"
WARMUP = """
model_warmup [ {
  name: "three"
  batch_size: 1
  inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 3 ] zero_data: true } }
} ]
"""
PEEK = """
import json, os, sys
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        facts = {"path": sys.path, "cwd": os.listdir("."), "threads": os.environ["OMP_NUM_THREADS"]}
        raise pb_utils.TritonModelException(json.dumps(facts))
"""

# As the orchestrator's: what hangs in it is killed.
HANGS = """
import signal, time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return []

    def finalize(self):
        signal.alarm(1)
        time.sleep(1000)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    write_model(root, "single")
    write_model(root, "batched", more=BATCHING + WARMUP)
    write_model(root, "broken").write_text("no graph")
    write_model(root, "disagreeing", datatype="TYPE_INT32")
    for name, code in (("peek", PEEK), ("hangs", HANGS)):
        write_config(root, name, CONFIG.format(name=name, backend="python", datatype="TYPE_FP32"))
        (root / name / "1").mkdir()
        (root / name / "1" / "model.py").write_text(code)
    return root


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, models=["single", "batched", "peek"], threads=2) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[grpc.InferenceServerClient]:
    with grpc.InferenceServerClient(server.urls.grpc) as connected:
        yield connected


def infer(
    client: grpc.InferenceServerClient, model: str, x: np.ndarray, *outputs: str, version: int = 0
) -> dict:
    tensor = grpc.InferInput("x", x.shape, "FP32")
    tensor.set_data_from_numpy(x)
    asked = [grpc.InferRequestedOutput(name) for name in outputs]
    answer = client.infer(model, [tensor], outputs=asked, model_version=str(version) if version else "")
    return {output.name: answer.as_numpy(output.name) for output in answer.get_response().outputs}


def values(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows * 100 + columns).normal(size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (8, 2000)])
def test_results_are_those_of_onnx_runtime(
    client: grpc.InferenceServerClient, repository: Path, rows: int, columns: int
) -> None:
    session = onnxruntime.InferenceSession(str(repository / "single" / "1" / "model.onnx"))
    x = values(rows, columns)
    y, total = session.run(["y", "total"], {"x": x})
    served = infer(client, "single", x, "y", "total")
    np.testing.assert_array_equal(served["y"], y)
    np.testing.assert_array_equal(served["total"], total)


def test_only_the_requested_outputs_are_computed_and_sent(client: grpc.InferenceServerClient) -> None:
    assert list(infer(client, "single", values(2, 3), "total")) == ["total"]


def test_requests_batched_together_get_their_own_rows(client: grpc.InferenceServerClient) -> None:
    sent = [values(1 + i % 3, 2 + i % 2) for i in range(48)]
    asked = [("y",) if i % 4 else ("total", "y") for i in range(48)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: infer(client, "batched", sent[i], *asked[i]), range(48)))
    for x, names, answer in zip(sent, asked, answers):
        assert set(answer) == set(names)
        np.testing.assert_array_equal(answer["y"], 2 * x)
    counts = client.get_inference_statistics("batched").model_stats[0]
    assert counts.execution_count < 48, "the dynamic batcher never brought two requests together"


def test_the_stub_sees_this_environment_and_nothing_else_first(client: grpc.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException) as caught:
        infer(client, "peek", values(1, 1), "y")
    text = caught.value.message()
    facts, _ = json.JSONDecoder().raw_decode(text, text.index("{"))
    assert str(Path(np.__file__).parent.parent) in facts["path"]
    assert facts["cwd"] == []
    assert facts["threads"] == "2"


def test_two_versions_serve_side_by_side_and_a_bad_one_changes_nothing(
    server: TritonServer, client: grpc.InferenceServerClient, repository: Path
) -> None:
    x = values(2, 2)
    write_model(repository, "single", scale=3.0, version=2)
    server.load("single")
    assert server.admin.versions("single") == [1, 2]
    for version, scale in ((1, 2), (2, 3), (0, 3)):
        np.testing.assert_array_equal(infer(client, "single", x, "y", version=version)["y"], scale * x)
    (repository / "single" / "3").mkdir()
    with pytest.raises(ServerError, match="model.onnx is missing, expected an ONNX graph"):
        server.load("single")
    assert server.ready("single", 2)
    assert not server.ready("single", 3)
    np.testing.assert_array_equal(infer(client, "single", x, "y")["y"], 3 * x)
    shutil.rmtree(repository / "single" / "3")


def test_unload_returns_when_the_model_is_gone(server: TritonServer) -> None:
    server.unload("peek")
    states = {
        entry.version: (entry.state, entry.reason) for entry in server.admin.index() if entry.model == "peek"
    }
    assert states == {1: ("UNAVAILABLE", "unloaded")}
    assert not server.ready("peek")


def test_a_process_that_is_killed_as_it_ends_ends_the_unload(server: TritonServer) -> None:
    server.load("hangs")
    began = time.monotonic()
    server.unload("hangs")
    assert 0.9 < time.monotonic() - began < 20
    assert server.admin.states("hangs") == {1: "UNAVAILABLE"}


def test_calls_and_instances_are_counted(server: TritonServer, client: grpc.InferenceServerClient) -> None:
    before = server.admin.calls_of(1)
    infer(client, "batched", values(2, 3), "y", version=1)
    expected = before | {"batched": before["batched"] + 1}  # rows are no calls
    assert wait_until(lambda: server.admin.calls_of(1) == expected, 5)
    assert server.admin.calls_of(99) == {}
    assert server.admin.instances("batched", 1) == 1


def test_a_load_that_fails_says_why_and_shows_the_log(server: TritonServer) -> None:
    with pytest.raises(ServerError, match="broken version 1: ONNX Runtime can't load") as caught:
        server.load("broken")
    assert f"The last lines of {server.log_file}:" in str(caught.value)
    with pytest.raises(ServerError, match=r"input x is TYPE_INT32, but tensor\(float\) in the graph"):
        server.load("disagreeing")
    with pytest.raises(ServerError, match="absent.*its repository has no such model"):
        server.load("absent")


def test_model_control_needs_the_key_over_grpc(
    server: TritonServer, client: grpc.InferenceServerClient
) -> None:
    with RepositoryAdmin(server.urls.grpc) as admin, pytest.raises(ServerError, match="no key was given"):
        admin.index()
    wrong = RepositoryAdmin(server.urls.grpc, "guess")
    with wrong as admin, pytest.raises(ServerError, match="the key that was given is not the server's"):
        admin.load("single")
    for call in (client.get_system_shared_memory_status, client.get_trace_settings, client.get_log_settings):
        with pytest.raises(InferenceServerException, match="This protocol is restricted"):
            call()
    assert [entry.model for entry in server.admin.index() if entry.state == "READY"].count("batched") == 1


def test_model_control_needs_the_key_over_http(server: TritonServer) -> None:
    def post(headers: dict[str, str]) -> int:
        url = f"http://{server.urls.http}/v2/repository/index"
        with urllib.request.urlopen(urllib.request.Request(url, b"{}", headers), timeout=5) as answer:
            return int(answer.status)

    with pytest.raises(urllib.error.HTTPError, match="403"):
        post({})
    assert post({"admin-key": server.admin_key}) == 200


def test_the_key_is_for_the_owner_alone(server: TritonServer) -> None:
    assert server.key_file.stat().st_mode & 0o777 == 0o600
    assert len(server.admin_key) == 32


def test_a_port_in_use_is_refused_by_name(server: TritonServer, repository: Path) -> None:
    port = int(server.urls.metrics.partition(":")[2])
    with pytest.raises(
        ServerError, match=f"--metrics-port {port}: Address already in use; stop what listens there"
    ):
        TritonServer(repository, metrics_port=port).start()


def test_nothing_is_left_after_an_exception(repository: Path) -> None:
    server = TritonServer(repository, models=["single"])

    def fail() -> None:
        with server:
            seen.update(pid=server.pid, prefix=server.region_prefix, files=server.key_file.parent)
            assert len(regions(server.region_prefix)) == 2, "one stub for each version"
            raise KeyError

    seen: dict[str, Any] = {}
    with pytest.raises(KeyError):
        fail()
    assert ended(seen["pid"])
    assert not regions(seen["prefix"])
    assert not seen["files"].exists()
    with pytest.raises(ServerError, match="does not run"):
        _ = server.urls


def test_a_model_that_fails_at_the_start_leaves_nothing_but_the_log(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "logs" / "triton.log"
    monkeypatch.setattr("secrets.token_hex", lambda size: "ab" * size)
    with (
        pytest.raises(ServerError, match=f"ONNX Runtime can't load[^$]*The last lines of {log}"),
        TritonServer(repository, models=["batched", "broken"], log_file=log),
    ):
        pass
    assert not regions("hsnn-abababab")
    assert "successfully loaded 'batched'" in log.read_text()


def test_an_argument_that_triton_refuses_is_shown(repository: Path) -> None:
    server = TritonServer(repository, arguments=["--no-such-option"])
    with pytest.raises(ServerError, match="the server ended while starting[^$]*no-such-option"):
        server.start()


def test_a_free_port_that_was_taken_meanwhile_is_replaced(
    server: TritonServer, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = int(server.urls.grpc.partition(":")[2])
    choices = iter([[taken, *free_ports(2)], free_ports(3)])
    monkeypatch.setattr("hsnn_server.triton.free_ports", lambda count: next(choices))
    with TritonServer(repository) as second:
        assert second.urls.grpc != server.urls.grpc


def test_a_server_that_does_not_answer_in_time_is_given_up(repository: Path) -> None:
    with pytest.raises(ServerError, match="the server did not answer within 0 s"):
        TritonServer(repository, start_timeout=0.0).start()
