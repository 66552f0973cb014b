"""Where training runs: the CPU, or a CUDA GPU."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from hsnn_core.errors import SchemaError

T = TypeVar("T")


def find_device(name: str) -> torch.device:
    """The device called ``name`` ("cpu", "cuda", "cuda:1"). Raises SchemaError when torch does not have it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SchemaError(f"--device: got {name!r}, expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise SchemaError(f"--device: got {name!r}, expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SchemaError(
            f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs on this machine; "
            "install a CUDA build of torch where there is one, or leave --device out"
        )
    return device


def device_name(device: torch.device) -> str:
    """What to call it in a report: "CPU", "NVIDIA H100 80GB HBM3"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def moved(value: T, device: torch.device) -> T:
    """``value`` with every tensor in it on ``device``; looks into tuples and named tuples, and leaves the rest."""
    found: Any = value
    if isinstance(value, torch.Tensor):
        found = value.to(device)
    elif isinstance(value, tuple):
        parts = [moved(part, device) for part in value]
        found = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return found
