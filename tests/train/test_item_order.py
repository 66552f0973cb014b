"""The item layer's ensemble, fitted to whole requests where a recipe says so."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from hsnn_cli.commands_training import train_and_evaluate
from hsnn_core.exhaustive import exhaustive
from hsnn_core.item_filter import MaskFilter
from hsnn_core.scorer import LayerScorer
from hsnn_train.checkpoint import load_run
from hsnn_train.data.requests import evaluation_requests
from hsnn_train.evaluate import pointwise_report
from hsnn_train.item_order import fit_items, item_lists, preference
from hsnn_train.retrieval import corpus_of
from hsnn_train.runner import TorchRunner
from hsnn_train.trainer import Trainer

RANK = np.array([1.0, 0.0])


@pytest.fixture
def trained(calibrated, make_recipe, monkeypatch):
    """A calibrated model whose item layer reads crossings, its recipe, its index, and what it says of validation. Lists
    are of twenty items: a thousand would be all of this world, in which some 18 find
    what they want."""
    monkeypatch.setattr("hsnn_train.item_order.BEST", 20)
    monkeypatch.setattr("hsnn_train.item_order.LEAST_PAIRS", 5)
    recipe = make_recipe(
        model={"layers": ["small", "small", "small"]},
        train={"max_steps": 60, "pool": 40, "negatives": 4, "unlabelled": 0, "order": "requests"},
        search={"candidates": "new"},
    )
    model, state, values = calibrated(recipe)
    return model, recipe, state, values


def weighed(model, lists):
    """What the item layer's ensemble makes of the lists, without its bias."""
    ensemble = model.ensemble[-1]
    crossings = lists.crossings @ ensemble.crossing[:, 0].numpy()
    return lists.monn @ ensemble.weight[:, 0].detach().numpy() + crossings


def surprise(model, lists):
    """Mean -log of the softmax over a request's list, of what it wants, under the scale at which that is least."""
    z = weighed(model, lists)
    z = np.where(lists.there, z.astype(np.float64) / z[lists.there].std(), -np.inf)

    def at(scale):
        log_p = scale * z - np.log(np.exp(scale * z).sum(1, keepdims=True))
        return -log_p[lists.wanted].mean()

    return minimize_scalar(at, bounds=(0, 10), method="bounded").fun


def test_preferences_are_found_from_choices_in_lists_of_any_length():
    rng = np.random.default_rng(0)
    given = rng.normal(size=(3000, 12, 4)).astype(np.float32) * [1.0, 20.0, 1.0, 0.0] + [0.0, 3.0, 0.0, 7.0]
    there = np.arange(12) < rng.integers(2, 13, (3000, 1))
    z = given @ [2.0, -0.05, 0.0, 0.0] + 50 * rng.normal(
        size=(3000, 1)
    )  # what shifts a whole list says nothing
    chosen = np.where(there, z + rng.gumbel(size=z.shape), -np.inf).argmax(1)
    wanted = np.arange(12) == chosen[:, None]
    wanted[:300] = False  # requests whose item is not in the list
    weights = preference(given, wanted, there, np.zeros(4))
    assert weights[:3] == pytest.approx([2.0, -0.05, 0.0], abs=0.1)
    assert weights[1] == pytest.approx(-0.05, rel=0.1)
    assert weights[3] == 0.0, "what does not vary says nothing"
    assert preference(given, wanted, there, rng.normal(size=4)) == pytest.approx(weights, abs=1e-3)


def test_lists_are_the_best_items_with_what_their_scores_are_made_of(trained, dataset):
    model, recipe, state, _ = trained
    lists = item_lists(model, dataset, recipe, state)
    asked = evaluation_requests(dataset, "valid", "new", 600)
    corpus, runner = corpus_of(model, dataset, state), TorchRunner(model)
    index, scorer = corpus.index, LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, runner)
    eligible = asked.eligible(slice(None))[:, index.row_of_position]
    best = exhaustive(index, scorer, asked.users, 20, recipe.schema.rank, MaskFilter(index, eligible))
    assert lists.monn.shape == (len(asked), 20, 3)
    np.testing.assert_array_equal(lists.there.sum(1), best.valid)
    wanted = [np.isin(index.row_of_position[row], own) for row, own in zip(best.positions, asked.wanted)]
    np.testing.assert_array_equal(lists.wanted, np.stack(wanted) & lists.there)
    assert lists.wanted.any()
    z = weighed(model, lists)
    said = 1 / (1 + np.exp(-z - model.ensemble[-1].bias[0].item()))
    np.testing.assert_allclose(said[lists.there], best.probabilities[..., 0][lists.there], rtol=1e-4)


def test_what_requests_want_comes_first_and_labels_still_set_the_scale(trained, dataset):
    model, recipe, state, values = trained
    lists = item_lists(model, dataset, recipe, state)
    before, others = surprise(model, lists), [p.clone() for p in model.ensemble[:-1].state_dict().values()]
    conversion = [p[..., 1].clone() for p in model.ensemble[-1].state_dict().values()]
    fit_items(model, lists, values(), RANK)
    after = surprise(model, lists)
    rows = pointwise_report(values(), np.array([0.3, 0.1]), "ab")
    assert all(abs(row["calibration"] - 1) < 1e-3 for row in rows)
    assert all(torch.equal(p, q) for p, q in zip(model.ensemble[:-1].state_dict().values(), others))
    kept = [p[..., 1] for p in model.ensemble[-1].state_dict().values()]
    assert all(torch.equal(p, q) for p, q in zip(kept, conversion)), (
        "requests want what the first task calls so"
    )
    assert after < before


def test_without_anything_to_go_by_nothing_changes(trained, dataset, make_recipe, tmp_path):
    model, recipe, state, values = trained
    lists, seen = item_lists(model, dataset, recipe, state), values()
    before = [p.clone() for p in model.ensemble.state_dict().values()]
    rated = make_recipe(train={"order": "labels"})
    assert item_lists(model, dataset, rated, state) is None, "not asked for"
    fit_items(model, None, seen, RANK)
    fit_items(model, lists, seen, np.array([0.0, 1.0]))
    fit_items(model, replace(lists, wanted=np.zeros_like(lists.wanted)), seen, RANK)
    fit_items(model, lists, replace(seen, labels=seen.labels * 0), RANK)
    assert all(torch.equal(p, q) for p, q in zip(model.ensemble.state_dict().values(), before))
    nobody = replace(dataset, valid=replace(dataset.valid, labels=np.zeros_like(dataset.valid.labels)))
    assert item_lists(model, nobody, recipe, state) is None
    flat = make_recipe(
        model={"layers": ["two_tower_xs"], "codebooks": []},
        train={"pool": 40, "negatives": 4, "unlabelled": 0, "order": "requests"},
    )
    alone = Trainer(flat, dataset, tmp_path / "flat", progress=False)
    assert item_lists(alone.model, dataset, flat, state) is None, "one logit has one order"
    with pytest.raises(ValueError, match="fit_items: expected values with their parts"):
        fit_items(model, lists, replace(seen, monn=None), RANK)


def test_a_run_is_calibrated_in_the_order_of_its_recipe_and_anew_in_another(
    trained, dataset, make_recipe, tmp_path, monkeypatch
):
    """Items first, then the nodes by the order that items have; labels again give what they gave."""
    _, recipe, _, _ = trained
    monkeypatch.setattr("hsnn_train.beam.BEST", 10)  # or every node would hold one
    by_labels = make_recipe(
        model={"layers": ["small", "small", "small"]},
        train={"max_steps": 60, "pool": 40, "negatives": 4, "unlabelled": 0},
        search={"candidates": "new"},
    )

    def ensembles(recipe):
        train_and_evaluate(recipe, dataset, tmp_path / "run", resume=True, evaluate=False)
        return [p.clone() for p in load_run(tmp_path / "run").model.ensemble.state_dict().values()]

    labels = ensembles(by_labels)
    requests = ensembles(recipe)
    assert not any(torch.equal(p[..., 0], q[..., 0]) for p, q in zip(labels, requests)), (
        "every layer's first task"
    )
    assert all(torch.equal(p, q) for p, q in zip(ensembles(recipe), requests)), "as it was"
    assert all(torch.equal(p, q) for p, q in zip(ensembles(by_labels), labels)), "from what training left"
