"""Malformed gRPC requests to a served model; `fuzz_http_requests` has those over HTTP.

Each is made of a good request by one change. Of most changes it is known that nothing but a refusal can be right; what
bytes at random mean nobody knows, and there an answer is right, too, as long as it is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from clients.load import METHOD
from hsnn_core.schema import Schema

from .fuzz_bytes import any_integer, any_text, mutated

SERVICE = METHOD.rpartition("/")[0]
# RPCs that need no key and change nothing.
OPEN = (
    "ServerLive",
    "ServerReady",
    "ServerMetadata",
    "ModelReady",
    "ModelMetadata",
    "ModelConfig",
    "ModelStatistics",
)
_DATATYPES = (
    "FP32",
    "FP64",
    "INT64",
    "INT32",
    "UINT64",
    "BOOL",
    "BYTES",
    "FP16",
    "INT8",
    "",
    "int64",
    "TYPE_FP32",
)
_CONTENTS = {"FP32": "fp32_contents", "FP64": "fp64_contents", "INT64": "int64_contents"}

Message: TypeAlias = Any  # of protobuf's generated classes no types are known


@dataclass(frozen=True)
class Malformed:
    """``what`` was changed; ``body``: the bytes on the wire, ``method``: of gRPC, "" for HTTP. ``refused``: an answer
    would be wrong. ``short``: a server may rightly wait for more. ``kills``: Triton 2.51 ends at it, see
    `fuzz_http_requests.kills`."""

    what: str
    body: bytes
    method: str
    refused: bool
    short: bool = False
    kills: bool = False


class GrpcRequests:
    """Makes them from good messages, one user each, of a model with this schema and these many tasks."""

    def __init__(self, schema: Schema, good: Sequence[bytes], rng: np.random.Generator) -> None:
        self._schema, self._good, self._rng = schema, good, rng
        self._dense = {f.name for f in schema.user_features if f.kind == "dense"}
        self._ranged = {f.name for f in schema.user_features if f.encoding == "range"}
        self._changes: list[Callable[[Message], bool]] = [
            self._missing, self._unknown, self._twice, self._datatype, self._dimension, self._rank, self._bytes_length,
            self._contents_count, self._contents_too_many, self._both_contents, self._typed_contents,
            self._not_finite, self._out_of_range,
            self._extreme_keys, self._context, self._excluded, self._parameter, self._unknown_parameter, self._model,
            self._version, self._output, self._shared_memory, self._other_users,
        ]  # fmt: skip

    def draw(self) -> Malformed:
        """The next one."""
        rng = self._rng
        kind = rng.random()
        if kind < 0.75:
            return self._structured()
        good = self._good[rng.integers(len(self._good))]
        if kind < 0.85:
            return self._decoded("cut off", good[: rng.integers(len(good))], METHOD)
        if kind < 0.95:
            return self._decoded("bytes changed", mutated(rng, good), METHOD)
        body = rng.bytes(rng.integers(0, 2000))
        if kind < 0.98:
            return self._decoded("bytes at random", body, METHOD)
        method = f"{SERVICE}/{rng.choice([*OPEN, 'NoSuch'])}"
        return Malformed("bytes at random to another call", body, method, method.endswith("NoSuch"))

    def _structured(self) -> Malformed:
        rng = self._rng
        message = service_pb2.ModelInferRequest.FromString(self._good[rng.integers(len(self._good))])
        change = self._changes[rng.integers(len(self._changes))]
        refused = change(message)
        return Malformed(
            change.__name__.strip("_").replace("_", " "), message.SerializeToString(), METHOD, refused
        )

    @staticmethod
    def _decoded(what: str, body: bytes, method: str) -> Malformed:
        try:
            service_pb2.ModelInferRequest.FromString(body)
        except DecodeError:
            return Malformed(what, body, method, True)
        return Malformed(what, body, method, False)

    def _some(self, message: Message) -> int:
        return int(self._rng.integers(len(message.inputs)))

    def _place(self, message: Message, names: set[str]) -> int:
        places = [n for n, tensor in enumerate(message.inputs) if tensor.name in names]
        return int(self._rng.choice(places)) if places else -1

    def _users(self, message: Message) -> int:
        """The place of a tensor that no request may leave out."""
        return self._place(message, {feature.name for feature in self._schema.user_features})

    def _missing(self, message: Message) -> bool:
        place = self._users(message)
        del message.inputs[place], message.raw_input_contents[place]
        return True

    def _unknown(self, message: Message) -> bool:
        message.inputs[self._users(message)].name = (
            any_text(self._rng).encode(errors="replace").decode() + "?"
        )
        return True

    def _twice(self, message: Message) -> bool:
        place = self._some(message)
        message.inputs.add().CopyFrom(message.inputs[place])
        message.raw_input_contents.append(message.raw_input_contents[place])
        return True

    def _datatype(self, message: Message) -> bool:
        tensor = message.inputs[self._some(message)]
        tensor.datatype = str(self._rng.choice([kind for kind in _DATATYPES if kind != tensor.datatype]))
        return True

    def _dimension(self, message: Message) -> bool:
        tensor = message.inputs[self._some(message)]
        at, before = int(self._rng.integers(len(tensor.shape))), list(tensor.shape)
        tensor.shape[at] = any_integer(self._rng)
        if list(tensor.shape) == before:
            tensor.shape[at] += 1
        # A tensor without elements may have any number of empty rows.
        return tensor.shape[0] != 1 or int(np.prod(before)) != 0

    def _rank(self, message: Message) -> bool:
        tensor = message.inputs[self._some(message)]
        if self._rng.integers(2):
            tensor.shape.append(1)
        else:
            del tensor.shape[-1]
        return True

    def _bytes_length(self, message: Message) -> bool:
        place, rng = self._some(message), self._rng
        content = message.raw_input_contents[place]
        longer = content + rng.bytes(rng.integers(1, 40))
        cut = content[: rng.integers(len(content))] if content else longer
        message.raw_input_contents[place] = longer if rng.integers(2) else cut
        return True

    def _contents_count(self, message: Message) -> bool:
        del message.raw_input_contents[self._some(message)]
        return True

    def _contents_too_many(self, message: Message) -> bool:
        message.raw_input_contents.append(self._rng.bytes(8))
        return True

    def _both_contents(self, message: Message) -> bool:
        tensor = message.inputs[self._some(message)]
        getattr(tensor.contents, _CONTENTS[tensor.datatype]).append(1)
        return True

    def _typed_contents(self, message: Message) -> bool:
        """Without raw bytes, with the numbers of one tensor missing, too many, or of another type."""
        place, wrong = self._users(message), int(self._rng.integers(3))
        for number, (tensor, raw) in enumerate(zip(message.inputs, message.raw_input_contents)):
            dtype = {"FP32": np.float32, "FP64": np.float64, "INT64": np.int64}[tensor.datatype]
            values = np.frombuffer(raw, dtype).tolist()
            field = _CONTENTS[tensor.datatype]
            if number == place and wrong == 0:
                continue
            if number == place and wrong == 1:
                values = [*values, 1]
            if number == place and wrong == 2:
                field = "bool_contents"
            getattr(tensor.contents, field).extend(map(bool, values) if field == "bool_contents" else values)
        del message.raw_input_contents[:]
        return True

    def _not_finite(self, message: Message) -> bool:
        bad = self._rng.choice([np.nan, np.inf, -np.inf])
        return self._first_value(message, self._dense, np.float32(bad))

    def _out_of_range(self, message: Message) -> bool:
        bad = int(self._rng.choice([-1, -7, 10**6, 2**62]))
        return self._first_value(message, self._ranged, np.int64(bad))

    def _first_value(self, message: Message, names: set[str], value: np.generic) -> bool:
        place = self._place(message, names)
        if place < 0:
            return self._missing(message)
        raw = message.raw_input_contents[place]
        message.raw_input_contents[place] = value.tobytes() + raw[value.nbytes :]
        return True

    def _extreme_keys(self, message: Message) -> bool:
        """Keys that no vocabulary has: unknown ones, which is no mistake."""
        keyed = {f.name for f in self._schema.user_features if f.kind != "dense"} - self._ranged
        place = self._place(message, keyed)
        count = len(message.raw_input_contents[place]) // 8
        keys = np.array([any_integer(self._rng) for _ in range(count)], np.int64)
        message.raw_input_contents[place] = keys.tobytes()
        return False

    def _context(self, message: Message) -> bool:
        """A context of another number of users, or an infinite time."""
        wires = self._schema.context_wire()
        wire = wires[self._rng.integers(len(wires))]
        self._drop(message, wire.name)
        width = max(1, wire.shape[0])
        if wire.datatype == "FP64" and self._rng.integers(2):
            values = np.full((1, width), self._rng.choice([np.inf, -np.inf]))
        else:
            rows = int(self._rng.choice([0, 2, 3]))
            values = np.zeros((rows, width), np.float64 if wire.datatype == "FP64" else np.int64)
        self._add(message, wire.name, wire.datatype, values)
        return True

    def _excluded(self, message: Message) -> bool:
        """More excluded items than there are, none of which need exist."""
        self._drop(message, "exclude_items")
        count = int(self._rng.choice([0, 1, 1000, 20000]))
        self._add(message, "exclude_items", "INT64", self._rng.integers(-(2**63), 2**63 - 1, (1, count)))
        return False

    def _parameter(self, message: Message) -> bool:
        name = str(self._rng.choice(["k", "widths", "rank_by", "tasks", "schema_hash", "after"]))
        bad: list[Any] = [any_text(self._rng).encode(errors="replace").decode() + "!", -1, -(2**40)]
        if name != "widths":
            bad += [True, 0.5]
        if name in ("k", "after"):
            bad += [0]
        if name == "k":
            bad += [10**9, 2**63 - 1]
        if name == "widths":
            bad += ["0,0", "-1,4", "1,2,3,4,5,6,7", "4,,", "1e9,1", "0x4,4"]
        _set(message, name, bad[self._rng.integers(len(bad))])
        return True

    def _unknown_parameter(self, message: Message) -> bool:
        name = any_text(self._rng).encode(errors="replace").decode() + "_"
        _set(message, name, bool(self._rng.integers(2)) or any_integer(self._rng))
        return not name.startswith("triton_")

    def _model(self, message: Message) -> bool:
        message.model_name = any_text(self._rng).encode(errors="replace").decode()
        return True

    def _version(self, message: Message) -> bool:
        message.model_version = str(self._rng.choice(["99", "-5", "abc", " ", "0", "9" * 30, "../1", "1.5"]))
        return True

    def _output(self, message: Message) -> bool:
        message.outputs.add(name=any_text(self._rng).encode(errors="replace").decode() + "?")
        return True

    def _shared_memory(self, message: Message) -> bool:
        """Tensors in regions that nobody registered, of input or output."""
        tensors = message.inputs if self._rng.integers(2) else message.outputs
        tensor = tensors[self._rng.integers(len(tensors))]
        tensor.parameters["shared_memory_region"].string_param = (
            any_text(self._rng).encode(errors="replace").decode()
        )
        tensor.parameters["shared_memory_byte_size"].int64_param = any_integer(self._rng)
        tensor.parameters["shared_memory_offset"].int64_param = any_integer(self._rng)
        return True

    def _other_users(self, message: Message) -> bool:
        """One tensor of two users among tensors of one."""
        place = self._users(message)
        message.inputs[place].shape[0] = 2
        message.raw_input_contents[place] = 2 * message.raw_input_contents[place]
        return True

    @staticmethod
    def _drop(message: Message, name: str) -> None:
        for place in reversed(range(len(message.inputs))):
            if message.inputs[place].name == name:
                del message.inputs[place], message.raw_input_contents[place]

    @staticmethod
    def _add(message: Message, name: str, datatype: str, values: np.ndarray) -> None:
        message.inputs.add(name=name, datatype=datatype, shape=values.shape)
        message.raw_input_contents.append(np.ascontiguousarray(values).tobytes())


def _set(message: Message, name: str, value: Any) -> None:
    field = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
    message.parameters[name].Clear()
    setattr(message.parameters[name], field, value)
