"""Node layers' ensembles, fitted to what the beam is for."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hsnn_core.exhaustive import exhaustive
from hsnn_core.item_filter import MaskFilter
from hsnn_core.scorer import LayerScorer
from hsnn_train.beam import fit_beam, node_pairs, order
from hsnn_train.calibration import fit
from hsnn_train.data.requests import evaluation_requests
from hsnn_train.evaluate import pointwise_report
from hsnn_train.retrieval import corpus_of, retrieval
from hsnn_train.runner import TorchRunner
from hsnn_train.trainer import Trainer


@pytest.fixture
def trained(calibrated, make_recipe, monkeypatch):
    """A calibrated model, its recipe, the index it ends with, and what it says of validation. The best are ten: a
    hundred would be all of this world's items."""
    monkeypatch.setattr("hsnn_train.beam.BEST", 10)
    recipe = make_recipe(train={"max_steps": 60}, search={"candidates": "new"})
    model, state, values = calibrated(recipe)
    return model, recipe, state, values


def test_the_order_is_that_of_what_tells_nodes_apart():
    rng = np.random.default_rng(0)
    given = rng.random((4000, 3)) * [1.0, 50.0, 0.0] + [0.0, 0.0, 7.0]
    z = 8 * given[:, 0] - 0.1 * given[:, 1] - 3
    weights = order(given, rng.random(4000) < 1 / (1 + np.exp(-z)))
    assert weights[:2] == pytest.approx([8, -0.1], rel=0.15)
    assert weights[2] == 0.0, "what does not vary says nothing"


def test_pairs_are_what_the_search_is_given_and_what_exhaustive_search_finds(trained, dataset, monkeypatch):
    model, recipe, state, _ = trained
    monkeypatch.setattr("hsnn_train.beam.REQUESTS", 1)
    pairs = node_pairs(model, dataset, recipe, state)
    corpus, runner = corpus_of(model, dataset, state), TorchRunner(model)
    index, scorer = corpus.index, LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, runner)
    asked = evaluation_requests(dataset, "valid", "new", 1)
    eligible = asked.eligible(slice(0, 1))[:, index.row_of_position]
    best = exhaustive(index, scorer, asked.users, 10, recipe.schema.rank, MaskFilter(index, eligible))
    assert len(pairs) == 2 and best.valid[0] == 10
    users, carried = scorer.open(asked.users), np.zeros((1, index.nodes(1), 0), np.float32)
    for layer, of_layer in enumerate(pairs, start=1):
        every = np.arange(index.nodes(layer))[None]
        monn, logits = scorer.score(users, layer, every, carried)
        carried = np.concatenate([carried, monn], axis=2)[:, index.parents(layer + 1)]
        ancestors = index.ancestors(layer)
        alive, holders = np.unique(ancestors[eligible[0]]), np.unique(ancestors[best.positions[0]])
        given = torch.from_numpy(of_layer.monn), torch.from_numpy(of_layer.crossings)
        said = model.ensemble[layer - 1](*given).detach().numpy()
        # In the order of the pairs: those that hold any, by their number, then the others.
        assert np.allclose(said[of_layer.holds], logits[0, holders], atol=1e-5)
        assert np.allclose(np.sort(said, 0), np.sort(logits[0, alive], 0), atol=1e-5)


def test_nodes_that_hold_the_best_items_come_first_and_labels_still_set_the_scale(trained, dataset):
    model, recipe, state, values = trained
    pairs = node_pairs(model, dataset, recipe, state)

    def surprise():
        """Log loss of who holds the best, after the best scale and shift, per layer."""
        losses = []
        for ensemble, of_layer in zip(model.ensemble, pairs):
            z = ensemble(torch.from_numpy(of_layer.monn), torch.from_numpy(of_layer.crossings))[:, 0]
            z, y = z.detach().numpy().astype(np.float64), of_layer.holds.astype(np.float64)
            scale, _, shift = fit(z, np.empty((len(z), 0)), y)
            losses.append(np.mean(np.logaddexp(0, scale * z + shift) - y * (scale * z + shift)))
        return np.array(losses)

    before, items = surprise(), [p.clone() for p in model.ensemble[-1].state_dict().values()]
    fit_beam(model, pairs, values(), recipe.schema.rank)
    assert (surprise() < 0.95 * before).all()
    assert all(torch.equal(p, q) for p, q in zip(model.ensemble[-1].state_dict().values(), items))
    rows = pointwise_report(values(), np.array([0.3, 0.1]), "ab")
    assert all(abs(row["calibration"] - 1) < 1e-3 for row in rows)
    after = surprise()
    fit_beam(model, node_pairs(model, dataset, recipe, state), values(), recipe.schema.rank)
    assert surprise() == pytest.approx(after), "a second fit changes nothing"


def test_a_narrow_beam_keeps_more_of_what_exhaustive_search_finds(trained, dataset, make_recipe):
    model, recipe, state, values = trained
    narrow = make_recipe(train={"max_steps": 60}, search={"candidates": "new", "widths": [2, 4], "max_k": 10})

    def kept():
        return retrieval(model, dataset, narrow, state, "test")["search_recall"]["@10"]

    before = kept()
    fit_beam(model, node_pairs(model, dataset, recipe, state), values(), recipe.schema.rank)
    assert kept() > before + 0.05


def test_what_cannot_be_told_is_left_alone(trained, dataset, make_recipe, tmp_path):
    model, recipe, state, values = trained
    seen, before = values(), [p.clone() for p in model.ensemble.state_dict().values()]
    rank = recipe.schema.rank
    all_hold = [replace(p, holds=np.ones_like(p.holds)) for p in node_pairs(model, dataset, recipe, state)]
    fit_beam(model, all_hold, seen, rank)
    fit_beam(model, node_pairs(model, dataset, recipe, state), replace(seen, labels=seen.labels * 0), rank)
    few = np.arange(len(all_hold[0].holds)) < 29
    fit_beam(model, [replace(all_hold[0], holds=few)], seen, rank)
    fit_beam(model, [replace(all_hold[0], holds=~few)], seen, rank)
    labels = np.zeros_like(dataset.valid.labels)
    nobody = replace(dataset, valid=replace(dataset.valid, labels=labels))
    assert node_pairs(model, nobody, recipe, state) == []
    fit_beam(model, [], seen, rank)
    assert all(torch.equal(p, q) for p, q in zip(model.ensemble.state_dict().values(), before))
    one_layer = make_recipe(model={"layers": ["small"], "codebooks": []})
    flat = Trainer(one_layer, dataset, tmp_path / "flat", progress=False)
    assert node_pairs(flat.model, dataset, one_layer, state) == []
    with pytest.raises(ValueError, match="fit_beam: expected values with their parts"):
        fit_beam(model, all_hold, replace(seen, monn=None), rank)


def test_a_task_that_ranks_nothing_stays_with_its_labels(trained, dataset):
    model, recipe, state, values = trained
    before = (
        [e.weight[:, 1].clone() for e in model.ensemble],
        [e.crossing[:, 1].clone() for e in model.ensemble],
    )
    first = model.ensemble[0].weight[0, 0].item()
    fit_beam(model, node_pairs(model, dataset, recipe, state), values(), np.array([1.0, 0.0]))
    for ensemble, weight, crossing in zip(model.ensemble, *before):
        assert torch.equal(ensemble.weight[:, 1], weight) and torch.equal(ensemble.crossing[:, 1], crossing)
    assert model.ensemble[0].weight[0, 0].item() != first


def test_of_nodes_without_any_of_the_best_some_are_drawn(trained, dataset, monkeypatch):
    model, recipe, state, _ = trained
    every = node_pairs(model, dataset, recipe, state)
    monkeypatch.setattr("hsnn_train.beam.OTHER_NODES", 2)
    requests = len(evaluation_requests(dataset, "valid", "new", 100))
    for some, of_layer in zip(node_pairs(model, dataset, recipe, state), every):
        assert some.holds.sum() == of_layer.holds.sum()
        assert 0 < (~some.holds).sum() <= min(2 * requests, (~of_layer.holds).sum())
        assert len(some.monn) == len(some.crossings) == len(some.holds)
