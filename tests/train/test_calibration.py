"""Calibration: the last fit of the ensembles, on impressions that training has not seen."""

import numpy as np
import pytest
import torch

from hsnn_train.calibration import calibrate, fit
from hsnn_train.checkpoint import load_run
from hsnn_train.ensemble import LayerEnsemble
from hsnn_train.evaluate import pointwise, pointwise_report
from hsnn_train.trainer import Trainer, evaluation_batches

NO_CROSSINGS = np.empty((20_000, 0))


def log_loss(z, y):
    return np.mean(np.logaddexp(0, z) - y * z)


def test_it_meets_the_mean_and_undoes_a_scale_and_a_shift():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, 20_000)
    y = (rng.random(20_000) < 1 / (1 + np.exp(-(z - 1)))).astype(np.float64)
    scale, weights, shift = fit(3 * z + 5, NO_CROSSINGS, y)  # what is true is z - 1
    assert scale == pytest.approx(1 / 3, rel=0.05)
    assert 3 * shift + 5 * 3 * scale == pytest.approx(-3, abs=0.25)
    assert not len(weights)
    assert np.mean(1 / (1 + np.exp(-(scale * (3 * z + 5) + shift)))) == pytest.approx(y.mean(), abs=1e-6)
    assert fit(-z, NO_CROSSINGS, y)[0] > 0, "the order is kept even where it is wrong"


def test_crossings_get_what_the_logit_leaves_out_of_them():
    rng = np.random.default_rng(1)
    z, x = rng.normal(0, 1, 20_000), rng.random((20_000, 4)) * [1.0, 1.0, 100.0, 0.0] + 3
    x[:, 1] = x[:, 0]  # says the same
    y = (rng.random(20_000) < 1 / (1 + np.exp(-(z + 4 * x[:, 0] - 0.02 * x[:, 2] - 14)))).astype(np.float64)
    scale, weights, shift = fit(z, x, y)
    assert scale == pytest.approx(1, rel=0.1)
    assert weights[0] == pytest.approx(weights[1], rel=1e-3) and weights[:2].sum() == pytest.approx(
        4, rel=0.1
    )
    assert weights[2] == pytest.approx(-0.02, rel=0.1)
    assert weights[3] == 0.0, "what never varies says nothing"
    fitted = scale * z + x @ weights + shift
    assert np.mean(1 / (1 + np.exp(-fitted))) == pytest.approx(y.mean(), abs=1e-6)
    best = log_loss(fitted, y)
    for nudge in np.diag([0.05, 0.05, 0.002, 0.0])[:3]:
        assert min(log_loss(fitted + x @ nudge, y), log_loss(fitted - x @ nudge, y)) > best - 1e-6


def test_few_pairs_settle_little_and_rare_crossings_nothing():
    rng = np.random.default_rng(2)
    worse = []
    for _ in range(20):
        z, noise = rng.normal(0, 2, (2, 900)), (rng.random((2, 900, 9)) < 0.2).astype(np.float64)
        y = (rng.random((2, 900)) < 1 / (1 + np.exp(-(z - 1)))).astype(np.float64)
        scale, weights, shift = fit(z[0], noise[0], y[0])
        alone, _, constant = fit(z[0], NO_CROSSINGS[:900], y[0])
        fitted = log_loss(scale * z[1] + noise[1] @ weights + shift, y[1])
        worse.append(fitted / log_loss(alone * z[1] + constant, y[1]))
    assert 1.0 < np.mean(worse) < 1.012, "nine columns of nothing over 900 pairs"
    rare = np.zeros((20_000, 1))
    rare[:29] = 1.0
    y = np.zeros(20_000)
    y[:40] = 1.0
    assert fit(rng.normal(size=20_000), rare, y)[1] == 0.0
    rare[:30] = 1.0
    assert fit(rng.normal(size=20_000), rare, y)[1] > 1.0


def test_an_ensemble_adds_the_crossings_that_it_has_weights_for():
    ensemble = LayerEnsemble(1, 2, 3)
    logits, dense = torch.randn(2, 4, 1, 2), torch.randn(2, 4, 3)
    assert torch.equal(ensemble(logits, dense), ensemble(logits)), "none before calibration"
    ensemble.crossing[:] = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    added = ensemble(logits, dense) - ensemble(logits)
    assert torch.allclose(added, torch.stack([dense[..., 0], 2 * dense[..., 1]], -1), atol=1e-6)
    before = {name: value for name, value in ensemble.state_dict().items() if name != "crossing"}
    fresh = LayerEnsemble(1, 2, 3)
    fresh.load_state_dict(before)
    assert not fresh.crossing.any()


def test_a_calibrated_model_is_better_on_validation_and_a_second_fit_changes_nothing(
    dataset, make_recipe, tmp_path
):
    recipe = make_recipe(train={"max_steps": 60})
    trainer = Trainer(recipe, dataset, tmp_path / "run", progress=False)
    model, batches = trainer.train(), evaluation_batches(dataset, recipe)

    def values():
        return pointwise(model, batches, dataset.valid, trainer.state, 1, parts=True)

    rates = np.array([0.3, 0.1])
    before = pointwise_report(values(), rates, "ab")
    calibrate(model, values())
    after = pointwise_report(values(), rates, "ab")
    assert all(new["ne"] < old["ne"] for old, new in zip(before, after))
    assert all(abs(row["calibration"] - 1) < 1e-3 for row in after)
    reads = [ensemble.reads_crossings for ensemble in model.ensemble]
    assert reads == [True, True, False], "the item layer of this recipe is two towers"
    assert [bool(ensemble.crossing.any()) for ensemble in model.ensemble] == reads
    crossing = [ensemble.crossing.clone() for ensemble in model.ensemble]
    calibrate(model, values())
    for ensemble, first in zip(model.ensemble, crossing):
        assert torch.allclose(ensemble.crossing, first, rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="the ensembles read crossings, expected values with their parts"):
        calibrate(model, pointwise(model, batches, dataset.valid, trainer.state, 1))


def test_a_run_that_was_calibrated_otherwise_is_loaded_and_is_calibrated_anew(dataset, make_recipe, tmp_path):
    pooled = {"max_steps": 6, "pool": 8, "negatives": 4, "unlabelled": 0}
    recipe = make_recipe(train=pooled)
    trainer = Trainer(recipe, dataset, tmp_path / "run", progress=False)
    trainer.train()
    trainer.calibrated = True
    trainer.save()
    path = tmp_path / "run" / "checkpoint.pt"
    assert Trainer(recipe, dataset, tmp_path / "run", resume=True, progress=False).calibrated
    otherwise = make_recipe(train={**pooled, "order": "requests"})
    assert not Trainer(otherwise, dataset, tmp_path / "run", resume=True, progress=False).calibrated
    state = torch.load(path, weights_only=True)
    state["calibrated"] = True  # as before crossings had weights
    state["model"] = {name: value for name, value in state["model"].items() if "crossing" not in name}
    torch.save(state, path)
    assert not Trainer(recipe, dataset, tmp_path / "run", resume=True, progress=False).calibrated
    assert not load_run(tmp_path / "run").model.ensemble[0].crossing.any()
