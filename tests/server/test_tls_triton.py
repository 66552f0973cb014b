"""TLS and mutual TLS on the real Triton: who is let in, who is not, and what is said then."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from certificates import Certificates
from index_repository import write_index
from tiny_repository import write_model
from tiny_snapshot import SCHEMA, TinySnapshot, tiny_users, write_configs, write_snapshot

from clients.admin import RepositoryAdmin
from clients.aio import AsyncRetrievalClient
from clients.encode import UserEncoder
from clients.items import ItemClient
from clients.load import each_user, poisson_load, serialise
from clients.retrieval import Canary, RetrievalClient
from clients.tls import Tls
from hsnn_cli.main import main
from hsnn_core.errors import ServerError
from hsnn_core.schema import Schema
from hsnn_server.tls import ServerTls
from hsnn_server.triton import TritonServer

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> TinySnapshot:
    root = tmp_path_factory.mktemp("repository")
    snapshot = write_snapshot(root, 1)
    write_configs(root, snapshot.schema, {"hsnn_retrieve": {"mode": "in_process"}})
    write_index(root, 1, Schema.from_dict(SCHEMA))
    return snapshot


@pytest.fixture(scope="module")
def server(
    snapshot: TinySnapshot, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    state = tmp_path_factory.mktemp("state") / "server.json"
    models = ["hsnn_index", "hsnn_retrieve"]
    with TritonServer(snapshot.root, models=models, tls=certificates.mutual(), state_file=state) as running:
        yield running


def live(url: str, tls: Tls | None) -> bool:
    with RepositoryAdmin(url, timeout=5, tls=tls) as admin:
        return admin.ready("hsnn_retrieve")


def test_every_client_gets_in_with_the_right_certificate(
    server: TritonServer, certificates: Certificates, snapshot: TinySnapshot
) -> None:
    url, tls = server.urls.grpc, certificates.reader()
    with RetrievalClient(url, timeout=20, tls=tls, canary=Canary(share=1.0)) as client:
        expected = [[hit.item_id for hit in hits] for hits in client.retrieve(tiny_users())]
        model = client.connect()
    assert expected == [row.tolist() for row in snapshot.offline().item_ids]

    async def awaited() -> list[list[int]]:
        async with AsyncRetrievalClient(url, timeout=20, tls=tls) as client:
            return [[hit.item_id for hit in hits] for hits in await client.retrieve(tiny_users())]

    assert asyncio.run(awaited()) == expected
    with ItemClient(url, tls=tls) as items:
        assert items.stats().live == 0
    messages = serialise(model, each_user(UserEncoder(model.schema).encode(tiny_users())))
    fates = poisson_load(url, messages, rate=40, seconds=0.3, deadline=5, tls=tls)
    assert fates.counts()["answered"] == len(fates) > 0
    with RepositoryAdmin(url, server.admin_key, tls=tls) as admin:
        assert admin.versions("hsnn_retrieve") == [1]


def test_the_commands_take_it(
    server: TritonServer,
    certificates: Certificates,
    snapshot: TinySnapshot,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (certificate, key), url = certificates.client, server.urls.grpc
    tls = ["--tls-ca", str(certificates.ca), "--tls-cert", str(certificate), "--tls-key", str(key)]
    assert main(["query", "--url", url, "--json", *tls]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 10
    assert main(["items", "stats", "--url", url, "--json", *tls]) == 0
    assert main(["query", "--url", url]) == 1
    assert "it may speak TLS (--tls-ca), or ask for a client's certificate" in capsys.readouterr().err
    attached = TritonServer.attach(Path(server._state_file))  # type: ignore[arg-type]
    assert attached.admin.versions("hsnn_retrieve") == [1]
    assert main(["rollout", "status", "--server", str(server._state_file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["version"] == 1


def test_who_has_none_of_the_right_ones_is_refused_and_told(
    server: TritonServer, certificates: Certificates
) -> None:
    url, right = server.urls.grpc, certificates.reader()
    assert live(url, right)
    refused = "the server closed the connection at once; it may speak TLS"
    strangers = {
        "plain text": (None, refused),
        "no certificate": (Tls(certificates.ca), refused),
        "another authority's": (Tls(certificates.ca, *certificates.stranger), refused),
        "another server": (
            replace(right, ca=certificates.other_ca),
            "is not signed by an authority that this client trusts; give the right one",
        ),
        "the system's authorities": (replace(right, ca=None), "is not signed by an authority"),
        "another name": (
            replace(right, name="ads.example"),
            "the server's certificate is for another host name",
        ),
    }
    for tls, why in strangers.values():
        with pytest.raises(ServerError, match=why):
            live(url, tls)
        with pytest.raises(ServerError, match=why), RetrievalClient(url, retries=0, tls=tls) as client:
            client.connect()


def test_a_certificate_does_not_replace_the_key(server: TritonServer, certificates: Certificates) -> None:
    with (
        RepositoryAdmin(server.urls.grpc, tls=certificates.reader()) as admin,
        pytest.raises(ServerError, match="no key was given"),
    ):
        admin.index()


def test_a_server_of_another_name_and_one_without_tls(certificates: Certificates, tmp_path: Path) -> None:
    """One-sided TLS; the server's own calls need no authority, and none of its private files is readable by others."""
    write_model(tmp_path / "repository", "hsnn_retrieve")
    with TritonServer(
        tmp_path / "repository", models=["hsnn_retrieve"], tls=ServerTls(*certificates.elsewhere)
    ) as server:
        url = server.urls.grpc
        assert live(url, server.tls)
        assert live(url, Tls(certificates.ca, name="ads.example"))
        with pytest.raises(ServerError, match="is for another host name"):
            live(url, Tls(certificates.ca))
        directory = server.key_file.parent
        assert directory.stat().st_mode & 0o777 == 0o700
    with TritonServer(tmp_path / "repository") as plain, pytest.raises(ServerError, match="Without it leave"):
        live(plain.urls.grpc, Tls(certificates.ca))


def test_files_that_are_not_what_they_should_be(certificates: Certificates, tmp_path: Path) -> None:
    (certificate, key), (_, other_key) = certificates.client, certificates.stranger
    (nonsense := tmp_path / "nonsense.pem").write_text("no certificate")
    wrong = {
        "expected both or neither": Tls(certificates.ca, certificate),
        "absent.pem: No such file": Tls(tmp_path / "absent.pem"),
        "nonsense.pem: .*expected the certificates of authorities": Tls(nonsense),
        "key values mismatch.*the key that belongs to it": Tls(certificates.ca, certificate, other_key),
        "nonsense.pem and .*expected a certificate as PEM": Tls(certificates.ca, nonsense, key),
    }
    for text, tls in wrong.items():
        with pytest.raises(ServerError, match=text):
            tls.credentials()
    with pytest.raises(ServerError, match="key values mismatch"):
        TritonServer(tmp_path, tls=ServerTls(certificate, other_key)).start()


def test_half_of_tls_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", "--repository", str(tmp_path), "--client-ca", "ca.pem"]) == 1
    assert "TLS needs both --tls-cert and --tls-key" in capsys.readouterr().err
