"""The standard itself: against PyTorch's own cross-entropy, formulas written out by hand, and Python's counting."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from pdl_ext import PowerLaw, functional, reference


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64) * 3
    targets = torch.tensor([0, 6, -100, 3, 3])
    return logits, targets, torch.rand(7, generator=generator) + 0.1


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_weighted_cross_entropy(inputs, reduction):
    logits, targets, weight = inputs
    expected = F.cross_entropy(logits, targets, weight=weight.double(), reduction=reduction)
    torch.testing.assert_close(reference.pdl_loss(logits, targets, weight, reduction=reduction), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_smoothed_cross_entropy(inputs, reduction):
    logits, targets, _ = inputs
    expected = F.cross_entropy(logits, targets, label_smoothing=0.3, reduction=reduction)
    got = reference.pdl_loss(logits, targets, label_smoothing=0.3, reduction=reduction)
    torch.testing.assert_close(got, expected)


def test_one_row_by_hand():
    # z = 2 tanh(3 [0, 1, -1] / 2) + [0, 0.5, 0]; label smoothing 0.3; z-loss 0.1; weight 4 * 0.5.
    z = [2 * math.tanh(3 * x / 2) + offset for x, offset in ((0.0, 0.0), (1.0, 0.5), (-1.0, 0.0))]
    lse = math.log(sum(map(math.exp, z)))
    ce = 0.7 * (lse - z[2]) + 0.1 * sum(lse - value for value in z)
    arguments = {
        "row_weight": torch.tensor([0.5]),
        "logit_offset": torch.tensor([0.0, 0.5, 0.0]),
        "label_smoothing": 0.3,
        "z_loss": 0.1,
        "softcap": 2.0,
        "logit_scale": 3.0,
    }
    logits, targets = torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64), torch.tensor([2])
    for weight, reduction, expected in (
        (4.0, "sum", 2 * ce + 0.1 * lse**2),
        (4.0, "none", 2 * ce + 0.1 * lse**2),
        (4.0, "token_mean", 2 * ce + 0.1 * lse**2),
        (4.0, "mean", ce + 0.1 * lse**2),
    ):
        table = torch.tensor([9.0, 9.0, weight])
        got = reference.pdl_loss(logits, targets, table, reduction=reduction, **arguments)
        assert float(got.sum()) == pytest.approx(expected, rel=1e-12)


def test_reductions_and_normalizer(inputs):
    logits, targets, weight = inputs
    row_weight = torch.tensor([1.0, 2.0, 9.0, 0.5, 1.0])
    each = reference.pdl_loss(logits, targets, weight, row_weight=row_weight, reduction="none")
    total = (weight.double()[targets.clamp(min=0)] * row_weight)[targets != -100].sum()
    keywords = {"row_weight": row_weight}
    torch.testing.assert_close(reference.pdl_loss(logits, targets, weight, **keywords), each.sum() / total)
    by_rows = reference.pdl_loss(logits, targets, weight, reduction="token_mean", **keywords)
    torch.testing.assert_close(by_rows, each.sum() / 4)
    by_number = reference.pdl_loss(logits, targets, weight, normalizer=7.0, **keywords)
    torch.testing.assert_close(by_number, each.sum() / 7)
    assert each[2] == 0


def test_shift_is_slicing(inputs):
    logits, targets, weight = inputs
    got, stats = reference.pdl_loss(logits, targets, weight, shift=True, reduction="none", return_stats=True)
    expected = reference.pdl_loss(logits[:-1], targets[1:], weight, reduction="none")
    assert torch.equal(got, F.pad(expected, (1, 0)))
    assert isinstance(stats, functional.RowStats)
    assert stats.predicted.tolist() == [-1, logits[0].argmax(), -1, logits[2].argmax(), logits[3].argmax()]


def test_differentiable_twice(inputs):
    logits, targets, weight = inputs

    def loss(logits, row_weight):
        options = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 9.0}
        return reference.pdl_loss(logits, targets, weight, row_weight=row_weight, **options)

    arguments = (logits.requires_grad_(), torch.rand(5, dtype=torch.float64).requires_grad_())
    assert torch.autograd.gradcheck(loss, arguments)
    assert torch.autograd.gradgradcheck(loss, arguments)


def test_nothing_to_count_is_zero_with_a_graph(inputs):
    logits, targets, _ = inputs
    loss = reference.pdl_loss(logits.requires_grad_(), torch.full_like(targets, -100), z_loss=0.1)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_token_weights_by_hand():
    counts = torch.tensor([6, 3, 0])
    raw = [(n + 1) / (9 + 3) for n in (6, 3, 0)]
    weights = [(f + 1e-7) ** -0.5 for f in raw]
    mean = (6 * weights[0] + 3 * weights[1]) / 9
    expected = torch.tensor([1 + 0.5 * (w / mean - 1) for w in weights], dtype=torch.float64)
    torch.testing.assert_close(reference.token_weights(counts, PowerLaw(alpha=0.5, blend=0.5)), expected)


def test_count_tokens_is_counting():
    tokens = torch.randint(-3, 12, (200,), generator=torch.Generator().manual_seed(0))
    counter = Counter(tokens.tolist())
    expected = [0 if token == 4 else counter[token] for token in range(9)]
    assert reference.count_tokens(tokens, 9, ignore_index=4).tolist() == expected
