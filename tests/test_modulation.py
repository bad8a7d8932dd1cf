"""Modulations: every combination of options against the reference, published codes, and the ends of the range."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from pdl_ext import PDLLoss, functional, reference
from pdl_ext.engine import ops
from pdl_ext.modulation import DFT, EAFT, AntiFocal, Focal, MiLe, Modulation
from pdl_ext.options import REDUCTIONS, LossOptions

MODULATIONS = [
    None,
    Focal(),
    Focal(0.0),
    Focal(0.5),
    Focal(1.0),
    Focal(3.0, detach=True),
    AntiFocal(),
    AntiFocal(2.0, 0.5),
    DFT(),
    MiLe(),
    MiLe(0.5, normalize=False),
    EAFT(),
]
# Published codes, written again.


def rows(make_case):
    case = make_case((40,), 101, torch.float64, ignored=False)
    return case.leaf * 4, case.targets


def test_anti_focal_as_published(make_case):
    # The criterion takes (1 + alpha p)^gamma of detached probabilities, and sums.
    logits, targets = rows(make_case)
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    functional.pdl_loss(leaf, targets, reduction="sum", modulation=AntiFocal(2.0, 0.5)).backward()
    log_p = torch.log_softmax(other, -1).gather(1, targets.unsqueeze(1))
    published = -((1 + 0.5 * log_p.detach().exp()) ** 2) * log_p
    published.sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-10, atol=1e-14)


def test_focal_as_published(make_case):
    logits, targets = rows(make_case)
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    functional.pdl_loss(leaf, targets, reduction="sum", modulation=Focal(2.0)).backward()
    p = torch.softmax(other, -1).gather(1, targets.unsqueeze(1))
    (-((1 - p) ** 2) * p.log()).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-8, atol=1e-12)


def test_dft_as_published(make_case):
    # Liger's use_token_scaling: each row's loss times the detached probability of its target.
    logits, targets = rows(make_case)
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    functional.pdl_loss(leaf, targets, modulation=DFT()).backward()
    nll = F.cross_entropy(other, targets, reduction="none")
    (nll * (-nll).detach().exp()).mean().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-10, atol=1e-14)


def test_mile_as_published(make_case):
    # The trainer: probabilities of at least 1e-8 in the entropy, detached, and the reciprocal of the mean factor.
    logits, targets = rows(make_case)
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    functional.pdl_loss(leaf, targets, modulation=MiLe(1.5)).backward()
    p = torch.softmax(other.detach(), -1)
    factor = (1 - (p * p.clamp(min=1e-8).log()).sum(-1)) ** 1.5
    published = 1 / factor.mean() * factor * F.cross_entropy(other, targets, reduction="none")
    published.mean().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-6, atol=1e-12)


def test_mile_as_published_where_rows_are_ignored(make_case):
    # There both means run over all rows, of which the ignored ones have a loss of 0.
    logits, targets = rows(make_case)
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    targets[::3] = -100
    entropy = torch.distributions.Categorical(logits=other.detach()).entropy()
    factor = 1 + entropy
    ours = functional.pdl_loss(leaf, targets, modulation=MiLe(normalize=False), normalizer=factor.sum())
    published = (1 / factor.mean() * factor * F.cross_entropy(other, targets, reduction="none")).mean()
    torch.testing.assert_close(ours.double(), published, rtol=1e-6, atol=0)
    ours.backward()
    published.backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-6, atol=1e-12)


def test_eaft_as_published_where_20_classes_are_all(make_case):
    # The trainer: the entropy of the 20 largest logits, renormalised, over 3 for log 20, detached.
    case = make_case((40,), 20, torch.float64, ignored=False)
    leaf, other = ((case.leaf * 4).requires_grad_() for _ in range(2))
    functional.pdl_loss(leaf, case.targets, modulation=EAFT()).backward()
    entropy = torch.distributions.Categorical(logits=other.detach().topk(20).values).entropy()
    (entropy / math.log(20) * F.cross_entropy(other, case.targets, reduction="none")).mean().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_eaft_of_a_vocabulary_of_one(device, power):
    leaf = torch.tensor([[3.0], [-2.0]], device=device, requires_grad=True)
    targets = torch.zeros(2, dtype=torch.int64, device=device)
    for function in (functional.pdl_loss, reference.pdl_loss):
        loss = function(leaf, targets, modulation=EAFT(power), z_loss=0.1)
        torch.testing.assert_close(loss.float(), torch.tensor(0.65, device=device))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_normalized_modulation_has_the_mean_of_its_call(make_case, reduction):
    """The mean is over the rows that count, whatever their weights; the z-loss is not divided."""
    case = make_case((9,), 31, torch.float64, row_weight=True)
    case.row_weight[1] = 0

    def losses(z_loss):
        given = {"row_weight": case.row_weight, "z_loss": z_loss, "reduction": reduction}
        return [
            functional.pdl_loss(case.leaf, case.targets, case.token_weight, modulation=m, **given)
            for m in (MiLe(2.0), MiLe(2.0, normalize=False))
        ]

    stats = functional.pdl_loss(case.leaf, case.targets, return_stats=True)[1]
    mean = ((1 + stats.entropy) ** 2)[case.targets != -100].mean()
    normalized, plain = losses(0.0)
    torch.testing.assert_close(normalized, plain / mean, rtol=1e-10, atol=0)
    with_z, plain_with_z = losses(0.5)
    torch.testing.assert_close(with_z - normalized, plain_with_z - plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_normalized_modulation_of_nothing(make_case, reduction):
    """If no row counts there is no mean to divide by."""
    case = make_case((4,), 31, row_weight=True)
    case.targets.fill_(-100)
    for value in case.run(functional.pdl_loss, reduction=reduction, modulation=MiLe()).values():
        assert not value.any()


def test_entropy_of_one_finite_logit(device):
    """A row of one finite logit has none, and -inf adds nothing."""
    logits = torch.tensor([[-math.inf, 2.0, -math.inf], [0.0, 0.0, -math.inf], [-300.0, 0.0, -300.0]], device=device)
    targets = torch.tensor([1, 0, 1], device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        entropy = functional.pdl_loss(logits.to(dtype), targets, return_stats=True)[1].entropy
        torch.testing.assert_close(entropy.float(), torch.tensor([0.0, math.log(2), 0.0], device=device))
    loss = functional.pdl_loss(logits[:1], targets[:1], modulation=MiLe())
    assert loss == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab_size", [1, 2, 31, 33, 4097, 9000])
def test_entropy_of_masked_vocabularies(device, dtype, vocab_size):
    """In whole blocks, in what is left over of them, and in tiles of nothing but -inf."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, vocab_size, generator=generator)).to(dtype)
    targets = torch.zeros(5, dtype=torch.int64)
    logits[1, 1:] = logits[2, vocab_size // 2 + 1 :] = -math.inf
    logits[3, 1 : vocab_size // 2 + 1] = logits[4, 1::2] = -math.inf
    entropy = functional.pdl_loss(logits.to(device), targets.to(device), return_stats=True)[1].entropy
    expected = torch.distributions.Categorical(logits=logits.double()).entropy()
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(entropy.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    assert entropy[1] == 0


@pytest.mark.parametrize(
    "modulation", [Focal(2.0, detach=True), AntiFocal(1.5, 0.3), DFT(), MiLe(1.5, normalize=False), EAFT(0.5)], ids=str
)
def test_two_passes_find_the_same(make_case, modulation):
    """The former computation: first statistics, then a row weight from them."""
    case = make_case((12,), 257, torch.float64)
    stats = functional.pdl_loss(case.leaf, case.targets, case.token_weight, return_stats=True)[1]
    p = (-stats.nll).exp()
    factor = {
        Focal: (1 - p) ** 2,
        AntiFocal: (1 + 0.3 * p) ** 1.5,
        DFT: p,
        MiLe: (1 + stats.entropy) ** 1.5,
        EAFT: (stats.entropy / math.log(257)) ** 0.5,
    }[type(modulation)]
    expected = functional.pdl_loss(
        case.leaf, case.targets, case.token_weight, row_weight=factor, normalizer=stats.weight.sum()
    )
    got, modulated = functional.pdl_loss(
        case.leaf, case.targets, case.token_weight, modulation=modulation, return_stats=True
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    # It is not part of a row's statistics.
    for name in stats._fields:
        assert torch.equal(getattr(modulated, name), getattr(stats, name))


# The ends of the range.


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("modulation", [m for m in MODULATIONS if m is not None], ids=str)
def test_a_masked_target(device, modulation, inplace):
    logits = torch.tensor([[0.5, -math.inf, 1.0], [0.3, 0.2, -1.0]], device=device)
    targets = torch.tensor([1, 0], device=device)
    leaf = logits.clone().requires_grad_()
    loss = functional.pdl_loss(leaf * 1, targets, reduction="sum", modulation=modulation, inplace_backward=inplace)
    loss.backward()
    if isinstance(modulation, DFT):
        # p nll vanishes as p does.
        alone = functional.pdl_loss(logits[1:], targets[1:], reduction="sum", modulation=modulation)
        torch.testing.assert_close(loss, alone)
        assert not leaf.grad[0].any()
    else:
        assert loss == math.inf
        # As with a weight of 1: what is not predicted at all is not modulated by its probability.
        expected = torch.softmax(logits[0], -1) - torch.tensor([0.0, 1.0, 0.0], device=device)
        if modulation.of_entropy:
            p = torch.softmax(logits.double(), -1)
            factor = modulation.factor(p, -(p * p.clamp(min=1e-300).log()).sum(-1), 3)
            expected = expected * factor[0] / (factor.mean() if modulation.is_normalized else 1)
        torch.testing.assert_close(leaf.grad[0], expected.float())
    assert leaf.grad[1].any()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_a_certain_target(device, gamma):
    leaf = torch.tensor([[0.0, 200.0, -3.0], [0.3, 0.2, -1.0]], device=device, requires_grad=True)
    targets = torch.tensor([1, 0], device=device)
    functional.pdl_loss(leaf, targets, modulation=Focal(gamma)).backward()
    assert not leaf.grad[0].any()
    assert leaf.grad[1].isfinite().all()
    assert leaf.grad[1].any()


def test_smoothing_keeps_the_slope_of_a_certain_target(device):
    """The modulation is 0 there, and its derivative is not."""
    leaf = torch.tensor([[0.0, 40.0, -3.0]], dtype=torch.float64, device=device, requires_grad=True)
    other = leaf.detach().clone().requires_grad_()
    targets = torch.tensor([1], device=device)
    functional.pdl_loss(leaf, targets, modulation=Focal(1.0), label_smoothing=0.3).backward()
    reference.pdl_loss(other, targets, modulation=Focal(1.0), label_smoothing=0.3).backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-10, atol=0)
    assert leaf.grad.any()


@pytest.mark.parametrize("modulation", MODULATIONS, ids=str)
def test_large_common_offsets_cancel_nothing(make_case, assert_accurate, modulation):
    case = make_case((8,), 101, torch.float64, ignored=False)
    shifted = dataclasses.replace(case, leaf=case.leaf + 2.0**30)
    got = shifted.run(functional.pdl_loss, modulation=modulation)
    expected = case.run(functional.pdl_loss, modulation=modulation)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_digit_of_a_small_nll_counts(device, dtype):
    """Rows that were merged over ranks may have any nll, also one that rounding has left below 0."""
    nll = torch.tensor([-1e-8, 0.0, 1e-6, 1e-4, 0.3, 20.0, math.inf], dtype=torch.float64)
    saved_rows = nll.to(device, dtype).expand(len(ops.SavedRows._fields), -1).clone()
    ops.compiled.complete_rows_(saved_rows, LossOptions(modulation=Focal(1.5)).packed, 101)
    expected = (-torch.expm1(-nll.clamp(min=0))) ** 1.5
    got = ops.SavedRows.of(saved_rows).modulation.double().cpu()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


# As an option.


@pytest.mark.slow
@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("modulation", [Focal(1.5), AntiFocal(), DFT(), MiLe(), EAFT()], ids=str)
def test_compiles(make_case, modulation):
    case = make_case((6,), 101, row_weight=True)
    torch._dynamo.reset()
    compiled = torch.compile(functional.pdl_loss, fullgraph=True, backend="aot_eager")
    got, expected = (case.run(function, modulation=modulation) for function in (compiled, functional.pdl_loss))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=0)


@pytest.mark.devices("cpu", "cuda")
def test_of_a_loss(make_case):
    case = make_case((6,), 101)
    counts = torch.arange(101, device=case.leaf.device)
    loss_fn = PDLLoss(counts, modulation=Focal())
    assert "modulation=Focal(gamma=2.0, detach=False)" in repr(loss_fn)
    assert "logit_adjustment" not in repr(loss_fn)
    weights = functional.token_weights(counts, loss_fn.weighting)
    for modulation in (Focal(), DFT(), MiLe(), EAFT(), None):
        loss_fn.modulation = modulation
        expected = functional.pdl_loss(case.leaf, case.targets, weights, modulation=modulation)
        assert torch.equal(loss_fn(case.leaf, case.targets), expected)
        copied = pickle.loads(pickle.dumps(loss_fn))
        assert copied.modulation == modulation
        assert torch.equal(copied(case.leaf, case.targets), expected)
    torch._dynamo.reset()
    loss_fn.modulation = AntiFocal()
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.leaf, case.targets), loss_fn(case.leaf, case.targets), rtol=1e-6, atol=0)


class Own(Modulation):
    """Unknown to the compiled ops."""


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Focal(-1.0), ValueError, "gamma: got -1.0, expected a finite number >= 0"),
        (lambda: Focal(math.inf), ValueError, "gamma: got inf, expected a finite number >= 0"),
        (lambda: Focal("2"), TypeError, "gamma: got '2' of type str, expected a finite number >= 0"),
        (lambda: Focal(detach=1), TypeError, "detach: got 1, expected True or False"),
        (lambda: AntiFocal(gamma=-0.5), ValueError, "gamma: got -0.5, expected a finite number >= 0"),
        (lambda: MiLe(gamma=-0.5), ValueError, "gamma: got -0.5, expected a finite number >= 0"),
        (lambda: EAFT(power=-1), ValueError, "power: got -1, expected a finite number >= 0"),
        (lambda: MiLe(normalize=1), TypeError, "normalize: got 1, expected True or False"),
        (lambda: AntiFocal(scale=-1), ValueError, "scale: got -1, expected a finite number >= 0"),
        (lambda: PDLLoss(modulation="focal"), TypeError, "modulation: got str, expected None or one of"),
        (lambda: PDLLoss(modulation=Own()), TypeError, "modulation: got Own, expected None or one of"),
        (lambda: PDLLoss(modulation=Modulation()), TypeError, "modulation: got Modulation, expected None or one of"),
        (lambda: PDLLoss(modulation=Focal), TypeError, "modulation: got type, expected None or one of"),
    ],
)
def test_what_is_no_modulation_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
