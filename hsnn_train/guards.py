"""What the training loop runs under: torch's deterministic kernels, and signals that wait for the end of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Torch's deterministic kernels, on the CPU: with several threads the default backward of an index adds in any
    order. On a GPU, where several of our operations have no such kernel, runs are equal up to rounding. New memory is
    not filled, as torch then does by default: that finds reads of what nobody wrote, and takes a sixth of a step."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(device.type == "cpu")
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


@contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM (a container that is stopped) set a flag that the loop reads between steps, so a step is
    never half done; a second one raises KeyboardInterrupt."""
    hit = False

    def handle(signum: int, frame: Any) -> None:
        nonlocal hit
        if hit:
            raise KeyboardInterrupt
        hit = True

    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield lambda: hit
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: hit
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
