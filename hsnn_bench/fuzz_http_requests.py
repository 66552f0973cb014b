"""Malformed HTTP requests to a served model, from their first byte on; see `fuzz_requests`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .fuzz_bytes import any_text, mutated, mutated_json
from .fuzz_requests import Malformed

_PATHS = (
    "/v2/models/{m}/infer", "/v2/models/{m}/versions/99/infer", "/v2/models/{m}/versions/-1/infer", "/v2/models//infer",
    "/v2/models/..%2f..%2fetc/infer", "/v2/models/../../x/infer", "/v2/models/{m}%00/infer", "/v2/models/nosuch/infer",
    "/v2/models/{m}/generate", "//v2//models/{m}/infer", "/v2/models/{m}/infer/..", "/" + "a" * 3000,
)  # fmt: skip
_ROOM = 1 << 24  # elements


class HttpRequests:
    """Bad JSON, bad heads, and lengths that lie. ``good``: one user's wire tensors each."""

    def __init__(
        self,
        model: str,
        good: Sequence[Mapping[str, np.ndarray]],
        datatypes: Mapping[str, str],
        rng: np.random.Generator,
    ) -> None:
        self._model, self._rng = model, rng
        self._json = [json.dumps(_json_request(tensors, datatypes)).encode() for tensors in good]
        self._binary = [_binary_request(tensors, datatypes) for tensors in good]

    def draw(self) -> Malformed:
        """The next one."""
        rng = self._rng
        good = self._json[rng.integers(len(self._json))]
        match rng.integers(9):
            case 0 | 1 | 2:
                return self._sent("a value changed in the JSON", mutated_json(rng, good))
            case 3:
                body = rng.bytes(rng.integers(1, 500))
                return self._sent("a body at random", body, refused=not _is_object(body))
            case 4 | 5:
                return self._header_length()
            case 6:
                path = str(rng.choice(_PATHS[1:])).format(m=self._model)
                return self._sent(
                    "another path", good, path=path, refused="versions" in path or "nosuch" in path
                )
            case 7:
                return self._compressed(good)
            case _:
                return self._head(good)

    def _header_length(self) -> Malformed:
        header, tail = self._binary[self._rng.integers(len(self._binary))]
        total = len(header) + len(tail)
        lengths = [
            -1,
            0,
            1,
            len(header) - 1,
            len(header) + 1,
            total + 1,
            2**31,
            2**63 - 1,
            2**64,
            "x",
            "",
            "1e3",
        ]
        length = lengths[self._rng.integers(len(lengths))]
        return self._sent(
            "a wrong Inference-Header-Content-Length", header + tail, [f"Inference-Header-Content-Length: {length}"]
        )  # fmt: skip

    def _compressed(self, good: bytes) -> Malformed:
        coding = str(self._rng.choice(["gzip", "deflate", "br", "gzip, gzip"]))
        refused = coding in ("gzip", "deflate")
        return self._sent(
            "a body that is not compressed as it says", good, [f"Content-Encoding: {coding}"], refused=refused
        )

    def _head(self, good: bytes) -> Malformed:
        """A first line or header at random: what comes after need not be read as a body."""
        head = self._request(good, [])[: -len(good)]
        line = any_text(self._rng).encode(errors="replace").replace(b"\n", b" ")
        extra = [
            line,
            b"Content-Length: -1",
            b"Transfer-Encoding: chunked",
            b"Content-Length: 99999999999999999999",
        ]
        headers = head[:-2] + extra[self._rng.integers(len(extra))] + b"\r\n\r\n"
        body = headers if self._rng.integers(2) else mutated(self._rng, head)
        return Malformed("a head at random", body + good, "", False, short=True)

    def _sent(
        self, what: str, body: bytes, headers: Sequence[str] = (), path: str = "", refused: bool = False
    ) -> Malformed:
        return Malformed(what, self._request(body, headers, path), "", refused, kills=kills(body))

    def _request(self, body: bytes, headers: Sequence[str], path: str = "") -> bytes:
        lines = [
            f"POST {path or _PATHS[0].format(m=self._model)} HTTP/1.1",
            "Host: x",
            f"Content-Length: {len(body)}",
        ]
        return ("\r\n".join([*lines, *headers]) + "\r\n\r\n").encode() + body


def kills(body: bytes) -> bool:
    """Whether Triton 2.51 would end at this JSON: over HTTP it makes room for as many elements as a `shape` says before
    it compares that with the data, and nothing catches what `std::vector` throws."""
    try:
        inputs = json.loads(body)["inputs"]
        shapes = [tensor["shape"] for tensor in inputs if isinstance(tensor, dict) and "shape" in tensor]
        sizes = [math.prod(abs(dim) for dim in shape) for shape in shapes]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return any(size > _ROOM for size in sizes)


def _is_object(body: bytes) -> bool:
    try:
        return isinstance(json.loads(body), dict)
    except (ValueError, RecursionError):
        return False


def _json_request(tensors: Mapping[str, np.ndarray], datatypes: Mapping[str, str]) -> dict[str, Any]:
    return {
        "inputs": [
            {
                "name": name,
                "datatype": datatypes[name],
                "shape": list(values.shape),
                "data": values.ravel().tolist(),
            }
            for name, values in tensors.items()
        ],
        "parameters": {"k": 5},
    }


def _binary_request(tensors: Mapping[str, np.ndarray], datatypes: Mapping[str, str]) -> tuple[bytes, bytes]:
    """The JSON and the bytes of the tensors after it."""
    request = _json_request(tensors, datatypes)
    for tensor, values in zip(request["inputs"], tensors.values()):
        del tensor["data"]
        tensor["parameters"] = {"binary_data_size": values.nbytes}
    return json.dumps(request).encode(), b"".join(np.ascontiguousarray(v).tobytes() for v in tensors.values())
