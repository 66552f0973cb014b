"""Calibration: the linear ensembles are fitted once more, to impressions that training has not seen.

Two towers, and so an OverArch on top of them, know the impressions that they were trained on better than any they will
see; beside that, crossings look weaker in training than they are. So what a crossing is worth beside the networks is
settled here, with a scale, a shift and one weight per dense crossing. Above the items `hsnn_train.beam` fits anew what
ranks, and this is what is left where it has nothing to go by.
"""

from __future__ import annotations

import numpy as np
import torch

from .ensemble import LayerEnsemble
from .evaluate import Pointwise
from .hsnn import HSNN

#: A crossing's weight, of deviation 1, costs as much as so many pairs' log loss: few pairs settle nothing.
RIDGE_PAIRS = 10.0
LEAST_PAIRS = 30  # that have a crossing, for it to get a weight
LEAST_SCALE = 1e-3


@torch.no_grad()
def calibrate(model: HSNN, values: Pointwise) -> None:
    """Fit every layer's and task's ensemble to ``values``, of a validation split, in log loss: its logits are scaled
    and shifted (Platt 1999) and the crossings that it reads get their weights. A task of which every label is the same
    is left as it is. Raises ValueError where ensembles read crossings and ``values`` have no parts."""
    for layer, ensemble in enumerate(model.ensemble):
        assert isinstance(ensemble, LayerEnsemble)
        if ensemble.reads_crossings and not values.crossings:
            raise ValueError("calibrate: the ensembles read crossings, expected values with their parts")
        given = values.crossings[layer] if ensemble.reads_crossings else np.empty((len(values.labels), 0))
        crossings = given.astype(np.float64)
        for t in range(model.tasks):
            told = values.told[:, t]
            added = crossings[told] @ ensemble.crossing[:, t].cpu().numpy()
            z = values.logits[layer, told, t].astype(np.float64) - added
            y = values.labels[told, t].astype(np.float64)
            if tells(z, y):
                scale, weights, shift = fit(z, crossings[told], y)
                ensemble.weight[:, t] *= scale
                ensemble.bias[t] = ensemble.bias[t] * scale + shift
                ensemble.crossing[:, t] = torch.from_numpy(weights)


def settle(ensemble: LayerEnsemble, layer: int, task: int, weights: np.ndarray, values: Pointwise) -> None:
    """Give the ensemble of ``layer`` (from 1) for a task the ``weights`` (l + D,) of MoNN logits and of crossings, with
    the scale and the shift that calibrate them on ``values``, which have their parts. Where every label is the same, or
    nothing varies, it is left as it is. To be called without gradients."""
    assert values.monn is not None
    told = values.told[:, task]
    y = values.labels[told, task].astype(np.float64)
    inputs = np.concatenate([values.monn[:layer, :, task].T, values.crossings[layer - 1]], axis=1)
    z = inputs[told] @ weights
    if tells(z, y):
        scale, _, shift = fit(z, np.empty((len(y), 0)), y)
        ensemble.weight[:, task] = torch.from_numpy(scale * weights[:layer])
        ensemble.crossing[:, task] = torch.from_numpy(scale * weights[layer:])
        ensemble.bias[task] = shift


def tells(z: np.ndarray, y: np.ndarray) -> bool:
    """Whether the logits z (S,) vary and there are labels y (S,) of both kinds, so that there is something to fit."""
    return len(y) > 0 and 0.0 < float(y.mean()) < 1.0 and float(z.std()) > 0


def fit(z: np.ndarray, crossings: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray, float]:
    """(a, w (D,), b) with a > 0 that minimise the log loss of sigmoid(a z + crossings @ w + b) against y, for z and y
    (S,) and crossings (S, D), all float64, by Newton's method. At the minimum the predicted mean equals the observed
    one. Where the best a would not be positive, it is set to `LEAST_SCALE`, and without crossings the order is kept. A
    crossing that never varies, or is other than 0 for too few pairs, has weight 0."""
    often = np.count_nonzero(crossings, axis=0) >= LEAST_PAIRS
    scaled, deviation = standard(crossings * often)
    design = np.column_stack([z, scaled, np.ones_like(z)])
    start = np.zeros(design.shape[1])
    start[0] = 1.0
    ridge = np.full(design.shape[1], RIDGE_PAIRS / len(y))
    ridge[[0, -1]] = 0.0
    found = newton(design, np.zeros_like(z), y, ridge, start)
    if found[0] < LEAST_SCALE:
        rest = newton(design[:, 1:], LEAST_SCALE * z, y, ridge[1:], start[1:])
        found = np.concatenate([[LEAST_SCALE], rest])
    weights = found[1:-1] / deviation
    return float(found[0]), weights, float(found[-1] - weights @ crossings.mean(0))


def standard(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns (S, F) with mean 0 and deviation 1, and the deviations (F,) that they had; infinite where a column does
    not vary, so that it becomes 0 and any weight of it too."""
    deviation = columns.std(0)
    deviation[deviation == 0] = np.inf
    return (columns - columns.mean(0)) / deviation, deviation


def newton(
    design: np.ndarray, offset: np.ndarray, y: np.ndarray, ridge: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """The weights (D,) of the design (S, D) with which sigmoid(design @ weights + offset) has the least log loss
    against y (S,) plus ridge (D,) times half their squares."""

    def loss(weights: np.ndarray) -> float:
        z = design @ weights + offset
        return float(np.mean(np.logaddexp(0, z) - y * z) + ridge @ weights**2 / 2)

    found, least = start, loss(start)
    for _ in range(100):
        p = np.exp(-np.logaddexp(0, -(design @ found + offset)))
        gradient = design.T @ (p - y) / len(y) + ridge * found
        hessian = (design * (p * (1 - p))[:, None]).T @ design / len(y) + np.diag(ridge + 1e-9)
        step = np.linalg.solve(hessian, gradient)
        # Where few pairs are in doubt Newton overshoots.
        while (reached := loss(found - step)) > least and np.abs(step).max() > 1e-9:
            step = step / 2
        found, least = found - step, reached
        if float(np.abs(step).max()) < 1e-9:
            break
    return found
