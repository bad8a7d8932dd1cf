"""Memory layouts, upstream gradients, repeated backward, and gradients that overwrite the logits."""

from __future__ import annotations

import pytest
import torch

from pdl_ext import functional

# From a leaf in memory to logits [6, 257]; each leaf's shape says how it lies.
LAYOUTS = {
    "transposed": ((257, 6), lambda leaf: leaf.t()),
    "padded_vocabulary": ((6, 320), lambda leaf: leaf[..., :257]),
    "padded_in_front": ((6, 260), lambda leaf: leaf[..., 3:]),
    "misaligned_storage": ((6 * 257 + 1,), lambda leaf: leaf[1:].view(6, 257)),
    "every_other_row": ((12, 257), lambda leaf: leaf[::2]),
    "every_other_column": ((6, 514), lambda leaf: leaf[:, ::2]),
    "expanded_rows": ((1, 257), lambda leaf: leaf.expand(6, 257)),
    "expanded_once": ((2, 1, 257), lambda leaf: leaf.expand(2, 3, 257).reshape(6, 257)),
    "overlapping_rows": ((6 + 256,), lambda leaf: leaf.unfold(0, 257, 1)),
    "permuted": ((3, 2, 257), lambda leaf: leaf.transpose(0, 1).reshape(6, 257)),
}


def laid_out(make_case, layout, dtype=torch.float32):
    shape, view = LAYOUTS[layout]
    case = make_case((6,), 257, dtype, row_weight=True)
    leaf = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(case.leaf)
    case.leaf, case.view = leaf, view
    return case


@pytest.mark.parametrize("inplace_backward", [False, True], ids=["out_of_place", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_match_reference(make_case, assert_matches, layout, dtype, inplace_backward):
    case = laid_out(make_case, layout, dtype)
    # A leaf may not be written to; what a model hands over never is one.
    view = case.view
    case.view = lambda leaf: view(leaf.clone())
    assert_matches(case, inplace_backward=inplace_backward, label_smoothing=0.1)


def misalign(case, before, after):
    """Puts the rows into wider ones, so that they lie `before` elements past an aligned address, each another way."""
    rows, vocab_size = case.leaf.shape
    wide = case.leaf.new_full((rows, before + vocab_size + after), torch.nan)
    wide[:, before : before + vocab_size] = case.leaf
    case.leaf = wide
    # A leaf may not be written to in place; what a model hands over never is one.
    case.view = lambda leaf: leaf.clone()[:, before : before + vocab_size]


@pytest.mark.parametrize("inplace_backward", [False, True], ids=["out_of_place", "inplace"])
@pytest.mark.parametrize("after", [0, 3], ids=["rows_alike", "rows_differ"])
@pytest.mark.parametrize("before", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_alignments_match_reference(make_case, assert_matches, dtype, before, after, inplace_backward):
    # 1001 with `before` and a whole number of vectors after; the gradient begins at such an address, unless in place.
    case = make_case((4,), 1001, dtype)
    whole = -(before + 1001) % 8
    misalign(case, before, whole + after)
    assert_matches(case, label_smoothing=0.1, inplace_backward=inplace_backward)


def test_three_dimensional_layouts(make_case, assert_matches):
    case = make_case((2, 5), 101)
    case.leaf = case.leaf.transpose(0, 1).contiguous()
    case.view = lambda leaf: leaf.transpose(0, 1)
    assert_matches(case)
    assert_matches(case, shift=True)


def test_noncontiguous_targets_and_row_weight(make_case, assert_matches):
    case = make_case((4, 4), 101, row_weight=True)
    case.targets, case.row_weight = case.targets.t(), case.row_weight.t()
    assert not case.targets.is_contiguous()
    assert_matches(case)


@pytest.mark.parametrize("layout", ["padded_vocabulary", "misaligned_storage"])
def test_logits_outside_the_slice_are_not_read(make_case, layout):
    case = laid_out(make_case, layout)
    clean = case.run(functional.pdl_loss)["loss"]
    outside = torch.ones_like(case.leaf, dtype=torch.bool)
    case.view(outside).fill_(False)
    case.leaf[outside] = torch.nan
    assert torch.equal(case.run(functional.pdl_loss)["loss"], clean)


@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
def test_stride_zero_upstream_gradient(make_case, shape):
    case = make_case(shape, 257)
    summed = case.leaf.clone().requires_grad_()
    functional.pdl_loss(summed, case.targets, case.token_weight, reduction="none").sum().backward()
    direct = case.leaf.clone().requires_grad_()
    functional.pdl_loss(direct, case.targets, case.token_weight, reduction="sum").backward()
    assert torch.equal(summed.grad, direct.grad)
    assert direct.grad.any()


def test_expanded_scalar_loss(make_case):
    case = make_case((6,), 257)
    leaf = case.leaf.clone().requires_grad_()
    functional.pdl_loss(leaf, case.targets, case.token_weight).expand(4).sum().backward()
    once = case.leaf.clone().requires_grad_()
    functional.pdl_loss(once, case.targets, case.token_weight).backward()
    torch.testing.assert_close(leaf.grad, 4 * once.grad, rtol=1e-6, atol=0)
    assert once.grad.any()


def test_strided_upstream_gradient(make_case):
    case = make_case((6,), 257)
    upstream = torch.randn(12, generator=torch.Generator().manual_seed(5)).to(case.leaf.device)[::2]
    grads = []
    for gradient in (upstream, upstream.contiguous()):
        leaf = case.leaf.clone().requires_grad_()
        functional.pdl_loss(leaf, case.targets, reduction="none").backward(gradient)
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    assert grads[0].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retained_graph_accumulates(make_case, reduction):
    case = make_case((6,), 257, row_weight=True)
    leaf, row_weight = case.leaf.clone().requires_grad_(), case.row_weight.clone().requires_grad_()
    loss = functional.pdl_loss(leaf, case.targets, case.token_weight, row_weight=row_weight, reduction=reduction)
    upstream = torch.full_like(loss, 0.7)
    loss.backward(upstream, retain_graph=True)
    once = leaf.grad.clone(), row_weight.grad.clone()
    loss.backward(upstream)
    assert once[0].any()
    assert once[1].any()
    assert torch.equal(leaf.grad, 2 * once[0])
    assert torch.equal(row_weight.grad, 2 * once[1])


def test_logits_are_left_alone(make_case):
    case = make_case((6,), 257)
    leaf = case.leaf.clone().requires_grad_()
    functional.pdl_loss(leaf, case.targets).backward()
    assert torch.equal(leaf.detach(), case.leaf)
    assert leaf.grad.any()


@pytest.mark.parametrize("target", ["logits", "row_weight"])
def test_double_backward_in_place_is_refused(make_case, target):
    case = make_case((6,), 257, row_weight=True)
    inputs = {"logits": case.leaf.clone().requires_grad_(), "row_weight": case.row_weight.clone().requires_grad_()}
    loss = functional.pdl_loss(
        inputs["logits"] * 1,
        case.targets,
        case.token_weight,
        row_weight=inputs["row_weight"],
        inplace_backward=True,
    )
    # Squared, so that the upstream gradient depends on the inputs too.
    (grad,) = torch.autograd.grad(loss**2, inputs[target], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


class TestInplaceBackward:
    """A training step's logits are no leaf: `* 1` stands for the model that made them."""

    @staticmethod
    def logits_of(case):
        leaf = case.leaf.clone().requires_grad_()
        logits = leaf * 1
        grads = []
        logits.register_hook(grads.append)
        return leaf, logits, grads

    def test_gradient_lies_where_the_logits_were(self, make_case):
        case = make_case((2, 3), 257)
        leaf, logits, grads = self.logits_of(case)
        address = logits.data_ptr()
        functional.pdl_loss(logits, case.targets, inplace_backward=True).backward()
        assert grads[0].data_ptr() == address
        assert leaf.grad.any()

    def test_later_use_of_the_logits_raises(self, make_case):
        case = make_case((6,), 257)
        _, logits, _ = self.logits_of(case)
        other = logits.square().sum()
        functional.pdl_loss(logits, case.targets, inplace_backward=True).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()

    def test_second_backward_raises(self, make_case):
        case = make_case((6,), 257)
        _, logits, _ = self.logits_of(case)
        loss = functional.pdl_loss(logits, case.targets, inplace_backward=True)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_expanded_logits_are_not_overwritten(self, make_case):
        case = make_case((6,), 257)
        row = case.leaf[:1].clone().requires_grad_()
        logits = (row * 1).expand(6, 257)
        before = logits.detach().clone()
        functional.pdl_loss(logits, case.targets, inplace_backward=True).backward()
        assert torch.equal(logits.detach(), before)
        assert row.grad.any()

    def test_padding_of_the_vocabulary_survives(self, make_case):
        case = make_case((6,), 257)
        padded = torch.full((6, 320), 5.0, device=case.leaf.device, requires_grad=True)
        wide = padded * 1
        functional.pdl_loss(wide[:, :257], case.targets, inplace_backward=True).backward()
        assert (wide[:, 257:] == 5).all()
        assert not padded.grad[:, 257:].any()
        assert padded.grad[:, :257].any()


@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_tables_of_any_layout(make_case, layout):
    case = make_case((3,), 257)
    columns = torch.rand(257, 2, device=case.leaf.device) + 0.5
    table = columns[:, 0] if layout == "strided" else columns[0, :1].expand(257)
    assert table.stride(0) != 1
    for name in ("token_weight", "logit_offset"):
        straight = functional.pdl_loss(
            case.leaf, case.targets, **{name: table.clone(memory_format=torch.contiguous_format)}
        )
        assert torch.equal(functional.pdl_loss(case.leaf, case.targets, **{name: table}), straight)
