"""Mixture of logits: the formula, the gates, the split into user-only work, and the export."""

import numpy as np
import onnxruntime
import pytest
import torch

from hsnn_train.mol import TEMPERATURE, MoLOverArch
from hsnn_train.presets import OverArchConfig

NU, M, D, T, K = 3, 2, 4, 2, 3


@pytest.fixture
def mol():
    torch.manual_seed(0)
    return MoLOverArch(NU, M, D, T, OverArchConfig(kind="mol", tokens=K, hidden=8)).eval()


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return torch.randn(2, NU, D), torch.randn(2, 5, M, D)


def test_equals_a_loop_over_pairs_of_components(mol, tokens):
    user, pair = tokens
    out = mol(user, pair)
    assert out.shape == (2, 5, T)
    silu = torch.nn.functional.silu
    for b in range(2):
        u = user[b].reshape(-1)
        for c in range(5):
            i = pair[b, c].reshape(-1)
            f, g = mol.user_components(u).reshape(K, D), mol.item_components(i).reshape(K, D)
            delta = torch.stack(
                [torch.cosine_similarity(f[a], g[q], dim=0) for q in range(K) for a in range(K)]
            )
            mixed = silu(mol.user_gate(u) * mol.item_gate(i) + mol.cross_gate(delta)).reshape(T, K * K)
            for t in range(T):
                expected = (torch.softmax(mixed[t], 0) * delta).sum() / TEMPERATURE
                assert out[b, c, t].item() == pytest.approx(expected.item(), abs=1e-4)


def test_gates_sum_to_one_over_the_components_and_vary_with_user_item_and_component(mol, tokens):
    delta, gates = mol.mixture(*tokens)
    assert gates.shape == (2, 5, T, K * K) and delta.shape == (2, 5, K * K)
    assert torch.allclose(gates.sum(-1), torch.ones(2, 5, T), atol=1e-6)
    for axis in range(4):
        assert gates.std(axis).min() > 1e-5
    assert delta.abs().max() <= 1 + 1e-6


def test_work_of_the_user_alone_is_done_once_per_user(mol, tokens):
    user, pair = tokens
    calls = []
    mol.user_gate.register_forward_hook(lambda module, inputs, out: calls.append(tuple(out.shape)))
    mol.user_components.register_forward_hook(lambda module, inputs, out: calls.append(tuple(out.shape)))
    split = mol(user, pair)
    assert calls == [(2, K * D), (2, T * K * K)]
    joint = mol(user.repeat_interleave(5, 0), pair.flatten(0, 1).unsqueeze(1)).reshape(2, 5, T)
    assert torch.allclose(split, joint, atol=1e-5)


def test_every_parameter_gets_a_gradient_and_a_zero_embedding_no_nan(mol, tokens):
    user, pair = tokens
    mol(user, pair).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in mol.parameters())
    with torch.no_grad():
        mol.user_components.bias.zero_()
    assert torch.isfinite(mol(torch.zeros_like(user), pair)).all()


def test_traces_to_onnx_with_free_batch_and_candidates_and_the_same_numbers(mol, tokens, tmp_path):
    path = tmp_path / "mol.onnx"
    torch.onnx.export(
        mol, tokens, str(path), dynamo=False, opset_version=20, input_names=["user", "pair"],
        output_names=["logits"], dynamic_axes={"user": {0: "B"}, "pair": {0: "B", 1: "C"}, "logits": {0: "B", 1: "C"}},
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    torch.manual_seed(2)
    user, pair = torch.randn(4, NU, D), torch.randn(4, 7, M, D)
    (found,) = session.run(None, {"user": user.numpy(), "pair": pair.numpy()})
    np.testing.assert_allclose(found, mol(user, pair).detach().numpy(), atol=2e-5)
