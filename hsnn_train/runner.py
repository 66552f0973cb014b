"""The torch runner: `hsnn_core.scorer.Runner` over a trained model, for evaluation and parity."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .hsnn import HSNN


class TorchRunner:
    """Runs a model's towers and scorers where the model is, on NumPy arrays (shapes: `hsnn_core.scorer.Runner`)."""

    def __init__(self, model: HSNN) -> None:
        self.model = model.eval()

    def _tensor(self, inputs: dict[str, np.ndarray], name: str) -> Tensor | None:
        """An input as a tensor; views of memory-mapped files are copied, since torch has no read-only tensors."""
        if name not in inputs:
            return None
        return torch.from_numpy(np.require(inputs[name], requirements=["C", "W"])).to(self.model.device)

    @torch.inference_mode()
    def user_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        out = self.model.user_tower(self._tensor(inputs, "user_dense"), self._tensor(inputs, "user_ids"))
        return {f"user_l{number}": u.cpu().numpy() for number, u in enumerate(out, start=1)}

    @torch.inference_mode()
    def item_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """item_dense, item_ids -> item_l1..item_lN (V, E_l) and index (V, d)."""
        out = self.model.item_tower(self._tensor(inputs, "item_dense"), self._tensor(inputs, "item_ids"))
        named = {f"item_l{number}": e.cpu().numpy() for number, e in enumerate(out[:-1], start=1)}
        return {**named, "index": out[-1].cpu().numpy()}

    @torch.inference_mode()
    def score(self, layer: int, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        user, item = self._tensor(inputs, "user"), self._tensor(inputs, "item")
        assert user is not None and item is not None
        monn, logits = self.model.score(
            layer,
            user,
            item.float(),
            self._tensor(inputs, "cross_dense"),
            self._tensor(inputs, "cross_ids"),
            self._tensor(inputs, "previous"),
        )
        return monn.cpu().numpy(), logits.cpu().numpy()
