"""Raw keys, as tables and requests carry them: int64, integers as they are, strings as `stable_key`."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np

from .errors import FeatureError

KeyType = Literal["int", "string"]

KEY_MISSING = np.iinfo(np.int64).min


def stable_key(text: str) -> int:
    """The int64 key (>= 0) of a string, the same in every process: 8 bytes of blake2b, sign cleared."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF_FFFF_FFFF


def keys_of(what: str, key_type: KeyType, value: Any, kind: str) -> np.ndarray | list[int]:
    """The keys of one raw value: None is none; one key or a list of keys, for kind "sequence" only a list.

    Raises FeatureError that begins with ``what``, e.g. "feature 'country'", and says what was got and expected.
    """
    if value is None:
        return []
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind == "i" and key_type == "int":
        if (value == KEY_MISSING).any():
            raise FeatureError(_wrong_key(what, key_type, KEY_MISSING))
        return value.astype(np.int64, copy=False)
    if isinstance(value, list | tuple | np.ndarray) and np.ndim(value) == 1:
        return [one_key(what, key_type, element) for element in value]
    if kind == "sequence" or isinstance(value, list | tuple | np.ndarray):
        kinds = "a list" if kind == "sequence" else "one key or a list"
        raise FeatureError(f"{what}: got {shortened(value)}, expected {kinds} of {key_type} keys ({kind})")
    return [one_key(what, key_type, value)]


def one_key(what: str, key_type: KeyType, value: Any) -> int:
    """A single raw key; errors as `keys_of`."""
    if key_type == "string":
        if isinstance(value, str):
            return stable_key(value)
    elif isinstance(value, int | np.integer) and not isinstance(value, bool) and -(2**63) < value < 2**63:
        return int(value)
    raise FeatureError(_wrong_key(what, key_type, value))


def shortened(value: Any) -> str:
    """A value as error messages show it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _wrong_key(what: str, key_type: KeyType, value: Any) -> str:
    wanted = "a string" if key_type == "string" else "an integer of 64 bits above -2**63"
    return f"{what}: got {shortened(value)} ({type(value).__name__}) as a key, expected {wanted} (type: {key_type})"
