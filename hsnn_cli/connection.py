"""What commands that talk to a server have in common: TLS, and the admin key, which is only ever in a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsnn_core.errors import RequestError

if TYPE_CHECKING:
    from clients.tls import Tls


def add_tls(parser: Any) -> None:
    """--tls-ca, --tls-cert and --tls-key."""
    tls = parser.add_argument_group("TLS", "any of these: the server speaks TLS; without them, plain text")
    tls.add_argument("--tls-ca", type=Path, metavar="FILE", help="PEM of the authorities that signed the server's "
                     "certificate; 'system' for this machine's")  # fmt: skip
    tls.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="PEM of the client's certificate (mutual TLS)"
    )
    tls.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM of its key")


def tls_of(options: argparse.Namespace) -> Tls | None:
    """What the command line says of TLS; None: nothing."""
    from clients.tls import Tls

    ca, certificate, key = options.tls_ca, options.tls_cert, options.tls_key
    if ca is None and certificate is None and key is None:
        return None
    return Tls(None if ca == Path("system") else ca, certificate, key)


def admin_key(file: Path | None) -> str | None:
    """The key in a --key-file. RequestError when it cannot be read, is empty or more than a line."""
    if file is None:
        return None
    try:
        key = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--key-file: {error}; expected the file with the server's admin key") from error
    if not key or len(key.split()) != 1 or not key.isprintable() or not key.isascii():
        raise RequestError(f"--key-file {file}: got {len(key.split())} words, expected the admin key alone")
    return key
