"""The ensemble of a layer: what ranks its nodes, from the logits of all layers so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: How calibration fits ensembles, kept with what it fitted: 1 a scale and a shift, 2 weights of crossings too, 3 those
#: above the items to the order that the beam needs.
CALIBRATION = 3


def calibrated_as(order: str) -> int | str:
    """What a calibrated model keeps of how it was calibrated, with the recipe's ``train.order``."""
    return CALIBRATION if order == "labels" else f"{CALIBRATION}-{order}"


class LayerEnsemble(nn.Module):
    """Linear layer over the MoNN logits of layers 1..l, per task (paper §3.1), and over the dense crossings of the node
    where the layer's MoNN reads any: (B, C, l, T) and (B, C, D) -> (B, C, T).

    ``crossing`` (D, T) is not trained: what impressions say of crossings that the networks on top know too well is not
    what others will say (docs/design.md). It is zero until calibration fits it, and stands from then on, also where a
    calibrated model teaches another or follows a stream.
    """

    crossing: Tensor

    def __init__(self, layers: int, tasks: int, crossings: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((layers, tasks), 1.0 / layers))
        self.bias = nn.Parameter(torch.zeros(tasks))
        self.register_buffer("crossing", torch.zeros(crossings, tasks))

    @property
    def reads_crossings(self) -> bool:
        """Whether there is any crossing to weigh."""
        return len(self.crossing) > 0

    def forward(self, logits: Tensor, cross_dense: Tensor | None = None) -> Tensor:
        combined = (logits * self.weight).sum(-2) + self.bias
        if cross_dense is not None and self.reads_crossings:
            combined = combined + cross_dense @ self.crossing
        return combined

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Runs of before ensembles read crossings have none."""
        state.setdefault(f"{prefix}crossing", torch.zeros_like(self.crossing))
        super()._load_from_state_dict(state, prefix, *rest)
