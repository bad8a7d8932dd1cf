"""Three kinds of label smoothing: F.cross_entropy, fairseq's criteria, and the definition of each."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pdl_ext import PDLLoss, functional, reference
from pdl_ext.options import SMOOTHING_WEIGHTS
from pdl_ext.weighting import Adaptive

VOCAB = 101


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_by_class_equals_cross_entropy(make_case, assert_accurate, dtype, smoothing, reduction):
    case = make_case((9,), VOCAB, dtype)
    keywords = {"label_smoothing": smoothing, "reduction": reduction}

    def cross_entropy(logits, targets, weight, row_weight, **options):
        return F.cross_entropy(logits, targets, weight.to(logits.dtype), **options)

    got = case.run(functional.pdl_loss, label_smoothing_weight="class", **keywords)
    plain = case.run(cross_entropy, dtype if dtype != torch.bfloat16 else None, **keywords)
    truth = case.run(cross_entropy, torch.float64, **keywords)
    for name in truth:
        assert_accurate(got[name], plain[name], truth[name], name)


@pytest.mark.parametrize("padded", [False, True])
def test_unweighted_equals_fairseq(make_case, padded):
    # Its criterion spreads epsilon over the other V - 1 classes, and sums.
    case = make_case((9,), VOCAB, torch.float64, token_weight=False, ignored=padded)
    epsilon = 0.1

    def fairseq(logits):
        log_p = torch.log_softmax(logits, -1)
        nll = -log_p.gather(1, case.targets.clamp(min=0).unsqueeze(1)).squeeze(1)
        of_class = epsilon / (VOCAB - 1)
        loss = (1 - epsilon - of_class) * nll - of_class * log_p.sum(-1)
        return loss[case.targets != -100].sum()

    leaf, other = (case.leaf.clone().requires_grad_() for _ in range(2))
    ours = functional.pdl_loss(leaf, case.targets, reduction="sum", label_smoothing=epsilon * VOCAB / (VOCAB - 1))
    published = fairseq(other)
    torch.testing.assert_close(ours, published, rtol=1e-10, atol=0)
    ours.backward()
    published.backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-9, atol=1e-13)


def test_token_level_adaptive_training_as_published(make_case):
    """Its criterion weighs the nll alone, drops some of the weights, and sums."""
    case = make_case((40,), VOCAB, torch.float64, ignored=False)
    counts = torch.arange(1, VOCAB + 1, device=case.leaf.device)
    weighting = Adaptive("exp", normalize="none")
    loss_fn = PDLLoss(
        counts,
        weighting=weighting,
        weight_drop=0.3,
        reduction="sum",
        label_smoothing=0.1,
        label_smoothing_weight="none",
    )
    torch.manual_seed(1)
    leaf, other = (case.leaf.clone().requires_grad_() for _ in range(2))
    ours, stats = loss_fn(leaf, case.targets, return_stats=True)
    weights = functional.token_weights(counts, weighting)[case.targets].double()
    dropped = stats.weight == 1
    assert 0 < (dropped & (weights != 1)).sum() < 30
    weights = torch.where(dropped, 1.0, weights)
    log_p = torch.log_softmax(other, -1)
    nll = -log_p.gather(1, case.targets.unsqueeze(1)).squeeze(1)
    published = (0.9 * weights * nll - 0.1 * log_p.mean(-1)).sum()
    torch.testing.assert_close(ours, published, rtol=1e-10, atol=0)
    ours.backward()
    published.backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("way", SMOOTHING_WEIGHTS)
def test_without_weights_all_ways_are_one(make_case, way):
    case = make_case((9,), VOCAB, token_weight=False, row_weight=True)
    expected = case.run(functional.pdl_loss, label_smoothing=0.1)
    got = case.run(functional.pdl_loss, label_smoothing=0.1, label_smoothing_weight=way)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("way", SMOOTHING_WEIGHTS)
def test_without_smoothing_all_ways_are_one(make_case, way):
    case = make_case((9,), VOCAB, row_weight=True)
    expected = case.run(functional.pdl_loss)
    got = case.run(functional.pdl_loss, label_smoothing_weight=way)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("vocab_size", [3, 67])  # CUDA: outside of vectors, and also in them
def test_a_class_of_weight_0_may_be_masked(device, vocab_size):
    """PyTorch gives NaN here."""
    generator = torch.Generator().manual_seed(0)
    masked = torch.arange(vocab_size, device=device) % 3 == 1
    logits = torch.randn(2, vocab_size, generator=generator).to(device).masked_fill(masked, -math.inf)
    weight = (1 + torch.rand(vocab_size, generator=generator)).to(device).masked_fill(masked, 0)
    targets = torch.tensor([0, 2], device=device)
    for function in (functional.pdl_loss, reference.pdl_loss):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, targets, weight, label_smoothing=0.1, label_smoothing_weight="class")
        loss.backward()
        log_p = torch.log_softmax(logits, -1)
        of_classes = -(log_p * weight)[:, ~masked].sum(-1) / vocab_size
        nll = -log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
        expected = (0.9 * weight[targets] * nll + 0.1 * of_classes).sum() / weight[targets].sum()
        torch.testing.assert_close(loss, expected)
        assert leaf.grad.isfinite().all()
        assert not leaf.grad[:, masked].any()


def test_weights_that_change_before_backward_do_no_harm(make_case):
    case = make_case((9,), VOCAB)
    counts = torch.arange(1, VOCAB + 1, device=case.leaf.device)
    gradients = []
    for changes in (False, True):
        loss_fn = PDLLoss(counts, label_smoothing=0.1, label_smoothing_weight="class")
        leaf = case.leaf.clone().requires_grad_()
        loss = loss_fn(leaf, case.targets)
        if changes:
            loss_fn.blend = 0.5
            loss_fn(case.leaf, case.targets)
        loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.slow
@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("way", SMOOTHING_WEIGHTS)
def test_compiles(make_case, way):
    torch._dynamo.reset()
    case = make_case((6,), VOCAB, row_weight=True)
    compiled = torch.compile(functional.pdl_loss, fullgraph=True, backend="aot_eager")
    options = {"label_smoothing": 0.1, "label_smoothing_weight": way}
    got, expected = (case.run(function, **options) for function in (compiled, functional.pdl_loss))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.devices("cpu", "cuda")
def test_compiles_without_weights(make_case):
    torch._dynamo.reset()
    case = make_case((6,), VOCAB, token_weight=False)
    compiled = torch.compile(functional.pdl_loss, fullgraph=True, backend="aot_eager")
    options = {"label_smoothing": 0.1, "label_smoothing_weight": "class"}
    got, expected = (case.run(function, **options) for function in (compiled, functional.pdl_loss))
    torch.testing.assert_close(got["loss"], expected["loss"], rtol=1e-6, atol=0)


def test_another_way_is_refused(make_case):
    case = make_case((2,), 5)
    with pytest.raises(ValueError, match=r"label_smoothing_weight: got 'all', expected one of \['class', 'none'"):
        functional.pdl_loss(case.leaf, case.targets, label_smoothing_weight="all")


def test_weight_drop_goes_with_no_weights_by_class():
    loss_fn = PDLLoss(torch.ones(5, dtype=torch.int64), label_smoothing=0.1, label_smoothing_weight="class")
    message = 'weight_drop: got 0.5 with label_smoothing_weight="class", expected 0'
    with pytest.raises(ValueError, match=message):
        loss_fn.weight_drop = 0.5
    assert loss_fn.weight_drop == 0
    loss_fn = PDLLoss(weight_drop=0.5, label_smoothing=0.1)
    loss_fn.label_smoothing_weight = "class"
    with pytest.raises(ValueError, match=message):
        loss_fn(torch.zeros(2, 5), torch.tensor([1, 2]))
    # Before anything was counted.
    assert loss_fn.frequency is None
    assert loss_fn.eval()(torch.zeros(2, 5), torch.tensor([1, 2])) > 0
