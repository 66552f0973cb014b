"""Losses and metrics by hand."""

import math

import numpy as np
import pytest
import torch

from hsnn_train.losses import distil, layered, supervised, told
from hsnn_train.metrics import calibration, ndcg_at, normalised_entropy, recall_at, search_recall


def ce(p: float, y: float) -> float:
    return -(y * math.log(p) + (1 - y) * math.log(1 - p))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_supervised_loss_is_eq_1_over_labelled_pairs():
    logits = torch.tensor([[[logit(0.8), logit(0.3)], [logit(0.5), logit(0.9)]]])
    labels = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    weights = torch.tensor([1.0, 2.0])
    one = ce(0.8, 1) + 2 * ce(0.3, 0)
    two = ce(0.5, 1) + 2 * ce(0.9, 1)
    everything = torch.ones(1, 2, 2)
    assert supervised(logits, labels, everything, weights).item() == pytest.approx((one + two) / 2, rel=1e-5)
    first = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert supervised(logits, labels, first, weights).item() == pytest.approx(one, rel=1e-5)
    each_its_own = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])
    expected = (ce(0.8, 1) + ce(0.5, 1)) / 2 + 2 * ce(0.3, 0)
    assert supervised(logits, labels, each_its_own, weights).item() == pytest.approx(expected, rel=1e-5)
    assert supervised(logits, labels, torch.zeros(1, 2, 2), weights).item() == 0.0


def test_a_label_tells_something_where_the_task_that_it_is_given_has_a_label_of_1():
    given = torch.tensor([2, 0, -1])  # a click given an impression, a conversion given a click, an impression
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    labelled = torch.tensor([1.0, 1.0, 1.0, 0.0])  # the third was drawn, of the fourth nothing is known
    expected = [[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert told(labels, labelled, given).tolist() == expected
    assert told(labels, labelled, torch.full((3,), -1)).tolist() == [[v] * 3 for v in labelled.tolist()]


def test_distil_is_eq_2_with_a_constant_teacher():
    student = torch.tensor([[[logit(0.6)]]], requires_grad=True)
    teacher = torch.tensor([[[logit(0.25)]]], requires_grad=True)
    loss = distil(student, teacher, torch.ones(1, 1), torch.ones(1))
    assert loss.item() == pytest.approx(ce(0.6, 0.25), rel=1e-5)
    loss.backward()
    assert student.grad.item() == pytest.approx(0.6 - 0.25, rel=1e-4)
    assert teacher.grad is None


def test_layered_loss_is_eq_4_the_sum_over_layers():
    logits = [torch.tensor([[[logit(p)]]]) for p in (0.7, 0.2)]
    args = (torch.ones(1, 1, 1), torch.ones(1, 1, 1), torch.ones(1))
    assert layered(logits, *args).item() == pytest.approx(ce(0.7, 1) + ce(0.2, 1), rel=1e-5)


def test_normalised_entropy_uses_the_training_base_rate():
    logits = np.array([logit(0.8), logit(0.3), logit(0.1)])
    labels = np.array([1.0, 0.0, 0.0])
    model = (ce(0.8, 1) + ce(0.3, 0) + ce(0.1, 0)) / 3
    constant = (ce(0.25, 1) + 2 * ce(0.25, 0)) / 3
    assert normalised_entropy(logits, labels, 0.25) == pytest.approx(model / constant)
    always = np.full(3, logit(0.25))
    assert normalised_entropy(always, labels, 0.25) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="base rate 0"):
        normalised_entropy(logits, labels, 0)


def test_calibration_is_predicted_over_observed():
    assert calibration(np.array([logit(0.5), logit(0.7)]), np.array([1.0, 0.0])) == pytest.approx(1.2)


def test_recall_and_ndcg_by_hand():
    ids = np.array([[5, 3, 9, 1], [2, 4, 0, 0]])
    valid = np.array([4, 2])
    wanted = [np.array([3, 1, 77]), np.array([0])]
    assert recall_at(ids, valid, wanted, 2) == pytest.approx((1 / 3 + 0) / 2)
    assert recall_at(ids, valid, wanted, 4) == pytest.approx((2 / 3 + 0) / 2)  # a padded 0 is no hit
    dcg = 1 / math.log2(3) + 1 / math.log2(5)
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert ndcg_at(ids, valid, wanted, 4) == pytest.approx((dcg / ideal + 0) / 2)


def test_search_recall_compares_only_valid_rows():
    found, exact = np.array([[1, 2, 0]]), np.array([[2, 1, 7]])
    assert search_recall(found, np.array([2]), exact, np.array([3])) == pytest.approx(2 / 3)
