"""The networks of one snapshot on ONNX Runtime, in this process.

The same class runs in three places: the orchestrator's ``in_process`` mode, the export's parity gate and the
tests. ``onnxruntime`` is imported only when a runner is made, so that a server that calls its networks
through Triton needs nothing but NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import FormatError, ServerError

if TYPE_CHECKING:
    import onnxruntime

SCORER_OUTPUTS = ("monn", "logits")


class OnnxRunner:
    """A ``Runner`` over ``model.onnx`` files; safe to share between threads.

    ``user_tower``: path of the user tower's graph; ``scorers``: those of the scorers of layers 1..N, in
    order. ``threads``: threads within one call (concurrency between requests comes from the caller).
    """

    def __init__(self, user_tower: Path, scorers: Sequence[Path], threads: int = 1) -> None:
        self._user_tower = _session(Path(user_tower), threads)
        self._scorers = [_session(Path(path), threads) for path in scorers]
        self._user_outputs = [output.name for output in self._user_tower.get_outputs()]

    def user_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """user_dense (B, Du) f32, user_ids (B, Su) i32 -> "user_l1".."user_lN": (B, U_l) f32."""
        values = _run(self._user_tower, self._user_outputs, inputs, "user tower")
        return dict(zip(self._user_outputs, values))

    def score(self, layer: int, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Layer ``layer`` (from 1) on user (B, U_l), item (B, C, E_l), ... -> monn, logits (B, C, T) f32."""
        monn, logits = _run(self._scorers[layer - 1], SCORER_OUTPUTS, inputs, f"scorer of layer {layer}")
        return monn, logits


class OnnxItemTower:
    """A `corpus.ItemTower` over an ``item_tower.onnx``: {item_dense, item_ids} -> {item_l1..item_lN, index}."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        self._session = _session(path, threads)
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, _run(self._session, self._outputs, inputs, "item tower")))


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
    except ImportError as error:
        raise ServerError(
            "in-process scoring needs the package onnxruntime, which is not installed here; "
            "install it or score through Triton (mode bls)"
        ) from error
    if not path.is_file():
        raise FormatError(
            f"{path}: no such file, expected an ONNX graph; in-process scoring needs a snapshot exported for "
            "the engine onnxruntime"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (
        Exception
    ) as error:  # onnxruntime raises a dozen unrelated classes for a file that is no valid graph
        raise FormatError(
            f"{path}: ONNX Runtime cannot load it ({error}); export the snapshot again"
        ) from error


def _run(
    session: onnxruntime.InferenceSession, outputs: Sequence[str], inputs: dict[str, np.ndarray], what: str
) -> list[Any]:
    try:
        return session.run(list(outputs), inputs)
    except Exception as error:  # see above: InvalidArgument, Fail, RuntimeException, ... share no base class
        shapes = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in inputs.items())
        raise ServerError(f"the {what} failed on {shapes}: {error}") from error
