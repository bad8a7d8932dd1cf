"""Uninitialised memory is never read, not even by a library that gets a tensor with gaps between its rows.

`uninitialized.py` fills it with NaN in all tests and in their ranks. oneDNN's bfloat16 products read the gaps only on
processors with AMX. So these tests check the operands that it gets.
"""

from __future__ import annotations

import pytest
import torch
import uninitialized
from torch import Tensor

from pdl_ext import functional
from pdl_ext.engine import linear

WITH_AMX = pytest.mark.devices("cpu")


def between_rows(matrix: Tensor) -> Tensor:
    """The memory between the rows, or the columns, of a matrix stored row by row, or column by column."""
    rows = matrix if matrix.stride(1) == 1 else matrix.t()
    count, columns = rows.shape
    gap = rows.stride(0) - columns
    if count < 2 or gap <= 0:
        return rows.new_zeros(0)
    return rows.as_strided((count - 1, gap), (rows.stride(0), 1), rows.storage_offset() + columns)


@pytest.fixture
def operands(monkeypatch):
    """The operands of the matrix products of the fused linear."""
    seen: list[Tensor] = []

    def watch(owner: object, name: str, first: int) -> None:
        product = getattr(owner, name)

        def watched(*arguments, **options):
            seen.extend(arguments[first : first + 2])
            for operand in arguments[first : first + 2]:
                assert between_rows(operand).eq(0).all(), "a product was handed memory that was not written"
            return product(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(torch, "mm", 0)
    watch(torch, "addmm", 1)
    watch(linear, "product_into", 1)
    return seen


def problem(rows: int, vocab_size: int, hidden_size: int, dtype: torch.dtype = torch.bfloat16):
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(rows, hidden_size, generator=generator).to(dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=generator).to(dtype)
    return hidden, weight, torch.randint(vocab_size, (rows,), generator=generator)


def test_memory_is_nan_until_it_is_written():
    assert uninitialized.is_filled()


# One slab, several of rows, and several of rows and of columns of which the last is narrower.
@pytest.mark.parametrize("chunk_bytes", [None, 2**20, 2**18])
@pytest.mark.parametrize("accumulate", ["float32", "weight"])
@pytest.mark.parametrize("bias", [False, True])
@WITH_AMX
def test_padding_handed_to_a_product_is_zero(device, operands, chunk_bytes, accumulate, bias):
    hidden, weight, targets = problem(700, 4133, 33)
    targets[::3] = -100
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    of_bias = torch.zeros(4133, dtype=torch.bfloat16).requires_grad_() if bias else None
    functional.linear_pdl_loss(
        hidden, weight, targets, bias=of_bias, max_chunk_bytes=chunk_bytes, accumulate=accumulate
    ).backward()
    assert any(operand.stride(0) > operand.shape[1] for operand in operands), "no slab was padded"
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()


# GPT-2's vocabulary, one of characters, and one token more than a multiple of what AMX takes at once.
@pytest.mark.parametrize("vocab_size", [50257, 65, 32001])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@WITH_AMX
@pytest.mark.slow
def test_no_gradient_is_nan(device, vocab_size, reduction):
    hidden, weight, targets = problem(128, vocab_size, 64)
    hidden.requires_grad_()
    functional.linear_pdl_loss(hidden, weight, targets, reduction=reduction).sum().backward()
    assert hidden.grad.isfinite().all()
    assert hidden.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@WITH_AMX
def test_what_a_caller_hands_over_in_columns_of_something_else(device, operands, dtype):
    plain, classifier, targets = problem(150, 301, 33, dtype)

    def beside_nan(matrix: Tensor, transposed: bool) -> Tensor:
        shape = (matrix.shape[1], matrix.shape[0]) if transposed else tuple(matrix.shape)
        wide = matrix.new_full((shape[0], shape[1] + 7), torch.nan)
        wide[:, : shape[1]] = matrix.t() if transposed else matrix
        part = wide[:, : shape[1]]
        return part.t() if transposed else part

    expected = None
    for transposed in (None, False, True):
        pair = [plain, classifier] if transposed is None else [beside_nan(m, transposed) for m in (plain, classifier)]
        hidden, weight = (matrix.detach().requires_grad_() for matrix in pair)
        loss = functional.linear_pdl_loss(hidden, weight, targets)
        loss.backward()
        results = (loss, hidden.grad, weight.grad)
        if expected is None:
            expected = results
        for got, right in zip(results, expected, strict=True):
            torch.testing.assert_close(got, right, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    # A transposed classifier is read as it lies: no copy of the largest tensor there is.
    seen = len(operands)
    functional.linear_pdl_loss(plain, classifier.t().contiguous().t(), targets)
    assert operands[seen + 1].stride() in ((1, 301), (301, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_unwritten_lies_between_the_rows_of_a_gradient(device_name, make_case, dtype):
    """Logits of a padded vocabulary: on a card the rows of their gradient have the same layout."""
    case = make_case((5,), 13, dtype)
    gradients = []

    def columns(leaf: Tensor) -> Tensor:
        part = torch.cat([leaf, leaf.new_full((5, 3), torch.nan)], 1)[:, :13]
        if part.requires_grad:
            part.register_hook(gradients.append)
        return part

    case.view = columns
    case.run(functional.pdl_loss)
    (gradient,) = gradients
    assert gradient.any()
    assert between_rows(gradient).eq(0).all()
    assert gradient.stride(0) == (13 if device_name == "cpu" else 14 if dtype == torch.float64 else 16)
