"""The torch runner: `hsnn_core.scorer.Runner` over a trained model, for evaluation and parity."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .hsnn import HSNN


def _tensor(inputs: dict[str, np.ndarray], name: str) -> Tensor | None:
    """An input as a tensor; views of memory-mapped files are copied, since torch has no read-only tensors."""
    return torch.from_numpy(np.require(inputs[name], requirements=["C", "W"])) if name in inputs else None


class TorchRunner:
    """Runs a model's towers and scorers on NumPy arrays (shapes: see `hsnn_core.scorer.Runner`)."""

    def __init__(self, model: HSNN) -> None:
        self.model = model.eval()

    @torch.inference_mode()
    def user_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        out = self.model.user_tower(_tensor(inputs, "user_dense"), _tensor(inputs, "user_ids"))
        return {f"user_l{number}": u.numpy() for number, u in enumerate(out, start=1)}

    @torch.inference_mode()
    def item_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """item_dense, item_ids -> item_l1..item_lN (V, E_l) and index (V, d)."""
        out = self.model.item_tower(_tensor(inputs, "item_dense"), _tensor(inputs, "item_ids"))
        named = {f"item_l{number}": e.numpy() for number, e in enumerate(out[:-1], start=1)}
        return {**named, "index": out[-1].numpy()}

    @torch.inference_mode()
    def score(self, layer: int, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        user, item = _tensor(inputs, "user"), _tensor(inputs, "item")
        assert user is not None and item is not None
        monn, logits = self.model.score(
            layer,
            user,
            item.float(),
            _tensor(inputs, "cross_dense"),
            _tensor(inputs, "cross_ids"),
            _tensor(inputs, "previous"),
        )
        return monn.numpy(), logits.numpy()
