"""Malformed bytes and malformed JSON, drawn at random from what is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

_INTEGERS = (
    0,
    1,
    -1,
    2,
    255,
    256,
    -128,
    2**15,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**53,
    2**62,
    2**63 - 1,
    -(2**63),
)
_FLOATS = (0.0, -0.0, 1e-320, -1.5, 1e30, 3.5e38, 1e308)
_TEXTS = (
    "",
    " ",
    "\x00",
    "é",
    "💥",
    "../../etc/passwd",
    "NaN",
    "null",
    "%s%n",
    "a" * 300,
    "-1",
    "1e999",
    "\ud800",
)
_MOST_CHANGES = 4
_MOST_BYTES = 64  # put in or taken out at a time


def any_integer(rng: np.random.Generator) -> int:
    """One that programs get wrong, or any of 64 bits."""
    if rng.random() < 0.7:
        return _INTEGERS[rng.integers(len(_INTEGERS))]
    return int(rng.integers(-(2**63), 2**63 - 1))


def any_text(rng: np.random.Generator) -> str:
    """A text that programs get wrong, or short nonsense."""
    if rng.random() < 0.6:
        return _TEXTS[rng.integers(len(_TEXTS))]
    return "".join(chr(code) for code in rng.integers(32, 0x2FF, rng.integers(1, 12)))


def any_value(rng: np.random.Generator, depth: int = 2) -> Any:
    """Any value that JSON knows."""
    makers: list[Callable[[], Any]] = [
        lambda: None, lambda: bool(rng.integers(2)), lambda: any_integer(rng),
        lambda: _FLOATS[rng.integers(len(_FLOATS))], lambda: any_text(rng),
    ]  # fmt: skip
    if depth:
        makers += [
            lambda: [any_value(rng, depth - 1) for _ in range(rng.integers(4))],
            lambda: {any_text(rng): any_value(rng, depth - 1) for _ in range(rng.integers(3))},
        ]
    return makers[rng.integers(len(makers))]()


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """The bytes with one to four changes: bits, numbers, pieces taken out, put in, repeated, zeroed or cut off."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, _MOST_CHANGES + 1)):
        if not changed:
            return bytes(rng.bytes(rng.integers(1, _MOST_BYTES)))
        at = int(rng.integers(len(changed)))
        some = int(rng.integers(1, _MOST_BYTES))
        match rng.integers(9):
            case 0:
                changed[at] ^= 1 << int(rng.integers(8))
            case 1:
                changed[at] = int(rng.integers(256))
            case 2:
                width = int(rng.choice([2, 4, 8]))
                number = any_integer(rng) & (1 << 8 * width) - 1
                changed[at : at + width] = number.to_bytes(width, "little" if rng.integers(2) else "big")
            case 3:
                del changed[at : at + some]
            case 4:
                changed[at:at] = rng.bytes(some)
            case 5:
                changed[at:at] = changed[at : at + some]
            case 6:
                changed[at : at + some] = bytes(len(changed[at : at + some]))
            case 7:
                other = int(rng.integers(len(changed)))
                changed[at : at + some] = changed[other : other + some]
            case _:
                del changed[at:]
    return bytes(changed)


def mutated_json(rng: np.random.Generator, text: bytes) -> bytes:
    """A JSON text with one value changed for another, left out, or given to a new name; or its bytes changed."""
    if rng.random() < 0.3:
        return mutated(rng, text)
    root = [json.loads(text)]
    places = list(_places(root))
    parent, key = places[rng.integers(len(places))]
    match rng.integers(4):
        case 0 if parent is not root:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[any_text(rng)] = any_value(rng)
        case 2 if isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] = parent[key] + int(rng.choice([-1, 1])) if rng.integers(2) else any_integer(rng)
        case _:
            parent[key] = any_value(rng)
    return json.dumps(root[0]).encode()


def _places(node: Any) -> Any:
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])
