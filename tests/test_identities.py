"""Mathematical identities: cross-entropy as a special case, the authors' formula, mass and minimiser."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pdl_ext import PDLLoss, PowerLaw, functional

VOCAB = 1009


def counts_of_a_corpus(vocab_size=VOCAB):
    # Zipf's law with a tail that was never seen.
    counts = (1e5 / torch.arange(1, vocab_size + 1) ** 1.2).long()
    counts[-20:] = 0
    return counts


def gradients(function, case, **options):
    leaf = case.leaf.clone().requires_grad_()
    loss = function(leaf, **options)
    loss.backward(torch.full_like(loss, 1.7))
    return {"loss": loss.detach(), "grad_logits": leaf.grad}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_equals_weighted_cross_entropy(make_case, assert_accurate, dtype, reduction):
    case = make_case((9,), VOCAB, dtype)

    def weighted_cross_entropy(logits):
        return F.cross_entropy(logits, case.targets, weight=case.token_weight.to(logits.dtype), reduction=reduction)

    got = gradients(
        functional.pdl_loss, case, targets=case.targets, token_weight=case.token_weight, reduction=reduction
    )
    plain = gradients(weighted_cross_entropy, case)
    case.leaf = case.leaf.double()
    truth = gradients(weighted_cross_entropy, case)
    for name in truth:
        assert_accurate(got[name], plain[name], truth[name], name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_equals_cross_entropy_with_label_smoothing(make_case, assert_accurate, smoothing, reduction):
    case = make_case((9,), VOCAB, token_weight=False)
    keywords = {"label_smoothing": smoothing, "reduction": reduction}
    got = gradients(functional.pdl_loss, case, targets=case.targets, **keywords)
    plain = gradients(F.cross_entropy, case, target=case.targets, **keywords)
    case.leaf = case.leaf.double()
    truth = gradients(F.cross_entropy, case, target=case.targets, **keywords)
    for name in truth:
        assert_accurate(got[name], plain[name], truth[name], name)


def test_equals_the_authors_code(make_case, assert_accurate):
    # sum w CE / sum w with w = 1 / (count + 1e-7); the rare targets here were seen at least once, as in their corpus.
    case = make_case((40,), VOCAB, ignored=False)
    counts = (counts_of_a_corpus() + 1).to(case.leaf.device)
    loss_fn = PDLLoss(counts, weighting=PowerLaw.reference())

    def authors(logits):
        weight = 1.0 / (counts.to(logits.dtype) + 1e-7)
        ce = F.cross_entropy(logits, case.targets, reduction="none")
        return (weight[case.targets] * ce).sum() / weight[case.targets].sum()

    got, plain = gradients(loss_fn, case, targets=case.targets), gradients(authors, case)
    case.leaf = case.leaf.double()
    truth = gradients(authors, case)
    # Their weights are float32 too, hence a rounding more than plain PyTorch's.
    for name in truth:
        assert_accurate(got[name], plain[name] * (1 + 2**-22), truth[name], name)


@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
def test_alpha_zero_is_cross_entropy_bit_for_bit(make_case, reduction):
    case = make_case((9,), VOCAB)
    loss_fn = PDLLoss(counts_of_a_corpus().to(case.leaf.device), alpha=0.0, reduction=reduction)
    got = gradients(loss_fn, case, targets=case.targets)
    unweighted = gradients(functional.pdl_loss, case, targets=case.targets, reduction=reduction)
    assert unweighted["grad_logits"].any()
    for name in got:
        assert torch.equal(got[name], unweighted[name])


def test_blend_zero_is_cross_entropy_bit_for_bit(make_case):
    case = make_case((9,), VOCAB)
    loss_fn = PDLLoss(counts_of_a_corpus().to(case.leaf.device), weighting=PowerLaw(alpha=1.5, blend=0.0))
    unweighted = functional.pdl_loss(case.leaf, case.targets)
    assert torch.equal(loss_fn(case.leaf, case.targets), unweighted)
    loss_fn.blend = 1.0
    assert not torch.equal(loss_fn(case.leaf, case.targets), unweighted)


def test_alpha_one_gives_every_type_equal_mass(device):
    counts = counts_of_a_corpus().to(device)
    weights = functional.token_weights(counts, PowerLaw(alpha=1.0, epsilon=0.0, smoothing=1e-9, normalize="none"))
    mass = (counts * weights)[counts > 0]
    torch.testing.assert_close(mass, mass.mean().expand_as(mass), rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [2.0, 1e-4, 1e4])
def test_rescaling_the_weights_leaves_the_mean(make_case, factor):
    case = make_case((9,), VOCAB, row_weight=True)
    base = case.run(functional.pdl_loss)
    case.token_weight = case.token_weight * factor
    scaled = case.run(functional.pdl_loss)
    for name in base:
        torch.testing.assert_close(scaled[name], base[name], rtol=1e-4, atol=0)
    assert base["grad_logits"].any()


@pytest.mark.parametrize("reduction", ["mean", "token_mean"])
def test_minimiser_is_weight_times_probability(device, reduction):
    weights = torch.tensor([0.3, 1.0, 2.0, 5.0], device=device)
    share = torch.tensor([10, 6, 3, 1], device=device)
    targets = torch.repeat_interleave(torch.arange(4, device=device), share)
    logits = torch.zeros(4, device=device, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = functional.pdl_loss(logits.expand(20, 4), targets, weights, reduction=reduction)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (weights * share).double()
    torch.testing.assert_close(logits.detach().softmax(0), expected / expected.sum(), rtol=1e-4, atol=0)


def test_gradient_rows_sum_to_zero(make_case):
    # Softmax is invariant to a common shift, whatever the weights are; the z-loss is not.
    got = make_case((9,), VOCAB, torch.float64).run(functional.pdl_loss, label_smoothing=0.2)
    size = got["grad_logits"].abs().sum(-1)
    assert size.any()
    assert (got["grad_logits"].sum(-1).abs() <= 1e-14 * size.max()).all()


def test_token_mean_is_unbiased_over_accumulation(make_case):
    # Two halves of a batch, each divided by the whole batch's rows, add up to the whole; "mean" of halves does not.
    case = make_case((10,), VOCAB, row_weight=True)
    whole = case.run(functional.pdl_loss, reduction="token_mean")
    rows = int((case.targets != -100).sum())
    total = sum(
        functional.pdl_loss(
            case.leaf[part], case.targets[part], case.token_weight, row_weight=case.row_weight[part], normalizer=rows
        )
        for part in (slice(0, 4), slice(4, 10))
    )
    torch.testing.assert_close(total, whole["loss"], rtol=1e-6, atol=0)
