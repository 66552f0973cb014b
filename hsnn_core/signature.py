"""A signature over a snapshot (Ed25519): what every file of its models was when it was published, and by whom.

signature.json lies in the orchestrator's version directory and lists sha256 of every other file of the snapshot, code
and networks included. The package `cryptography` is imported only where something is signed or checked.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import FormatError
from .files import file_sha256, read_text, write_bytes

SIGNATURE = "signature.json"
FORMAT, FORMAT_VERSION = "hsnn-signature", 1
# Of the server's machine, not of the repository: whoever can write a snapshot must not be able to say whom to trust.
TRUSTED = Path("/etc/hsnn/trusted.pem")
_HOW = (
    "make a pair with: openssl genpkey -algorithm ed25519 -out sign.key; "
    "openssl pkey -in sign.key -pubout -out sign.pub"
)


def sign(directories: Mapping[str, Path], orchestrator: str, version: int, key: Path) -> None:
    """Write the signature of the snapshot whose models' version directories these are, by name. ``key``: PEM of an
    Ed25519 private key. FormatError when it is none."""
    private, path = _key(key, "private"), directories[orchestrator] / SIGNATURE
    statement = {
        "format": FORMAT, "format_version": FORMAT_VERSION, "version": version, "files": _files(directories, path)
    }  # fmt: skip
    signature = base64.b64encode(private.sign(_bytes(statement))).decode()
    content = json.dumps(statement | {"signature": signature}, indent=1) + "\n"
    write_bytes(path, content.encode())


def check(directories: Mapping[str, Path], orchestrator: str, version: int, trusted: Path) -> None:
    """FormatError unless a key in ``trusted`` (PEM of one or more Ed25519 public keys) signed exactly these files as
    this version. Compiled Python below them is removed: it is no part of a snapshot, and Python would prefer it."""
    path = directories[orchestrator] / SIGNATURE
    what = f"snapshot {version}"
    if not path.is_file():
        raise FormatError(
            f"{path}: missing, but {trusted} asks for snapshots to be signed; publish with --sign-key, or take a "
            "snapshot that is signed"
        )
    try:
        statement = json.loads(read_text(path))
        signature = base64.b64decode(statement.pop("signature"), validate=True)
        files, number = dict(statement["files"]), statement["version"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: not a signature ({error!r}); publish the snapshot again") from error
    if not any(_signed_by(public, signature, _bytes(statement)) for public in _trusted(trusted)):
        raise FormatError(
            f"{path}: not signed by a key of {trusted}; {what} was changed, or published by somebody who is not trusted"
        )
    if (statement.get("format"), statement.get("format_version"), number) != (
        FORMAT,
        FORMAT_VERSION,
        version,
    ):
        raise FormatError(f"{path}: signs snapshot {number}, expected {version}: signatures were exchanged")
    for directory in directories.values():
        for cache in directory.rglob("__pycache__"):
            try:
                shutil.rmtree(cache)
            except OSError as error:
                raise FormatError(
                    f"{cache}: compiled Python, which is not signed, cannot be removed ({error})"
                ) from error
    there = _files(directories, path)
    differing = sorted(name for name in files.keys() | there.keys() if files.get(name) != there.get(name))
    if differing:
        name = differing[0]
        raise FormatError(
            f"{what}: {name} has sha256 {there.get(name, 'none (missing)')}, the signature says "
            f"{files.get(name, 'that it is not there')} ({len(differing)} files differ); publish the snapshot again"
        )


def _files(directories: Mapping[str, Path], signature: Path) -> dict[str, str]:
    """sha256 by model/path of every file but the ``signature``. FormatError for links: what they lead to is no part of
    the snapshot."""
    found = {}
    for model, directory in sorted(directories.items()):
        for path in (directory, *sorted(directory.rglob("*"))):
            if path.is_symlink():
                raise FormatError(f"{path}: a link, expected files alone; copy the whole directory again")
            if path.is_file() and path != signature:
                found[f"{model}/{path.relative_to(directory).as_posix()}"] = file_sha256(path)
    return found


def _bytes(statement: Mapping[str, Any]) -> bytes:
    return json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()


def _trusted(path: Path) -> list[Any]:
    text = read_text(path)
    ends = "-----END PUBLIC KEY-----"
    blocks = [block + ends for block in text.split(ends)[:-1]]
    if not blocks:
        raise FormatError(f"{path}: no public key there, expected PEM of Ed25519 public keys; {_HOW}")
    return [_loaded(path, block.strip().encode(), "public") for block in blocks]


def _key(path: Path, kind: str) -> Any:
    return _loaded(path, read_text(path).encode(), kind)


def _loaded(path: Path, pem: bytes, kind: str) -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ImportError as error:
        raise FormatError(
            f"{path}: signatures are asked for, but the Python that should check them lacks the package cryptography "
            f"({error}); install it there, or take {path} away"
        ) from error
    try:
        key = load_pem_public_key(pem) if kind == "public" else load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path}: no {kind} key as PEM ({error}); {_HOW}") from error
    wanted = ed25519.Ed25519PublicKey if kind == "public" else ed25519.Ed25519PrivateKey
    if not isinstance(key, wanted):
        raise FormatError(f"{path}: a {kind} key of another kind, expected Ed25519; {_HOW}")
    return key


def _signed_by(public: Any, signature: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(signature, message)
    except InvalidSignature:
        return False
    return True
