"""Second derivatives and forward mode of the loss of logits: plain PyTorch's, by the definition."""

from __future__ import annotations

import pytest
import torch
from test_functional import DETACHED, OPTIONS, REDUCTIONS, options_of
from torch.autograd import forward_ad

from pdl_ext import PDLLoss, functional, reference
from pdl_ext.modulation import DFT, AntiFocal, Focal

SMOOTH = [name for name in OPTIONS if name not in DETACHED]


def inputs_of(make_case, name, reduction, **more):
    """A loss of logits and row weights, and these."""
    case = make_case((2, 2), 5, torch.float64, row_weight=True)
    keywords = options_of(name, case) | {"reduction": reduction} | more

    def loss(logits, row_weight, function=functional.pdl_loss):
        return function(logits, case.targets, case.token_weight, row_weight=row_weight, **keywords)

    return loss, (case.leaf.requires_grad_(), case.row_weight.double().requires_grad_())


@pytest.mark.slow
@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("options", SMOOTH)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradgradcheck(make_case, reduction, options):
    loss, inputs = inputs_of(make_case, options, reduction)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("more", [{"normalizer": 3.5}, {"shift": True}, {"normalizer": 0.0}], ids=str)
def test_gradgradcheck_of_normalizer_and_shift(make_case, more):
    loss, inputs = inputs_of(make_case, "everything", "mean", **more)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.slow
@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("options", SMOOTH)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_forward_mode(make_case, reduction, options):
    loss, inputs = inputs_of(make_case, options, reduction)
    assert torch.autograd.gradcheck(loss, inputs, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("options", ["plain", "everything", *sorted(DETACHED)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives_match_reference(make_case, reduction, options):
    loss, inputs = inputs_of(make_case, options, reduction)
    found = []
    for function in (functional.pdl_loss, reference.pdl_loss):
        value = loss(*inputs, function)
        upstream = torch.linspace(0.5, 1.5, value.numel()).to(value).view(value.shape)
        gradients = torch.autograd.grad(value, inputs, upstream, create_graph=True)
        scalar = sum(gradient.square().sum() for gradient in gradients)
        found.append([*gradients, *torch.autograd.grad(scalar, inputs)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        assert got.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_first_derivatives_with_a_graph_are_the_same(make_case, dtype):
    case = make_case((8,), 101, dtype, row_weight=True)
    leaf = case.leaf.requires_grad_()
    loss = functional.pdl_loss(leaf, case.targets, case.token_weight, row_weight=case.row_weight, modulation=Focal())
    (plain,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (with_graph,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert with_graph.dtype == dtype
    assert with_graph.requires_grad
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(plain, with_graph.detach(), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("modulation", [None, AntiFocal(), DFT()], ids=str)
def test_forward_mode_of_a_loss_with_statistics(make_case, modulation):
    case = make_case((3, 4), 31, torch.float64, row_weight=True)
    loss_fn = PDLLoss(torch.arange(31, device=case.leaf.device), shift=True, modulation=modulation)
    tangents = [torch.randn_like(x) for x in (case.leaf, case.row_weight)]
    expected_loss, expected = loss_fn(case.leaf, case.targets, row_weight=case.row_weight, return_stats=True)
    with forward_ad.dual_level():
        logits, row_weight = (
            forward_ad.make_dual(x, t) for x, t in zip((case.leaf, case.row_weight), tangents, strict=True)
        )
        loss, stats = loss_fn(logits, case.targets, row_weight=row_weight, return_stats=True)
        value, tangent = forward_ad.unpack_dual(loss)
        torch.testing.assert_close(value, expected_loss)
        for name in expected._fields:
            torch.testing.assert_close(getattr(stats, name), getattr(expected, name), msg=name)
    leaves = [x.clone().requires_grad_() for x in (case.leaf, case.row_weight)]
    loss_fn(leaves[0], case.targets, row_weight=leaves[1]).backward()
    directional = sum((leaf.grad * t).sum() for leaf, t in zip(leaves, tangents, strict=True))
    torch.testing.assert_close(tangent.double(), directional.double(), rtol=1e-5, atol=1e-9)
    assert tangent.any()


@pytest.mark.devices("cpu")
def test_forward_mode_of_a_bad_target(make_case):
    case = make_case((3,), 5, ignored=False)
    case.targets[1] = 5
    with forward_ad.dual_level(), pytest.raises(IndexError, match=r"targets: got 5 at position \[1\]"):
        functional.pdl_loss(forward_ad.make_dual(case.leaf, case.leaf), case.targets)


@pytest.mark.devices("emulated", "cuda")
def test_a_bad_target_is_nan_in_either_mode(make_case):
    case = make_case((3,), 5, ignored=False)
    case.targets[1] = 5
    leaf = case.leaf.clone().requires_grad_()
    loss = functional.pdl_loss(leaf, case.targets, reduction="none")
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss), create_graph=True)
    assert gradient[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


def test_ignored_rows_may_hold_anything(make_case):
    case = make_case((3,), 7, ignored=False)
    case.targets[1] = -100
    for anything in (torch.inf, -torch.inf, torch.nan):
        leaf = case.leaf.clone()
        leaf[1] = anything
        leaf.requires_grad_()
        loss = functional.pdl_loss(leaf, case.targets, z_loss=0.1, label_smoothing=0.1)
        (plain,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        (with_graph,) = torch.autograd.grad(loss, leaf, create_graph=True)
        torch.testing.assert_close(with_graph.detach(), plain, rtol=1e-5, atol=1e-7)
        assert not plain[1].any()


@pytest.mark.parametrize("modulation", [None, Focal(0.5), Focal(2.0), AntiFocal(), DFT()], ids=str)
def test_a_masked_target_has_the_same_gradient(make_case, modulation):
    leaf = make_case((2,), 7, torch.float64, ignored=False).leaf
    targets = torch.tensor([3, 1], device=leaf.device)
    leaf[0, 3] = -torch.inf
    leaf.requires_grad_()
    loss = functional.pdl_loss(leaf, targets, reduction="sum", modulation=modulation)
    (plain,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (with_graph,) = torch.autograd.grad(loss, leaf, create_graph=True)
    torch.testing.assert_close(with_graph.detach()[1], plain[1])
    finite = torch.arange(7, device=leaf.device) != 3
    torch.testing.assert_close(with_graph.detach()[0, finite], plain[0, finite])


def test_tangents_of_what_is_no_leaf(make_case):
    case = make_case((3,), 5, torch.float64)
    with forward_ad.dual_level():
        normalizer = forward_ad.make_dual(torch.tensor(2.0), torch.tensor(1.0))
        value, tangent = forward_ad.unpack_dual(functional.pdl_loss(case.leaf, case.targets, normalizer=normalizer))
        # d (s / n) = -s / n^2
        torch.testing.assert_close(tangent, -value / 2)
        table = forward_ad.make_dual(torch.ones(5), torch.ones(5))
        with pytest.raises(ValueError, match="token_weight: got a tensor that has a tangent"):
            functional.pdl_loss(case.leaf, case.targets, table)


def test_linear_refuses_tangents(make_case):
    case = make_case((3,), 5)
    weight = torch.eye(5, device=case.leaf.device)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative in chunks"):
        functional.linear_pdl_loss(forward_ad.make_dual(case.leaf, case.leaf), weight, case.targets)


def test_in_place_has_no_second_derivative(make_case):
    case = make_case((3,), 5)
    leaf = case.leaf.requires_grad_()
    loss = functional.pdl_loss(leaf * 1, case.targets, inplace_backward=True)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative in place"):
        gradient.sum().backward()


def test_autograd_functional(make_case):
    case = make_case((3,), 5, torch.float64)
    direction = torch.randn_like(case.leaf)

    def loss(logits, function=functional.pdl_loss):
        return function(logits, case.targets, case.token_weight)

    def defined(logits):
        return loss(logits, reference.pdl_loss)

    for transform in (torch.autograd.functional.hvp, torch.autograd.functional.jvp):
        for got, expected in zip(
            transform(loss, case.leaf, direction), transform(defined, case.leaf, direction), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    hessian = torch.autograd.functional.hessian(loss, case.leaf)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(defined, case.leaf), rtol=1e-9, atol=1e-12)
    assert hessian.any()
