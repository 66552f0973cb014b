"""Tower network: hand-computed AttentionFM, and attention that really attends."""

import pytest
import torch

from hsnn_train.presets import TowerConfig
from hsnn_train.towers import AttentionFM, FieldGate, SequencePool, TowerNetwork, masked_mean


def test_attention_fm_matches_a_hand_computed_value():
    fm = AttentionFM(3, 2)
    with torch.no_grad():
        fm.project.weight.copy_(torch.eye(2))
        fm.project.bias.zero_()
        fm.score.weight.copy_(torch.tensor([[1.0, 0.0]]))
    x = torch.tensor([[[1.0, 2.0], [3.0, 1.0], [0.5, -1.0]]])
    # pairs: (0,1) = [3, 2], (0,2) = [0.5, -2], (1,2) = [1.5, -1]; scores = relu(first) = 3, 0.5, 1.5
    weights = torch.softmax(torch.tensor([3.0, 0.5, 1.5]), 0)
    expected = weights[0] * torch.tensor([3.0, 2.0]) + weights[1] * torch.tensor([0.5, -2.0])
    expected = expected + weights[2] * torch.tensor([1.5, -1.0])
    assert torch.allclose(fm(x)[0], expected)
    assert torch.allclose(fm.pairs(x)[0], torch.tensor([[3.0, 2.0], [0.5, -2.0], [1.5, -1.0]]))


def test_attention_and_gates_sum_to_one_and_vary():
    torch.manual_seed(0)
    x = torch.randn(5, 6, 8)
    fm, gate = AttentionFM(6, 8), FieldGate(6, 8)
    for weights, width in ((fm.weights(fm.pairs(x)), 15), (gate.weights(x), 6)):
        assert weights.shape == (5, width)
        assert torch.allclose(weights.sum(-1), torch.ones(5), atol=1e-6)
        assert weights.std(-1).min() > 1e-4  # over pairs or fields
        assert weights.std(0).min() > 1e-5  # over rows


def test_masked_mean_ignores_padding_and_empty_rows_are_zero():
    values = torch.tensor([[[2.0], [4.0], [100.0]], [[1.0], [1.0], [1.0]]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert masked_mean(values, mask).tolist() == [[3.0], [0.0]]


def test_sequence_pool_attends_within_the_set_positions_by_recency():
    torch.manual_seed(0)
    pool = SequencePool(4, 3)
    with torch.no_grad():
        pool.recency.copy_(torch.tensor([2.0, 0.0, 0.0, 0.0]))  # the most recent id counts more
        for parameter in pool.query.parameters():
            parameter.zero_()
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    weights = pool.weights(torch.randn(2, 4, 3), mask)
    e2 = torch.exp(torch.tensor(2.0))
    assert torch.allclose(weights[0], torch.tensor([1 / (1 + e2), e2 / (1 + e2), 0.0, 0.0]))
    assert weights[1].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert pool.weights(torch.randn(1, 4, 3), torch.ones(1, 4)).sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("fields", [1, 2, 9])
def test_tower_network_shapes_and_gradients(fields):
    tower = TowerNetwork(fields, 8, TowerConfig(3, 5, blocks=2, hidden=7, max_fields=4))
    x = torch.randn(6, fields, 8, requires_grad=True)
    out = tower(x)
    assert out.shape == (6, 3, 5)
    out.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in tower.parameters())


def test_pairs_do_not_grow_with_capped_fields():
    tower = TowerNetwork(100, 4, TowerConfig(1, 4, max_fields=5))
    assert len(tower.blocks[0].fm.left) == 10
