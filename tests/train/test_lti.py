"""Learning-To-Index: every formula of Algorithm 1 and Eq. 5-8 against hand-computed values."""

import math

import numpy as np
import pytest
import torch

from hsnn_train.lti import LearnToIndex, alpha_at, index_health, squared_distance, warmup_at
from hsnn_train.refresh import reset_optimizer_rows


def two_layers() -> LearnToIndex:
    lti = LearnToIndex([2, 2], 2, pool=3)
    lti.set_codebooks([torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, -1.0]])])
    lti.scale_seen.fill_(True)  # scale 1: distances as they are
    return lti.eval()


def test_distance_affinity_and_index_embedding_by_hand():
    lti = two_layers()
    v = torch.tensor([[0.5, 0.0]])
    assert squared_distance(v, lti.codebook[0]).tolist() == [[0.25, 2.25]]
    out = lti(v, alpha=1.0)
    a0 = math.exp(-0.25) / (math.exp(-0.25) + math.exp(-2.25))
    assert out.affinity[0][0].tolist() == pytest.approx([a0, 1 - a0], rel=1e-5)
    assert out.index_embedding[0][0].tolist() == pytest.approx([2 * (1 - a0), 0.0], abs=1e-6)
    assert out.mapping[0].tolist() == [0]
    residual = 0.5 - 2 * (1 - a0)  # Eq. 6
    d = [residual**2 + 1, residual**2 + 1]
    assert squared_distance(torch.tensor([[residual, 0.0]]), lti.codebook[1])[0].tolist() == pytest.approx(d)
    assert out.affinity[1][0].tolist() == pytest.approx([0.5, 0.5])
    assert out.quantised[1][0].tolist() == pytest.approx([2 * (1 - a0), 0.0], abs=1e-6)
    # Eq. 7, mean over the two components
    assert lti.reconstruction_loss(out, v).item() == pytest.approx(residual**2 / 2, rel=1e-4)


def test_soft_assignment_varies_sums_to_one_and_hardens_with_alpha():
    torch.manual_seed(0)
    lti = LearnToIndex([8], 4).eval()
    v = torch.randn(32, 4)
    soft, hard = lti(v, 0.5).affinity[0], lti(v, 200.0).affinity[0]
    assert torch.allclose(soft.sum(-1), torch.ones(32), atol=1e-5)
    assert soft.std(0).min() > 0
    assert soft.max() < 0.999
    assert hard.max(-1).values.mean() > 0.95
    assert torch.equal(hard.argmax(-1), lti(v, 1.0).mapping[0])


def test_alpha_schedule_is_eq_8_and_clamps():
    assert alpha_at(0, 100, 20.0, 2.0) == 0.0
    assert alpha_at(50, 100, 20.0, 2.0) == 5.0
    assert alpha_at(100, 100, 20.0, 2.0) == alpha_at(900, 100, 20.0, 2.0) == 20.0
    assert alpha_at(0, 100, 20.0, 0.0) == 20.0  # exponent 0: the schedule is off


def test_warmup_is_linear_and_can_be_switched_off():
    assert [warmup_at(i, 10, 4) for i in (9, 10, 11, 13, 50)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert [warmup_at(i, 10, 0) for i in (9, 10)] == [0.0, 1.0]


def test_balance_loss_is_one_when_uniform_and_k_when_collapsed():
    lti = LearnToIndex([4], 2, pool=2).train()
    uniform = lti(torch.randn(6, 2), alpha=0.0)
    assert lti.balance_loss(uniform).item() == pytest.approx(1.0)
    lti = LearnToIndex([4], 2, pool=2).train()
    one_hot = uniform._replace(affinity=[torch.tensor([[1.0, 0, 0, 0]]).repeat(6, 1)])
    assert lti.balance_loss(one_hot).item() == pytest.approx(4.0)


def test_balance_loss_pools_recent_batches_with_an_unshrunk_gradient():
    lti = LearnToIndex([2], 2, pool=4).train()
    sample = lti(torch.randn(2, 2), alpha=0.0)

    def loss(share: float) -> tuple[float, torch.Tensor]:
        a = torch.tensor([[share, 1 - share]]).repeat(2, 1).requires_grad_()
        value = lti.balance_loss(sample._replace(affinity=[a]))
        value.backward()
        return value.item(), a.grad

    first, _ = loss(1.0)
    second, gradient = loss(0.0)
    assert first == pytest.approx(2.0)
    assert second == pytest.approx(1.0)  # pooled mean (0.5, 0.5)
    # d/da of K * sum mean^2 = 2 K mean / rows: as large as if the pool were not there
    assert gradient[0].tolist() == pytest.approx([2 * 2 * 0.5 / 2] * 2)
    assert int(lti.pool_at) == 2


def test_pool_and_initialised_flag_are_in_the_state_dict():
    lti = two_layers().train()
    lti.balance_loss(lti(torch.randn(4, 2), 1.0))
    again = LearnToIndex([2, 2], 2, pool=3)
    again.load_state_dict(lti.state_dict())
    assert bool(again.initialised)
    assert torch.equal(again.pool_0, lti.pool_0)
    assert int(again.pool_at) == 1


def test_gradients_reach_codebooks_of_both_layers_and_the_vector():
    lti = two_layers().train()
    v = torch.tensor([[0.4, 0.3], [1.7, -0.2]], requires_grad=True)
    out = lti(v, alpha=1.0)
    out.quantised[-1].sum().backward()
    assert v.grad.abs().sum() > 0
    assert all(c.grad is not None and c.grad.abs().sum() > 0 for c in lti.codebook)


def test_residual_gradient_is_not_zeroed_onward():
    """The second layer's embedding must depend on v through the residual, not be cut off by it."""
    lti = two_layers()
    v = torch.tensor([[0.5, 0.2]], requires_grad=True)
    lti(v, alpha=1.0).index_embedding[1][0, 1].backward()
    assert v.grad[0, 1].abs() > 1e-3


def test_collapse_is_detected_by_hard_occupancy_even_when_the_soft_loss_is_at_its_minimum():
    lti = LearnToIndex([20], 2).train()
    lti.set_codebooks([torch.cat([torch.zeros(1, 2), 10 + torch.rand(19, 2)])])
    out = lti(0.01 * torch.randn(100, 2), alpha=1e-9)
    assert lti.balance_loss(out).item() == pytest.approx(1.0, abs=1e-3)  # blind
    health = index_health(out.mapping[0], 20)
    assert health.collapsed
    assert health.used == 1
    assert health.perplexity == pytest.approx(1.0)
    assert not index_health(torch.arange(100) % 20, 20).collapsed


def test_dead_codewords_are_reset_to_live_residuals():
    lti = LearnToIndex([4], 2)
    lti.set_codebooks([torch.tensor([[0.0, 0.0], [1.0, 1.0], [90.0, 90.0], [80.0, 80.0]])])
    v = torch.cat([torch.randn(50, 2) * 0.1, 1 + torch.randn(50, 2) * 0.1])
    dead = lti.revive(v, torch.Generator().manual_seed(0))[0]
    assert dead.tolist() == [2, 3]
    reborn = lti.codebook[0][2:]
    assert (squared_distance(reborn, v).min(1).values < 1e-9).all()
    assert index_health(lti.eval()(v, 1.0).mapping[0], 4).used == 4


def test_wrong_centroid_shape_is_named():
    with pytest.raises(ValueError, match=r"codebook 1: got shape \(3, 2\), expected \(2, 2\)"):
        LearnToIndex([2], 2).set_codebooks([torch.zeros(3, 2)])


def test_one_temperature_fits_residuals_of_any_size():
    """Affinities do not change when v and the codebooks are scaled, and every layer keeps a scale of its own."""
    torch.manual_seed(0)
    books, v = [torch.randn(4, 3), 0.1 * torch.randn(4, 3)], torch.randn(50, 3)
    found = []
    for factor in (1.0, 100.0):
        lti = LearnToIndex([4, 4], 3).train()
        lti.set_codebooks([factor * book for book in books])
        found.append(lti(factor * v, alpha=3.0).affinity)
        first, second = lti.scale.tolist()
        assert first == pytest.approx((factor * v).square().sum(-1).mean().item(), rel=1e-5)
        assert 0 < second != first
    for small, large in zip(*found):
        assert torch.allclose(small, large, atol=1e-5)


def test_the_reconstruction_moves_the_codebooks_and_not_its_target():
    """At alpha 0 the quantised vector does not depend on v, so no gradient may reach v (docs/log.md: collapse)."""
    lti = two_layers().train()
    v = torch.tensor([[0.4, 0.3], [1.7, -0.2]], requires_grad=True)
    lti.reconstruction_loss(lti(v, alpha=0.0), v).backward()
    assert v.grad is None or v.grad.abs().max() == 0
    assert lti.codebook[0].grad.abs().sum() > 0


def test_a_reborn_codeword_starts_with_fresh_moments():
    codebook = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.AdamW([codebook])
    codebook.sum().backward()
    optimizer.step()
    reset_optimizer_rows(optimizer, codebook, torch.tensor([1]))
    for name in ("exp_avg", "exp_avg_sq"):
        assert (optimizer.state[codebook][name].abs().sum(1) > 0).tolist() == [True, False, True]


def test_health_compares_the_hard_paths_with_where_the_soft_chain_ends():
    lti = LearnToIndex((2, 2), 2, 1)
    lti.set_codebooks([torch.tensor([[0.0, 0.0], [4.0, 0.0]]), torch.tensor([[-1.5, 0.0], [1.5, 0.0]])])
    v = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0], [5.0, 0.0]])
    paths = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    # alpha 0: every soft chain's first step is the mean codeword (2, 0), so the second layer follows v - (2, 0).
    first, second = lti.health(v, paths, 0.0)
    assert first.disagreement == 0.0  # the first layer's distances are those of the hard chain
    assert second.disagreement == 0.5  # items 1 and 2 end at the other codeword
    assert [h.disagreement for h in lti.health(v, paths, None)] == [0.0, 0.0]
    assert lti.training and not bool(lti.scale_seen)
