"""Certificates of a test: an authority, a server's and a client's of it, and what strangers would come with."""

from __future__ import annotations

from pathlib import Path

import trustme

from clients.tls import Tls
from hsnn_server.tls import ServerTls


class Certificates:
    """PEM files below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        ours, theirs = trustme.CA(), trustme.CA()
        self.ca = self._write("ca.pem", ours.cert_pem)
        self.other_ca = self._write("other-ca.pem", theirs.cert_pem)
        self.server = self._pair("server", ours.issue_cert("127.0.0.1", "localhost"))
        self.elsewhere = self._pair("elsewhere", ours.issue_cert("ads.example"))
        self.client = self._pair("client", ours.issue_cert("reader@ads.example"))
        self.stranger = self._pair("stranger", theirs.issue_cert("reader@ads.example"))

    def mutual(self) -> ServerTls:
        return ServerTls(*self.server, client_ca=self.ca)

    def reader(self) -> Tls:
        """What a client of the mutual server needs."""
        return Tls(self.ca, *self.client)

    def _pair(self, name: str, issued: trustme.LeafCert) -> tuple[Path, Path]:
        chain = self._folder / f"{name}.pem"
        chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        return chain, self._write(f"{name}.key", issued.private_key_pem)

    def _write(self, name: str, blob: trustme.Blob) -> Path:
        blob.write_to_path(str(self._folder / name))
        return self._folder / name
