"""What reads or changes the server needs the admin key, call by call, over gRPC and HTTP; and where it listens."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from index_repository import write_index
from tiny_repository import write_model
from tritonclient.grpc import service_pb2, service_pb2_grpc

from clients.admin import KEY_HEADER, RepositoryAdmin
from hsnn_core.errors import ServerError
from hsnn_server.triton import TritonServer

pytestmark = pytest.mark.triton

OPEN = {
    "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics",
    "ModelInfer", "ModelStreamInfer",
}  # fmt: skip
CLOSED = {
    "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload", "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister", "CudaSharedMemoryStatus", "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister", "TraceSetting", "LogSettings",
}  # fmt: skip
CLOSED_ROUTES = [
    ("POST", "/v2/repository/index"), ("POST", "/v2/repository/models/single/load"),
    ("POST", "/v2/repository/models/single/unload"), ("GET", "/v2/systemsharedmemory/status"),
    ("GET", "/v2/systemsharedmemory/region/x/status"), ("POST", "/v2/systemsharedmemory/region/x/register"),
    ("POST", "/v2/systemsharedmemory/unregister"), ("POST", "/v2/systemsharedmemory/region/x/unregister"),
    ("GET", "/v2/cudasharedmemory/status"), ("GET", "/v2/cudasharedmemory/region/x/status"),
    ("POST", "/v2/cudasharedmemory/region/x/register"), ("POST", "/v2/cudasharedmemory/unregister"),
    ("POST", "/v2/cudasharedmemory/region/x/unregister"), ("GET", "/v2/trace/setting"), ("POST", "/v2/trace/setting"),
    ("GET", "/v2/models/single/trace/setting"), ("POST", "/v2/models/single/trace/setting"), ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
]  # fmt: skip
# Other spellings of such routes: Triton must not take them for the route without asking for the key.
ALIASES = [
    ("POST", "//v2/repository/index"), ("POST", "/v2//repository/index"), ("POST", "/v2/repository/index/"),
    ("POST", "/v2/./repository/index"), ("POST", "/v2/models/../repository/index"), ("POST", "/v2/%72epository/index"),
    ("POST", "/V2/Repository/Index"), ("POST", "/v2/repository/index?x=1"), ("POST", "/v2/repository/index%00"),
    ("POST", "/v2/repository/x/index"), ("POST", "/v2/repository/models/../index"), ("GET", "/v2/repository/index"),
    ("PUT", "/v2/repository/index"), ("GET", "/v2/logging/"), ("GET", "/v2/models/single/versions/1/trace/setting"),
    ("GET", "/v2/systemsharedmemory/region//status"), ("POST", "/v2/repository/models/x/../single/unload"),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    root = tmp_path_factory.mktemp("repository")
    write_model(root, "single")
    write_index(root, 1)
    with TritonServer(root, models=["single", "hsnn_index"]) as running:
        yield running


def over_grpc(server: TritonServer, name: str, metadata: list[tuple[str, str]]) -> str:
    """The status that a call with an empty message ends with, and "refused" where it is for want of the key."""
    with grpc.insecure_channel(server.urls.grpc) as channel:
        call = channel.unary_unary(f"/inference.GRPCInferenceService/{name}")
        try:
            call(b"", timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            refused = "This protocol is restricted" in (error.details() or "")
            return "refused" if refused else error.code().name
    return "OK"


def over_http(server: TritonServer, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    host, _, port = server.urls.http.partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request(method, path, b"{}" if method != "GET" else None, headers)
        reply = connection.getresponse()
        return reply.status, reply.read().decode(errors="replace")
    finally:
        connection.close()


def test_every_call_is_known_to_be_open_or_closed() -> None:
    """A call that a newer client library knows must be sorted into one of the two by a person."""
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert {method.name for method in service.methods} == OPEN | CLOSED
    assert hasattr(service_pb2_grpc, "GRPCInferenceServiceStub")


@pytest.mark.parametrize("name", sorted(CLOSED))
def test_grpc_calls_that_need_the_key(server: TritonServer, name: str) -> None:
    key = server.admin_key
    wrong = {
        "none": [],
        "another": [(KEY_HEADER, "0" * len(key))],
        "in capitals": [(KEY_HEADER, key.upper())],
        "a part of it": [(KEY_HEADER, key[:-1])],
        "more than it": [(KEY_HEADER, key + "0")],
        "an empty one": [(KEY_HEADER, "")],
        "under the name of HTTP": [("admin-key", key)],
        "behind a wrong one": [(KEY_HEADER, "wrong, " + key)],
    }
    for what, metadata in wrong.items():
        assert over_grpc(server, name, metadata) == "refused", f"{name} with {what}"
    assert over_grpc(server, name, [(KEY_HEADER, key)]) != "refused"


def test_grpc_calls_that_are_open_or_unknown(server: TritonServer) -> None:
    for name in OPEN - {"ModelStreamInfer"}:
        assert over_grpc(server, name, []) != "refused", name
    with grpc.insecure_channel(server.urls.grpc) as channel:
        for path in ("inference.GRPCInferenceService/repositoryindex", "Inference.GRPCInferenceService/RepositoryIndex",
                     "GRPCInferenceService/RepositoryIndex", "inference.GRPCInferenceService/Repository"):  # fmt: skip
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"/{path}")(b"", timeout=10)
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED, path


def test_http_routes_that_need_the_key(server: TritonServer) -> None:
    key = server.admin_key
    wrong = [{}, {"admin-key": "0" * 32}, {"admin-key": key.upper()}, {"admin-key": key[:-1]}, {"admin-key": ""},
             {KEY_HEADER: key}, {"admin-key": f"{key}, x"}, {"Authorization": f"Bearer {key}"}]  # fmt: skip
    for method, path in CLOSED_ROUTES:
        for headers in wrong:
            status, text = over_http(server, method, path, headers)
            assert status == 403 and "This API is restricted" in text, (
                f"{method} {path} {list(headers)}: {status} {text}"
            )
        if not path.endswith("unload"):
            status, text = over_http(server, method, path, {"admin-key": key})
            assert status != 403, f"{method} {path}: {status} {text}"
    assert server.ready("single")


def test_other_spellings_of_such_routes_open_nothing(server: TritonServer) -> None:
    for method, path in ALIASES:
        status, text = over_http(server, method, path, {})
        assert status in (400, 403, 404, 405), f"{method} {path}: {status} {text[:200]}"
    assert server.ready("single")


def test_nothing_listens_beyond_loopback(server: TritonServer) -> None:
    """Every socket of the server and its stubs: three addresses, all of them 127.0.0.1."""
    inodes = set()
    for pid in server.pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(entry)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and rest[5] in inodes:
                address, _, port = local.partition(":")
                listening.add((table, address, int(port, 16)))
    for table in ("udp", "udp6"):
        assert not [
            n for n in Path(f"/proc/net/{table}").read_text().splitlines()[1:] if n.split()[9] in inodes
        ]
    ports = {int(url.rpartition(":")[2]) for url in vars(server.urls).values()}
    assert {port for _, _, port in listening} == ports
    # gRPC's is a socket of both families, at ::ffff:127.0.0.1.
    assert {address for _, address, _ in listening} <= {"0100007F", "0000000000000000FFFF00000100007F"}


def test_the_key_is_in_one_file_alone(server: TritonServer, tmp_path: Path) -> None:
    """Triton's own command line is the exception (docs/security.md): it takes the key in no other way."""
    key = server.admin_key
    with pytest.raises(ServerError) as caught, RepositoryAdmin(server.urls.grpc, key) as admin:
        admin.load("absent")
    assert key not in str(caught.value)
    assert key not in server.log_file.read_text()
    state = server._running()
    state.write(tmp_path / "server.json")
    assert key not in (tmp_path / "server.json").read_text()
    assert (tmp_path / "server.json").stat().st_mode & 0o777 == 0o600
    holders = [
        path
        for path in server.key_file.parent.rglob("*")
        if path.is_file() and key in path.read_text(errors="replace")
    ]
    assert holders == [server.key_file]
    for pid in server.pids[1:]:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        assert key not in arguments and key not in environment, json.dumps(arguments)
