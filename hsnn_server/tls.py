"""TLS at a server's gRPC address. Triton 2.51 has none at its HTTP and metrics addresses: they stay on loopback."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from clients.tls import Tls, check_files
from hsnn_core.errors import ServerError

from .state import write_private

_OWN, _OWN_KEY, _ROOTS, _PIN = "own-client.pem", "own-client.key", "client-authorities.pem", "server.pem"
_YEARS = timedelta(days=3650)  # of the server's own client certificate, which goes with the server


@dataclass(frozen=True)
class ServerTls:
    """``certificate``, ``key``: PEM of the server's own; ``client_ca``: authorities that must have signed the
    certificate of every client (mutual TLS), None: clients need none. Triton reads the files once, at its start."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def prepare(self, directory: Path) -> dict[str, object]:
        """Check the files, put what the server's own calls need into its private ``directory``, and return Triton's
        options. ServerError for a file that is missing or of another kind."""
        check_files(self.client_ca, self.certificate, self.key)
        options: dict[str, object] = {
            "grpc-use-ssl": "true",
            "grpc-server-cert": self.certificate.absolute(),
            "grpc-server-key": self.key.absolute(),
        }
        write_private(directory / _PIN, self.certificate.read_text())
        if self.client_ca is not None:
            # This process loads models over the same address, so the server trusts one more certificate: one that is
            # made now and whose key nobody else can read.
            own = _write_own_client(directory)
            write_private(directory / _ROOTS, self.client_ca.read_text().rstrip() + "\n" + own)
            options |= {"grpc-use-ssl-mutual": "true", "grpc-root-cert": directory / _ROOTS}
        return options


def own_tls(directory: Path) -> Tls | None:
    """How the owner of a server with this private directory talks to it; None: in plain text. The server must have the
    very certificate that it was started with, whatever host that names."""
    pin, own = directory / _PIN, directory / _OWN
    if not pin.is_file():
        return None
    certificate, key = (own, directory / _OWN_KEY) if own.is_file() else (None, None)
    return Tls(pin, certificate, key, _host(pin))


def _host(certificate: Path) -> str | None:
    """A host or address that the certificate names."""
    loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
    try:
        names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = None
    if not names:
        raise ServerError(
            f"{certificate}: the server's certificate names no host (subjectAltName), so no client could accept it; "
            "make one with, for example, -addext subjectAltName=DNS:ads.example,IP:10.0.0.7"
        )
    return str(next(iter(names)).value).replace("*", "any", 1)


def _write_own_client(directory: Path) -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hsnn serve")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + _YEARS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    text = certificate.public_bytes(serialization.Encoding.PEM).decode()
    write_private(directory / _OWN_KEY, private.decode())
    write_private(directory / _OWN, text)
    return text
