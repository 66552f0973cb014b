"""HSNN: gradients of the joint index, the ensemble, and one forward pass for training and serving."""

import numpy as np
import pytest
import torch

from hsnn_core.errors import SchemaError
from hsnn_core.scorer import LayerScorer
from hsnn_train.batches import step_rng
from hsnn_train.checkpoint import make_model
from hsnn_train.ensemble import LayerEnsemble
from hsnn_train.losses import layered
from hsnn_train.refresh import index_vectors, refresh, residual_kmeans
from hsnn_train.retrieval import corpus_of
from hsnn_train.runner import TorchRunner
from hsnn_train.trainer import Trainer, make_batches


@pytest.fixture
def world(dataset, make_recipe):
    torch.manual_seed(0)
    recipe = make_recipe(model={"layers": ["small", "medium", "small"]})
    model = make_model(recipe, dataset.transform)
    for ensemble in model.ensemble:
        ensemble.crossing.normal_()  # as after calibration
    v = index_vectors(model, dataset.items)
    model.lti.set_codebooks(residual_kmeans(v, model.lti.sizes, 0))
    state, _ = refresh(model, dataset.items, dataset.item_keys)
    batches = make_batches(dataset, recipe)
    return model, state, batches


def gradient_of(loss, parameters):
    return sum(0.0 if g is None else g.abs().sum().item() for g in
               torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True))  # fmt: skip


def test_index_supervision_reaches_codebooks_and_item_tower(world, dataset):
    model, state, batches = world
    batch = batches.make(dataset.train, np.arange(32), state, step_rng(0, 0))
    out = model(batch, alpha=2.0)
    weights = torch.ones(2)
    labels, told = batch.pairs.labels, batch.pairs.labelled.unsqueeze(-1).expand(-1, -1, 2)
    item_tower = list(model.trunk(3).item_vector.parameters())
    of = batch.pairs.of.unsqueeze(-1).expand(-1, -1, 2)
    chosen = [logits.gather(1, of) for logits in model.index_logits(out.embedded)]
    index_loss = layered(chosen, labels, told, weights)
    assert gradient_of(index_loss, model.lti.codebook) > 0
    assert gradient_of(index_loss, item_tower) > 0
    node_loss = layered(out.logits[:2], labels, told, weights)
    assert gradient_of(node_loss, model.lti.codebook) > 0, "supervision of the node layers shapes the index"
    assert gradient_of(node_loss, item_tower) > 0
    assert model(batch, alpha=None).embedded.lti is None


def test_interaction_pull_moves_only_the_index_layers(world, dataset):
    model, state, batches = world
    batch = batches.make(dataset.train, np.arange(16), state, step_rng(0, 0))
    out = model(batch, alpha=2.0)
    pull = model.interaction_pull(out.interactions)
    assert pull.item() > 0
    assert gradient_of(pull, model.layer(1).interaction.parameters()) > 0
    assert gradient_of(pull, model.layer(2).interaction.parameters()) > 0
    assert gradient_of(pull, model.layer(3).interaction.parameters()) == 0


def test_layer_ensemble_is_a_linear_form_per_task():
    ensemble = LayerEnsemble(2, 2)
    with torch.no_grad():
        ensemble.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
        ensemble.bias.copy_(torch.tensor([0.5, 0.0]))
    logits = torch.tensor([[[[1.0, 10.0], [2.0, 20.0]]]])  # layers x tasks
    assert ensemble(logits).tolist() == [[[1 + 6 + 0.5, 20 - 20]]]


def test_training_forward_with_hard_codes_equals_serving_scores(world, dataset):
    """The forward pass that trains and the layer-wise scorer that serves give the same logits for every pair."""
    model, state, batches = world
    model.eval()
    corpus = corpus_of(model, dataset, state)
    scorer = LayerScorer(corpus.index, corpus.i2if, corpus.embeddings, TorchRunner(model))
    rows = np.array([3, 70])
    candidates = np.array([[5, 9, 60, 5], [0, 119, 7, 33]])
    users = type(dataset.train.users)(dataset.train.users.dense[rows], dataset.train.users.ids[rows])
    batch = batches.assemble(
        users, candidates, state, np.zeros((2, 4, 2), np.float32), np.ones((2, 4), np.float32), np.full(2, -1)
    )
    with torch.inference_mode():
        trained = model(batch, None)
    opened = scorer.open(users)
    position_of_row = np.empty(len(dataset.item_keys), np.int64)
    position_of_row[corpus.index.row_of_position] = np.arange(len(dataset.item_keys))
    positions = position_of_row[candidates]
    previous = np.zeros((2, 4, 0), np.float32)
    for layer in (1, 2, 3):
        monn, logits = scorer.score(
            opened, layer, corpus.index.ancestors(layer)[positions].astype(np.int64), previous
        )
        np.testing.assert_allclose(monn, trained.monn[layer - 1].numpy(), atol=2e-5)
        np.testing.assert_allclose(logits, trained.logits[layer - 1].numpy(), atol=2e-5)
        previous = np.concatenate([previous, monn], axis=-1)


def test_upper_layers_see_the_representative_not_the_item(world, dataset):
    """Two items of one node get the same scores above the item layer, whatever their own features."""
    model, state, batches = world
    model.eval()
    node = np.unique(state.paths, axis=0, return_inverse=True)[1].reshape(-1)
    crowded = np.flatnonzero(np.bincount(node) >= 2)[0]
    a, b = np.flatnonzero(node == crowded)[:2]
    users = type(dataset.train.users)(dataset.train.users.dense[:1], dataset.train.users.ids[:1])
    batch = batches.assemble(
        users,
        np.array([[a, b]]),
        state,
        np.zeros((1, 2, 2), np.float32),
        np.ones((1, 2), np.float32),
        np.full(1, -1),
    )
    with torch.inference_mode():
        out = model(batch, None)
    for layer in (0, 1):
        assert torch.allclose(out.monn[layer][0, 0], out.monn[layer][0, 1])
    assert not torch.allclose(out.monn[2][0, 0], out.monn[2][0, 1])


def test_matches_of_items_without_a_training_positive_say_only_that_they_match(dataset, make_recipe):
    model = make_model(make_recipe(), dataset.transform)
    counts = dataset.item_counts.copy()
    counts[[2, 5]] = 0
    model.set_items(dataset.items, counts)
    for number in (1, 2):
        table = model.layer(number).interaction.tables.weight("item")
        cold = [2 + 2, 2 + 5]  # ids begin after padding and unknown
        assert not table[cold].any()
        assert table[[2 + 3, 2 + 4]].abs().sum(-1).min() > 0


def test_items_of_few_training_positives_share_the_unknown_ids_embedding(dataset, make_recipe, tmp_path):
    least = int(np.median(dataset.item_counts))
    few = dataset.item_counts < least
    assert 0 < few.sum() < len(few)
    recipe = make_recipe(model={"min_positives": least})
    model = Trainer(recipe, dataset, tmp_path / "run", progress=False).model
    alias = model.trunks[0].lookup.alias[2:].numpy()
    assert np.array_equal(alias, np.where(few, 1, 2 + np.arange(len(few))))
    for number in (1, 2):
        table = model.layer(number).interaction.tables.weight("item")
        assert not table[2:][few].any()
        (table * torch.rand_like(table)).sum().backward()
        assert not table.grad[2:][few].any(), "and what they match stays so"
        assert table.grad[2:][~few].any(1).all()
    with pytest.raises(
        SchemaError, match="model.min_positives: got 0, expected a whole number of at least 1"
    ):
        make_recipe(model={"min_positives": 0})


@pytest.mark.parametrize("layers", [["small"], ["two_tower_xs"], ["small", "two_tower_xs"], ["small"] * 4])
def test_any_depth_runs(dataset, make_recipe, layers):
    recipe = make_recipe(
        model={"layers": layers, "codebooks": [4] * (len(layers) - 1)},
        search={"widths": [3] * (len(layers) - 1)},
    )
    model = make_model(recipe, dataset.transform)
    state, index = refresh(model, dataset.items, dataset.item_keys)
    assert index.layers == len(layers)
    out = model(make_batches(dataset, recipe).make(dataset.train, np.arange(8), state, step_rng(0, 0)), 1.0)
    assert len(out.logits) == len(layers)
    assert out.logits[-1].shape == (8, 2, 2)


def test_a_schema_without_interactions_works(make_recipe):
    from tiny_world import SCHEMA, tables

    from hsnn_core.schema import Schema
    from hsnn_train.data.dataset import build_dataset
    from hsnn_train.data.splits import Split

    schema = Schema.from_dict({k: v for k, v in SCHEMA.items() if k != "interactions"})
    log = tables()
    plain = build_dataset(schema, type(log)(schema, log.impressions, log.users, log.items),
                          Split.from_dict({"by": "time"}), 1)  # fmt: skip
    recipe = make_recipe(schema={"interactions": {}})
    model = make_model(recipe, plain.transform)
    state, _ = refresh(model, plain.items, plain.item_keys)
    out = model(make_batches(plain, recipe).make(plain.train, np.arange(8), state, step_rng(0, 0)), 1.0)
    assert out.logits[-1].shape == (8, 2, 2)
    assert model.interaction_pull(out.interactions).item() == 0.0


def test_layers_and_codebooks_must_fit(dataset, make_recipe):
    with pytest.raises(SchemaError, match="got 3 layers and 1 index layers; expected one index layer"):
        make_model(make_recipe(model={"codebooks": [4]}), dataset.transform)
