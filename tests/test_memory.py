"""Kernels stay within their tensors: each input and output ends, or begins, at unmapped memory."""

from __future__ import annotations

import itertools

import pytest
import torch

from pdl_ext import PowerLaw, functional, reference
from pdl_ext.counts import TOKEN_DTYPES, CountTable
from pdl_ext.engine import ops
from pdl_ext.options import LossOptions


@pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "inplace"])
@pytest.mark.parametrize("at_end", [False, True], ids=["before", "past_the_end"])
@pytest.mark.parametrize("vocab_size", [1, 7, 129, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_loss_stays_within_its_tensors(make_case, guarded, dtype, vocab_size, at_end, inplace):
    case = make_case((3,), vocab_size, dtype, row_weight=True)
    case.row_weight = case.row_weight.to(ops.accumulator_dtype(dtype))
    copies = [guarded(x, at_end) for x in (case.leaf, case.targets, case.token_weight, case.row_weight)]
    logits, targets, token_weight, row_weight = copies
    normalizer = guarded(torch.tensor([2.5, 3.5], dtype=row_weight.dtype), at_end)
    offset = guarded(torch.ones(vocab_size), at_end)
    options = LossOptions(label_smoothing=0.1, label_smoothing_weight="class", z_loss=0.01, softcap=9.0).packed
    loss, saved_rows, factors, _ = ops.compiled.loss_forward(
        logits, targets, token_weight, row_weight, offset, normalizer, options, True
    )
    saved = [guarded(x, at_end) for x in (torch.ones_like(loss), saved_rows, factors)]
    arguments = (saved[0], logits, targets, *saved[1:], token_weight, row_weight, offset, options, 0, vocab_size)
    if inplace:
        ops.compiled.loss_backward_(*arguments)
        assert logits.any()
        assert logits.isfinite().all()
    else:
        assert torch.equal(logits, case.leaf)
        gradient = ops.compiled.loss_backward(*arguments)
        assert gradient.any()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("at_end", [False, True], ids=["before", "past_the_end"])
@pytest.mark.parametrize(
    "size",
    [
        0,  # no launch
        1,  # a warp with one token
        31,  # a warp short of one
        32,  # a whole warp
        33,  # a second warp with one token
        2047,  # one block
        100003,  # many blocks, several tokens a thread
    ],
)
@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
def test_counting_stays_within_its_tensors(guarded, dtype, size, at_end):
    generator = torch.Generator().manual_seed(size)
    vocab_size, ignore_index = 200, 17
    # A third of them one id, as in text; 200 to 255 are out of range.
    tokens = torch.randint(0, 256, (size,), generator=generator)
    tokens[torch.rand(size, generator=generator) < 0.3] = 5
    if dtype in (torch.int32, torch.int64):
        tokens[3::50] = -1
        tokens[4::50] = torch.iinfo(dtype).min
    if dtype in (torch.uint32, torch.int32, torch.int64):
        tokens[5::50] = torch.iinfo(dtype).max
    if dtype == torch.int64:
        tokens[6::50] = 2**32 + 5
    counts = guarded(torch.ones(vocab_size, dtype=torch.int64), at_end)
    others = guarded(torch.ones(3, dtype=torch.int64), at_end)
    ids = guarded(tokens.to(dtype), at_end)
    CountTable(counts, *others).add(ids, ignore_index=ignore_index)
    counted = reference.count_tokens(tokens, vocab_size, ignore_index=ignore_index)
    assert (counts - 1).tolist() == counted.tolist()
    ignored = int((tokens == ignore_index).sum())
    assert others.tolist() == [1 + ignored, 1 + size - int(counted.sum()) - ignored, 1 + size]


LAWS = {
    "default": PowerLaw(),
    "fixed": PowerLaw(fixed={0: 0.25, 200: 3.0}),
    "types": PowerLaw(alpha=0.5, normalize="types"),
    "uniform": PowerLaw(alpha=0.0, blend=0.3),
    "limited": PowerLaw(alpha=2.0, smoothing=0.5, max_weight=3.0, blend=0.25),
    "authors": PowerLaw.reference(),
}
# The law says what is computed of an entry, and not which entries there are.
OF_MANY = ("default", "fixed")


@pytest.mark.parametrize("at_end", [False, True], ids=["before", "past_the_end"])
@pytest.mark.parametrize(
    ("vocab_size", "law"),
    [
        *itertools.product([1], LAWS),  # CUDA: one block, one thread with work
        *itertools.product([255], LAWS),  # CUDA: one thread without
        *itertools.product([256], LAWS),  # CUDA: one block
        *itertools.product([65537], OF_MANY),  # CUDA: one entry more than 256 blocks have threads
        *itertools.product([100003], OF_MANY),  # CUDA: some threads take a second entry
    ],
)
def test_token_weights_stay_within_their_tensors(guarded, vocab_size, law, at_end):
    law = LAWS[law]
    if law.fixed and vocab_size <= max(law.fixed):
        law = PowerLaw(alpha=0.5, normalize="none")
    counts = torch.randint(0, 1000, (vocab_size,), generator=torch.Generator().manual_seed(vocab_size))
    counts[::3] = 0
    counts[-1] = 2**40
    got = functional.token_weights(guarded(counts, at_end), law).double().cpu()
    truth = reference.token_weights(counts, law)
    # Computed in float64 and rounded once.
    assert ((got - truth).abs() <= torch.finfo(torch.float32).eps * truth).all()
    assert truth.all()


def test_the_blend_is_read_where_it_is(guarded, device):
    counts = torch.arange(300, device=device)
    blend = guarded(torch.tensor([0.25])).view(())
    got = PowerLaw().table(counts, blend, None)
    truth = reference.token_weights(counts, PowerLaw(blend=0.25))
    assert ((got - truth).abs() <= torch.finfo(torch.float32).eps * truth).all()
