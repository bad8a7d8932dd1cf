"""A row's loss and gradient have the same bits for any other rows in the call, at any position, with any threads."""

from __future__ import annotations

import pytest
import torch

from pdl_ext import functional
from pdl_ext.modulation import Focal

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = {
    "plain": {},
    "entropy": {"modulation": Focal()},
    "everything": {"label_smoothing": 0.1, "softcap": 9.0, "z_loss": 0.1, "logit_scale": 1.3},
    "by class": {"label_smoothing": 0.1, "label_smoothing_weight": "class"},
    "in place": {"inplace_backward": True},
}


@pytest.fixture
def threads():
    """Sets the number of PyTorch's threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def results(logits, targets, weight, reduction, options, row_weight=None):
    """The gradient and the statistics of each row, as integers."""
    leaf = logits.detach().requires_grad_()
    options = options | {"reduction": reduction, "row_weight": row_weight, "return_stats": True}
    if reduction in ("mean", "token_mean"):
        options["normalizer"] = 3.0
    if "softcap" in options:
        options["logit_offset"] = torch.linspace(-1, 1, logits.shape[-1], device=logits.device)
    # In place they must be computed.
    of_model = leaf * 1 if "inplace_backward" in options else leaf
    loss, stats = functional.pdl_loss(of_model, targets, weight, **options)
    loss.sum().backward()
    of_rows = [loss] if reduction == "none" else []
    return [bits(x.detach()) for x in (leaf.grad, stats.nll, stats.lse, stats.entropy, stats.predicted, *of_rows)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [8, 1009, 8200, pytest.param(40001, marks=pytest.mark.slow)])
def test_other_rows_and_threads(make_case, device_name, threads, vocab_size, dtype, reduction, options):
    # On a card a row's vectors begin at multiples of 16 bytes, so its position matters unless rows are whole vectors.
    rows = 9 if device_name == "cpu" else 5
    vocab_size = vocab_size if device_name == "cpu" else -(-vocab_size // 8) * 8
    case = make_case((rows,), vocab_size, dtype, peaked=True, row_weight=True)
    case.targets[0] = -100
    row_weight = case.row_weight.to(case.leaf.dtype if dtype == torch.float64 else torch.float32)
    arguments = (case.token_weight, reduction, options)
    whole = results(case.leaf, case.targets, *arguments, row_weight)
    assert whole[0].any()
    parts = [slice(0, 1), slice(1, 2), slice(rows - 1, rows), slice(2, 5), slice(0, rows)]
    for count in (1, 2, 3, 5) if device_name == "cpu" else (1,):
        threads(count)
        for part in parts:
            for got, expected in zip(
                results(case.leaf[part].clone(), case.targets[part], *arguments, row_weight[part]), whole, strict=True
            ):
                assert torch.equal(got, expected[part]), (count, part)


@pytest.mark.devices("emulated", "cuda")
@pytest.mark.parametrize("vocab_size", [1009, 40001])  # a block, and a cluster of them
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_a_padded_vocabulary(make_case, dtype, vocab_size):
    case = make_case((5,), -(-vocab_size // 8) * 8, dtype, peaked=True)
    case.targets.clamp_(max=vocab_size - 1)

    def of(part):
        columns = case.leaf[part].clone()[:, :vocab_size]
        return results(columns, case.targets[part], case.token_weight[:vocab_size], "sum", {})

    whole = of(slice(0, 5))
    assert whole[0].any()
    for part in (slice(0, 1), slice(2, 5), slice(4, 5)):
        for got, expected in zip(of(part), whole, strict=True):
            assert torch.equal(got, expected[part]), part


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_place(make_case, dtype, options):
    case = make_case((6,), 5003, dtype, ignored=False)
    whole = results(case.leaf, case.targets, case.token_weight, "sum", options)
    for before in (1, 3, 8):
        wide = torch.full((6, 5003 + 16), 7.0, dtype=dtype)
        view = wide[:, before : before + 5003]
        view.copy_(case.leaf)
        for got, expected in zip(results(view, case.targets, case.token_weight, "sum", options), whole, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("options", [{}, OPTIONS["everything"]], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_so_many_rows_that_stores_go_around_the_caches(make_case, dtype, options):
    # 2^25 bytes and more, in rows of which each begins elsewhere in a line.
    vocab_size = 20011
    rows = 2**25 // (vocab_size * dtype.itemsize) + 2
    case = make_case((rows,), vocab_size, dtype)
    for reduction in ("sum", "none"):
        whole = results(case.leaf, case.targets, case.token_weight, reduction, options)
        for first in range(0, rows, 61):
            part = slice(first, first + 5)
            some = results(case.leaf[part], case.targets[part], case.token_weight, reduction, options)
            for got, expected in zip(some, whole, strict=True):
                assert torch.equal(got, expected[part]), part
