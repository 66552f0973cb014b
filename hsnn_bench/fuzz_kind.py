"""What a kind of file is to the fuzzer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class Invalid(Exception):
    """Something was read that must have been refused."""


@dataclass(frozen=True)
class Kind:
    """A kind of file. ``make``: write a good one below a folder and return its path, beside all that reading it needs;
    ``mutate``: a changed content of it; ``read``: read it as HSNN does, with the good content beside it."""

    name: str
    make: Callable[[Path, Path], Path]
    mutate: Callable[[np.random.Generator, bytes], bytes]
    read: Callable[[Path, bytes], None]
