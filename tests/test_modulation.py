"""Modulations: every combination of options against the reference, published codes, and the ends of the range."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from pdl_ext import PDLLoss, functional, reference
from pdl_ext.engine import ops
from pdl_ext.modulation import DFT, AntiFocal, Focal, Modulation
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
]
# Each value of an option meets each of the others.
PRODUCT = {
    "label_smoothing": (0.0, 0.2),
    "z_loss": (0.0, 0.01),
    "transform": ({}, {"softcap": 5.0, "logit_scale": 0.7}),
    "offset": (False, True),
    "row_weight": (False, True),
    "shift": (False, True),
    "normalizer": (None, 2.5),
    "way": ("two calls", "in place", "linear"),
}


def run(function, logits, targets, options):
    """Loss, statistics, and the gradients of logits and row weights."""
    generator = torch.Generator().manual_seed(5)
    leaf = logits.clone().requires_grad_()
    row_weight = None
    if options.pop("row_weight"):
        row_weight = (0.3 + torch.rand(targets.shape, generator=generator)).to(logits).requires_grad_()
    token_weight = 0.2 + torch.rand(logits.shape[-1], generator=generator)
    loss, stats = function(leaf, targets, token_weight, row_weight=row_weight, return_stats=True, **options)
    loss.backward((0.1 + torch.rand(loss.shape, generator=generator)).to(loss))
    return [loss.detach(), leaf.grad, *([] if row_weight is None else [row_weight.grad]), *stats]


def over_logits(logits, *arguments, **options):
    return functional.pdl_loss(logits * 1, *arguments, inplace_backward=True, **options)


def over_slabs(logits, *arguments, **options):
    classifier = torch.eye(logits.shape[-1], dtype=logits.dtype)
    return functional.linear_pdl_loss(logits, classifier, *arguments, **options)


WAYS = {"two calls": functional.pdl_loss, "in place": over_logits, "linear": over_slabs}


@pytest.mark.slow
@pytest.mark.devices("cpu")
@pytest.mark.parametrize("modulation", [m for m in MODULATIONS if m not in (None, Focal(0.0), AntiFocal())], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_combination_matches_reference(device, reduction, modulation):
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(3, 4, 23, generator=generator, dtype=torch.float64)
    targets = torch.randint(23, (3, 4), generator=generator)
    logits[1, 2, targets[1, 2]] += 9
    targets[0, 1] = -100
    offset = torch.randn(23, generator=generator)
    # A quarter of all combinations, in which any five options meet in every way.
    product = itertools.product(*(range(len(values)) for values in PRODUCT.values()))
    for places in (places for places in product if sum(places) % 4 == REDUCTIONS[reduction]):
        options = {name: PRODUCT[name][place] for name, place in zip(PRODUCT, places, strict=True)}
        if options["normalizer"] is not None and reduction in ("sum", "none"):
            continue
        way = options.pop("way")
        options |= options.pop("transform")
        options |= {"logit_offset": offset if options.pop("offset") else None, "reduction": reduction}
        options["modulation"] = modulation
        expected = run(reference.pdl_loss, logits, targets, dict(options))
        for got, value in zip(run(WAYS[way], logits, targets, dict(options)), expected, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-12, msg=f"{way}, {options}")


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


@pytest.mark.parametrize("modulation", [Focal(2.0, detach=True), AntiFocal(1.5, 0.3), DFT()], ids=str)
def test_two_passes_find_the_same(make_case, modulation):
    """What it took before: statistics first, then a row weight made of them."""
    case = make_case((12,), 257, torch.float64)
    stats = functional.pdl_loss(case.leaf, case.targets, case.token_weight, return_stats=True)[1]
    p = (-stats.nll).exp()
    factor = {Focal: (1 - p) ** 2, AntiFocal: (1 + 0.3 * p) ** 1.5, DFT: p}[type(modulation)]
    expected = functional.pdl_loss(
        case.leaf, case.targets, case.token_weight, row_weight=factor, normalizer=stats.weight.sum()
    )
    got, modulated = functional.pdl_loss(
        case.leaf, case.targets, case.token_weight, modulation=modulation, return_stats=True
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    # It is no part of what is told of a row.
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
        # As with a weight of 1, whatever the modulation: what is not predicted at all is not modulated.
        expected = torch.softmax(logits[0], -1) - torch.tensor([0.0, 1.0, 0.0], device=device)
        torch.testing.assert_close(leaf.grad[0], expected)
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
    ops.compiled.complete_rows_(saved_rows, LossOptions(modulation=Focal(1.5)).packed)
    expected = (-torch.expm1(-nll.clamp(min=0))) ** 1.5
    got = ops.SavedRows.of(saved_rows).modulation.double().cpu()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


# As an option.


@pytest.mark.slow
@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("modulation", [Focal(1.5), AntiFocal(), DFT()], ids=str)
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
    for modulation in (Focal(), DFT(), None):
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


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Focal(-1.0), ValueError, "gamma: got -1.0, expected a finite number >= 0"),
        (lambda: Focal(math.inf), ValueError, "gamma: got inf, expected a finite number >= 0"),
        (lambda: Focal("2"), TypeError, "gamma: got '2' of type str, expected a finite number >= 0"),
        (lambda: Focal(detach=1), TypeError, "detach: got 1, expected True or False"),
        (lambda: AntiFocal(gamma=-0.5), ValueError, "gamma: got -0.5, expected a finite number >= 0"),
        (lambda: AntiFocal(scale=-1), ValueError, "scale: got -1, expected a finite number >= 0"),
        (lambda: PDLLoss(modulation="focal"), TypeError, "modulation: got str, expected None or one of"),
        (lambda: PDLLoss(modulation=Modulation()), TypeError, "modulation: got Modulation, expected None or one of"),
        (lambda: PDLLoss(modulation=Focal), TypeError, "modulation: got type, expected None or one of"),
    ],
)
def test_what_is_no_modulation_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
