"""The ensemble of a layer: what ranks its nodes, from the logits of all layers so far."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: How calibration fits ensembles, kept with what it fitted: 1 a scale and a shift, 2 weights of crossings too, 3 those
#: above the items to the order that the beam needs, 4 what crossings are worth beside a higher or lower logit.
CALIBRATION = 4


def columns(logits: np.ndarray, crossings: np.ndarray) -> np.ndarray:
    """What an ensemble of layer l weighs for one task, of S pairs: MoNN logits (S, l), crossings (S, D), and each
    crossing times the layer's own logit -> (S, l + 2D) float64."""
    logits, crossings = logits.astype(np.float64), crossings.astype(np.float64)
    return np.concatenate([logits, crossings, crossings * logits[:, -1:]], axis=1)


class LayerEnsemble(nn.Module):
    """Linear layer over the MoNN logits of layers 1..l, per task (paper §3.1), and over the dense crossings of the node
    where the layer's MoNN reads any: (B, C, l, T) and (B, C, D) -> (B, C, T). A crossing's weight may grow or shrink
    with the layer's own logit z: it is ``crossing`` + ``product`` z.

    ``crossing`` and ``product`` (D, T) are not trained: what impressions say of crossings that the networks on top know
    too well is not what others will say (docs/design.md). They are zero until calibration fits them, and stand from
    then on, also where a calibrated model teaches another or follows a stream.
    """

    crossing: Tensor
    product: Tensor

    def __init__(self, layers: int, tasks: int, crossings: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((layers, tasks), 1.0 / layers))
        self.bias = nn.Parameter(torch.zeros(tasks))
        self.register_buffer("crossing", torch.zeros(crossings, tasks))
        self.register_buffer("product", torch.zeros(crossings, tasks))

    @property
    def reads_crossings(self) -> bool:
        """Whether there is any crossing to weigh."""
        return len(self.crossing) > 0

    def forward(self, logits: Tensor, cross_dense: Tensor | None = None) -> Tensor:
        combined = (logits * self.weight).sum(-2) + self.bias
        if cross_dense is not None and self.reads_crossings:
            combined = (
                combined + cross_dense @ self.crossing + cross_dense @ self.product * logits[..., -1, :]
            )
        return combined

    def weigh(self, task: int, weights: np.ndarray, bias: float) -> None:
        """Set all that the ensemble has for a task: the weights (l + 2D,) of `columns`, and the bias."""
        parts = np.split(weights, [len(self.weight), len(self.weight) + len(self.crossing)])
        for own, part in zip((self.weight, self.crossing, self.product), parts):
            own[:, task] = torch.from_numpy(part)
        self.bias[task] = bias

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Runs of before ensembles read crossings, or their products, have none."""
        for name, buffer in self.named_buffers():
            state.setdefault(prefix + name, torch.zeros_like(buffer))
        super()._load_from_state_dict(state, prefix, *rest)
