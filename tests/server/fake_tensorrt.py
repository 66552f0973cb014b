"""A stand-in for TensorRT and for a GPU: y = 2 x and z = -x over memory addresses, on the CPU."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
PROFILES = [((1, 4), (8, 4)), ((1, 16), (8, 16))]


class Logger:
    WARNING = 1

    def __init__(self, level: int) -> None:
        pass


class Context:
    """Checks the order of calls that TensorRT demands, then computes."""

    def __init__(self) -> None:
        self.profile = -1
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, largest = PROFILES[self.profile]
        self.shape = tuple(shape)
        return all(low <= size <= high for size, low, high in zip(shape, smallest, largest))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self.shape, "the input's shape must be set first"
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        x, y, z = (self._array(name) for name in ("x", "y", "z"))
        y[:], z[:] = 2 * x, -x
        return True

    def _array(self, name: str) -> np.ndarray:
        pointer = ctypes.cast(self.addresses[name], ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, self.shape)


class Engine:
    num_io_tensors = 3
    num_optimization_profiles = len(PROFILES)
    contexts: list[Context]

    def __init__(self) -> None:
        self.contexts = []

    def get_tensor_name(self, index: int) -> str:
        return "xyz"[index]

    def get_tensor_mode(self, name: str) -> str:
        return TensorIOMode.INPUT if name == "x" else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> type:
        return np.float32

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        smallest, largest = PROFILES[profile]
        return [smallest, smallest, largest]

    def create_execution_context(self) -> Context:
        self.contexts.append(Context())
        return self.contexts[-1]


class Runtime:
    def __init__(self, logger: Logger) -> None:
        pass

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        return Engine() if plan == b"plan" else None


def nptype(dtype: type) -> type:
    return dtype


def library() -> Any:
    """The module ``tensorrt``."""
    parts = (TensorIOMode, Logger, Runtime, nptype)
    names = ("TensorIOMode", "Logger", "Runtime", "nptype")
    return SimpleNamespace(__name__="tensorrt", __version__="0", **dict(zip(names, parts)))


def torch_with_a_gpu() -> Any:
    """The module ``torch`` as the backend uses it, its GPU being the CPU."""
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device=lambda device: nullcontext(),
        stream=lambda stream: nullcontext(),
        Stream=lambda: stream,
    )
    return SimpleNamespace(
        cuda=cuda, device=lambda kind, index: "cpu", from_numpy=torch.from_numpy, empty=torch.empty
    )
