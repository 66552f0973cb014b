"""Triton backend ``tensorrt`` in Python: model.plan of a version through TensorRT, as NVIDIA's C++ one does.

Plans of TensorRT-RTX (config parameter engine: "tensorrt-rtx") need that runtime; all others the full
TensorRT.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from responses import respond

_INSTALL = {"tensorrt": "pip install tensorrt", "tensorrt_rtx": "pip install tensorrt-rtx"}
_Range = tuple[tuple[int, ...], tuple[int, ...]]  # smallest and largest shape


class TritonPythonModel:
    """One instance of one version of a model; one execution context per optimisation profile."""

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        self._batched = config["max_batch_size"] > 0
        self._model = f"{args['model_name']} version {args['model_version']}"
        self._library = self._import_library(config)
        self._torch = self._import_torch()
        self._device = self._torch.device("cuda", int(args["model_instance_device_id"]))
        file = Path(
            args["model_repository"],
            args["model_version"],
            config.get("default_model_filename") or "model.plan",
        )
        with self._torch.cuda.device(self._device):
            self._stream = self._torch.cuda.Stream()
            self._engine = self._open_engine(file)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = self._library.TensorIOMode.INPUT
        self._inputs = [name for name in names if self._engine.get_tensor_mode(name) == is_input]
        self._outputs = [name for name in names if name not in self._inputs]
        self._profiles = [self._ranges(profile) for profile in range(self._engine.num_optimization_profiles)]
        self._contexts: dict[int, Any] = {}

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return respond(requests, self._run, self._batched)

    def _run(self, inputs: dict[str, np.ndarray], outputs: list[str]) -> Sequence[np.ndarray]:
        torch, context = self._torch, self._context(inputs)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            tensors = {}
            for name in self._inputs:
                tensors[name] = torch.from_numpy(np.ascontiguousarray(inputs[name])).to(self._device)
                if not context.set_input_shape(name, inputs[name].shape):
                    raise ValueError(f"TensorRT refuses input {name} of shape {list(inputs[name].shape)}")
            for name in self._outputs:  # the engine writes all of them, whichever were asked for
                shape = tuple(context.get_tensor_shape(name))
                tensors[name] = torch.empty(shape, dtype=self._dtype(name), device=self._device)
            for name, tensor in tensors.items():
                context.set_tensor_address(name, tensor.data_ptr())
            if not context.execute_async_v3(self._stream.cuda_stream):
                raise RuntimeError("TensorRT did not accept the call; see the server's log")
            return [tensors[name].cpu().numpy() for name in outputs]  # waits for the stream

    def _context(self, inputs: Mapping[str, np.ndarray]) -> Any:
        profile = fitting_profile(self._profiles, {name: inputs[name].shape for name in self._inputs})
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if not context.set_optimization_profile_async(profile, self._stream.cuda_stream):
                raise RuntimeError(
                    f"TensorRT can't select optimisation profile {profile}; see the server's log"
                )
            self._stream.synchronize()
            self._contexts[profile] = context
        return self._contexts[profile]

    def _dtype(self, name: str) -> Any:
        numpy_type = self._library.nptype(self._engine.get_tensor_dtype(name))
        return self._torch.from_numpy(np.empty(0, numpy_type)).dtype

    def _ranges(self, profile: int) -> dict[str, _Range]:
        shapes = {name: self._engine.get_tensor_profile_shape(name, profile) for name in self._inputs}
        return {name: (tuple(smallest), tuple(largest)) for name, (smallest, _, largest) in shapes.items()}

    def _open_engine(self, file: Path) -> Any:
        if not file.is_file():
            raise self._error(f"{file} is missing, expected a TensorRT plan")
        self._runtime = self._library.Runtime(self._library.Logger(self._library.Logger.WARNING))
        engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if engine is None:
            raise self._error(
                f"{self._library.__name__} {self._library.__version__} can't read {file}: a plan is bound to "
                "the version that built it and to the GPU types it was built for (see the server's log); "
                "export it again"
            )
        return engine

    def _import_library(self, config: Mapping[str, Any]) -> Any:
        engine = config.get("parameters", {}).get("engine", {}).get("string_value", "tensorrt")
        name = "tensorrt_rtx" if engine == "tensorrt-rtx" else "tensorrt"
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise self._error(
                f"its plans need the Python package {name} ({error}); {_INSTALL[name]}, use NVIDIA's "
                "Triton image, or publish for the engine onnxruntime"
            ) from error

    def _import_torch(self) -> Any:
        try:
            torch = importlib.import_module("torch")
        except ImportError as error:
            raise self._error(
                f"the local tensorrt backend needs PyTorch for GPU memory ({error}); install it"
            ) from error
        if not torch.cuda.is_available():
            raise self._error(
                f"TensorRT needs an NVIDIA GPU, PyTorch {torch.__version__} sees none; "
                "publish for the engine onnxruntime to serve on a CPU"
            )
        return torch

    def _error(self, what: str) -> Exception:
        return pb_utils.TritonModelException(f"{self._model}: {what}")


def fitting_profile(profiles: Sequence[Mapping[str, _Range]], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The first profile whose range every input's shape lies in; ValueError when there is none."""
    for i, ranges in enumerate(profiles):
        if all(_within(shape, *ranges[name]) for name, shape in shapes.items()):
            return i
    got = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    built = "; ".join(
        ", ".join(
            f"{name} {list(smallest)} to {list(largest)}" for name, (smallest, largest) in ranges.items()
        )
        for ranges in profiles
    )
    raise ValueError(f"no optimisation profile covers {got}; the plan was built for {built}")


def _within(shape: tuple[int, ...], smallest: tuple[int, ...], largest: tuple[int, ...]) -> bool:
    return len(shape) == len(smallest) and all(
        low <= size <= high for size, low, high in zip(shape, smallest, largest)
    )
