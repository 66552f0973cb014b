"""OverArch: the split evaluation equals the joint one, and every module's formula."""

import pytest
import torch

from hsnn_train.overarch import (
    AttentionModule,
    CrossModule,
    DHENOverArch,
    EnsembleLayer,
    FMModule,
    InnerProduct,
    SplitLinear,
)  # fmt: skip
from hsnn_train.presets import OverArchConfig

ALL = ("fm", "cross", "mlp", "attention")


def test_split_linear_is_a_linear_layer_over_all_tokens():
    layer = SplitLinear(2, 3, 4, 5)
    user, pair = torch.randn(2, 2, 4), torch.randn(2, 7, 3, 4)
    flat = torch.cat([user.unsqueeze(1).expand(-1, 7, -1, -1), pair], 2).flatten(-2)
    weight = torch.cat([layer.user.weight, layer.pair.weight], 1)
    assert torch.allclose(layer(user, pair), flat @ weight.T + layer.pair.bias, atol=1e-6)


def test_fm_module_sees_every_pairwise_dot_product():
    module = FMModule(2, 1, 2, 1)
    user = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]])
    pair = torch.tensor([[[[3.0, -1.0]]]])
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.out.weight[0] = torch.tensor([1.0, 10.0, 100.0])  # item.item, item.user0, item.user1
        module.user_out.weight[1] = torch.tensor([1.0, 10.0, 100.0])  # user pairs (0,0), (0,1), (1,1)
    scale = 2**-0.5
    out = module(user, pair)[0, 0]
    assert out[0].item() == pytest.approx(scale * (10.0 + 10 * (3 - 2) + 100 * -1), rel=1e-6)
    assert out[1].item() == pytest.approx(scale * (5.0 + 10 * 2 + 100 * 1), rel=1e-6)


def test_cross_module_is_a_product_of_two_linear_forms():
    module = CrossModule(1, 1, 2, 1, rank=1)
    user, pair = torch.randn(1, 1, 2), torch.randn(1, 1, 1, 2)
    left, right = module.left(user, pair), module.right(user, pair)
    assert torch.allclose(module(user, pair), (left * right) @ module.out.weight.T + module.out.bias)


def test_attention_over_split_tokens_equals_attention_over_their_concatenation():
    torch.manual_seed(0)
    module = AttentionModule(3, 2, 8, 2, heads=2, feed_forward=6)
    user, pair = torch.randn(2, 3, 8), torch.randn(2, 4, 2, 8)
    tokens = torch.cat([pair, user.unsqueeze(1).expand(-1, 4, -1, -1)], 2)
    q = module._heads(module.q(pair)) * 4**-0.5
    key, value = (module._heads(t) for t in module.kv(tokens).chunk(2, -1))
    weights = torch.softmax(q @ key.transpose(-1, -2), -1)
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights.sum(-1)), atol=1e-6)
    assert weights.std(-1).min() > 0
    mixed = (weights @ value).transpose(-2, -3).flatten(-2) + pair
    mixed = mixed + module.feed_forward(mixed)
    mixed = module.mix(mixed.transpose(-1, -2)).transpose(-1, -2)
    assert torch.allclose(module(user, pair), module.out(mixed).flatten(-2), atol=1e-5)


def test_ensemble_layer_adds_the_shortcut_before_the_norm():
    layer = EnsembleLayer(1, 2, 4, OverArchConfig(modules=("mlp",), tokens=2, hidden=3))
    with torch.no_grad():
        layer.project.weight.zero_()
        layer.project.bias.zero_()
        layer.shortcut.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        layer.user_shortcut.weight.copy_(torch.tensor([[1.0], [0.0]]))
    user, pair = torch.randn(1, 1, 4), torch.randn(1, 3, 2, 4)
    expected = torch.stack([pair[:, :, 0] + user, pair[:, :, 1]], 2)
    assert torch.allclose(layer(user, pair), layer.norm(expected), atol=1e-6)


def test_a_user_scores_each_node_alone():
    """Scores of a node do not depend on which other nodes, or users, are in the call."""
    torch.manual_seed(0)
    over = DHENOverArch(3, 2, 8, 2, OverArchConfig(layers=2, tokens=2, modules=ALL, hidden=8, heads=2)).eval()
    user, pair = torch.randn(3, 3, 8), torch.randn(3, 5, 2, 8)
    together = over(user, pair)
    assert together.shape == (3, 5, 2)
    alone = over(user[1:2], pair[1:2, 2:3])
    assert torch.allclose(together[1, 2], alone[0, 0], atol=1e-5)


def test_inner_product_is_scaled_per_task_and_the_same_for_lists_and_for_a_pool():
    dot = InnerProduct(4, 2)
    with torch.no_grad():
        dot.log_scale.copy_(torch.log(torch.tensor([1.0, 2.0])))
        dot.bias.copy_(torch.tensor([0.0, 1.0]))
    vectors = torch.tensor([[[1.0, 2, 0, 1], [1.0, 0, 0, 0]]])  # one user, two tasks
    nodes = torch.tensor([[3.0, 1, 9, -1], [4.0, 0, 0, 0]])
    expected = torch.tensor([[[4 / 4, 2 * 3 / 4 + 1], [4 / 4, 2 * 4 / 4 + 1]]])
    assert torch.allclose(dot(vectors, nodes.unsqueeze(0)), expected)
    assert torch.allclose(dot.against(vectors, nodes), expected)


@pytest.mark.parametrize("bad", [{"modules": ("fn",)}, {"modules": ("attention",), "heads": 3}])
def test_bad_overarch_configurations_are_named(bad):
    with pytest.raises(ValueError, match="OverArch module: got 'fn'|attention heads must divide the width"):
        EnsembleLayer(1, 1, 4, OverArchConfig(**bad))
