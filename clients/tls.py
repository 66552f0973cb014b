"""TLS between clients and Triton's gRPC: who the server must be, and who the client is."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from hsnn_core.errors import ServerError

from .channel import OPTIONS

_Client = TypeVar("_Client")


@dataclass(frozen=True)
class Tls:
    """``ca``: PEM of the authorities that may have signed the server's certificate (None: those of the system).
    ``certificate``, ``key``: PEM of the client's own, for a server that asks for one (mutual TLS); the certificate's
    file may hold its chain. ``name``: the host that the server's certificate must name (None: that of the url).

    The files are read and checked whenever a client opens, so renewed ones are taken up by new clients.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a gRPC channel. ServerError names the file that is missing, no PEM, or whose key is another
        certificate's: gRPC itself would only say that nobody answers."""
        if (self.certificate is None) != (self.key is None):
            raise ServerError(
                f"TLS: got certificate {self.certificate} and key {self.key}, expected both or neither"
            )
        check_files(self.ca, self.certificate, self.key)
        read = [None if path is None else path.read_bytes() for path in (self.ca, self.key, self.certificate)]
        return grpc.ssl_channel_credentials(*read)

    def options(self) -> list[tuple[str, Any]]:
        """Further options of the channel."""
        return [] if self.name is None else [("grpc.ssl_target_name_override", self.name)]


def open_client(kind: type[_Client], url: str, tls: Tls | None) -> _Client:
    """tritonclient's gRPC client of this ``kind`` (sync or asyncio); without ``tls`` in plain text."""
    if tls is None:
        return kind(url, channel_args=OPTIONS)  # type: ignore[call-arg]
    return kind(url, creds=tls.credentials(), channel_args=OPTIONS + tls.options())  # type: ignore[call-arg]


def check_files(ca: Path | None, certificate: Path | None, key: Path | None) -> None:
    """ServerError unless every file that is given holds what its name says, and the key is the certificate's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca is not None:
        try:
            context.load_verify_locations(ca)
        except OSError as error:
            raise ServerError(
                f"{ca}: {_why(error)}; expected the certificates of authorities as PEM"
            ) from error
    if certificate is not None and key is not None:
        for path in (certificate, key):
            try:
                path.read_bytes()
            except OSError as error:
                raise ServerError(
                    f"{path}: {error.strerror}; expected a certificate or its key as PEM"
                ) from error
        try:
            # A key that asks for a passphrase would stop a server at its terminal.
            context.load_cert_chain(certificate, key, password=b"")
        except OSError as error:
            raise ServerError(
                f"{certificate} and {key}: {_why(error)}; expected a certificate as PEM and the key that belongs to "
                "it, without a passphrase"
            ) from error


def handshake_failure(text: str) -> str | None:
    """What a failed connection's ``text`` of gRPC means where TLS is the reason, and what to do; else None."""
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return (
            "the server's certificate is not signed by an authority that this client trusts; give the right one "
            "(--tls-ca)"
        )
    if "Hostname Verification Check failed" in text or "Peer name" in text:
        return "the server's certificate is for another host name; use its name, or get one for this host"
    if "WRONG_VERSION_NUMBER" in text or "Tls handshake failed" in text or "Ssl handshake failed" in text:
        return "the TLS handshake failed; does the server speak TLS there? Without it leave --tls-ca out"
    if text.endswith("Socket closed") and "failed to connect" in text:
        return (
            "the server closed the connection at once; it may speak TLS (--tls-ca), or ask for a client's certificate "
            "that its authority signed (--tls-cert, --tls-key)"
        )
    return None


def _why(error: OSError) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else error.strerror or str(error)
