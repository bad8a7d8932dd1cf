"""Inputs at the edge: nothing to count, masked vocabularies, huge offsets, infinities, weights that sum to zero."""

from __future__ import annotations

import mmap

import pytest
import torch
from computed import computed

from pdl_ext import PDLLoss, functional, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REDUCTIONS = ["mean", "token_mean", "sum", "none"]
FULL = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 9.0}


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_empty_batch(device, shape, reduction, options):
    logits = torch.zeros(*shape, 11, device=device, requires_grad=True)
    row_weight = torch.zeros(shape, device=device, requires_grad=True)
    targets = torch.zeros(shape, dtype=torch.int64, device=device)
    for shift in (False, True):
        loss, stats = functional.pdl_loss(
            logits, targets, row_weight=row_weight, reduction=reduction, shift=shift, return_stats=True, **options
        )
        assert loss.shape == (shape if reduction == "none" else ())
        assert stats.predicted.shape == shape
        loss.sum().backward()
        assert loss.sum() == 0
        assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_everything_ignored(make_case, reduction, options):
    case = make_case((5,), 257, row_weight=True)
    case.targets.fill_(-100)
    got = case.run(functional.pdl_loss, reduction=reduction, **options)
    assert not got["loss"].any()
    # The gradients exist, so that every rank of DDP takes part in the reduction.
    assert not got["grad_logits"].any()
    assert not got["grad_row_weight"].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_count_for_nothing_whatever_they_hold(make_case, dtype, reduction):
    case = make_case((6,), 1001, dtype, row_weight=True)
    ignored = case.targets == -100
    options = {**FULL, "reduction": reduction}
    clean = case.run(functional.pdl_loss, return_stats=True, **options)
    case.leaf[ignored] = torch.nan
    case.row_weight[ignored] = torch.inf
    dirty = case.run(functional.pdl_loss, return_stats=True, **options)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name
    assert clean["grad_logits"].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", ["tail", "first_chunk", "all_but_target"])
def test_masked_vocabulary(make_case, assert_matches, dtype, masked):
    case = make_case((6,), 3001, dtype, ignored=False)
    case.targets.clamp_(min=1100, max=2000)
    if masked == "tail":
        case.leaf[:, 2001:] = -torch.inf
    elif masked == "first_chunk":
        # A whole chunk of the kernel without one finite number, before the first finite one.
        case.leaf[:, :1050] = -torch.inf
    else:
        keep = case.leaf.gather(1, case.targets[:, None])
        case.leaf.fill_(-torch.inf).scatter_(1, case.targets[:, None], keep)
        got = case.run(functional.pdl_loss, reduction="none")
        assert not got["loss"].any()
        assert not got["grad_logits"].any()
    got = assert_matches(case, z_loss=0.01)
    assert not got["grad_logits"][case.leaf == -torch.inf].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "masked",
    [
        slice(0, 8),  # the first thread's first vector
        slice(0, 2000),  # all that some threads see first
        slice(1, 4500),  # all that some threads see at all
        slice(4600, None),  # the end
    ],
    ids=str,
)
def test_masked_stretches(make_case, assert_matches, dtype, masked):
    case = make_case((3,), 5001, dtype, ignored=False)
    case.targets[:] = torch.tensor([4501, 4555, 4599])
    case.leaf[:, masked] = -torch.inf
    got = assert_matches(case, z_loss=0.01)
    assert not got["grad_logits"][:, masked].any()
    # Through the transform as well; label smoothing would make the loss infinite.
    assert_matches(case, logit_scale=0.7)


def test_masked_by_the_logit_offset(make_case, assert_matches):
    case = make_case((6,), 2049)
    offset = torch.zeros(2049, device=case.leaf.device)
    offset[~torch.isin(torch.arange(2049, device=offset.device), case.targets)] = -torch.inf
    offset[:2] = 0.5
    got = assert_matches(case, logit_offset=offset)
    assert not got["grad_logits"][:, offset == -torch.inf].any()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothing"])
@pytest.mark.parametrize("offset", [1e4, -1e4, 3e6])
def test_common_offset_cancels(make_case, assert_accurate, offset, options):
    # Whole numbers survive the addition exactly, so the shifted rows have the same loss; lse itself would round.
    case = make_case((7,), 1009)
    case.leaf = case.leaf.mul(4).round()
    truth = case.run(reference.pdl_loss, torch.float64, **options)
    plain = case.run(reference.pdl_loss, **options)
    case.leaf = case.leaf + offset
    got = case.run(functional.pdl_loss, **options)
    for name in truth:
        assert_accurate(got[name], plain[name], truth[name], name)


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
# On both sides of +-1024, where the CPU's exponentials change their origin.
@pytest.mark.parametrize("offset", [-2000, -1030, -1010, -90, 90, 1010, 1030, 2000])
def test_common_offsets_of_16_bits(make_case, assert_matches, offset, dtype, inplace_backward):
    case = make_case((7,), 1009, dtype)
    case.leaf = (case.leaf.double() * 4 + offset).to(dtype)
    case.view = lambda leaf: leaf * 1
    assert_matches(case, inplace_backward=inplace_backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"softcap": 9.0}], ids=["plain", "smoothing", "softcap"]
)
@pytest.mark.parametrize("column", [0, 1024, 2048])
def test_nan_logits_give_nan(make_case, dtype, options, column):
    case = make_case((6,), 2049, dtype)
    case.leaf[0, column] = torch.nan
    loss = case.run(functional.pdl_loss, reduction="none", **options)
    assert loss["loss"][0].isnan()
    assert loss["loss"][2:].isfinite().all()
    assert loss["grad_logits"][0, column].isnan()
    assert loss["grad_logits"][1:].isfinite().all()
    assert case.run(functional.pdl_loss, **options)["loss"].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [1500, 2048])  # CUDA: in a vector, and behind the last one
def test_infinite_logits_give_no_plausible_number(make_case, dtype, column):
    case = make_case((6,), 2049, dtype, ignored=False)
    case.leaf[0, column] = torch.inf
    case.leaf[1] = -torch.inf
    case.leaf[2] = torch.nan
    got = case.run(functional.pdl_loss, reduction="none")
    assert got["loss"][:3].isnan().all()
    assert got["grad_logits"][:3].isnan().any(-1).all()
    assert got["loss"][3:].isfinite().all()


def test_infinite_loss_where_the_target_is_masked(make_case):
    case = make_case((4,), 257, ignored=False)
    case.leaf[0, case.targets[0]] = -torch.inf
    got = case.run(functional.pdl_loss, reduction="none")
    assert got["loss"][0] == torch.inf
    assert got["loss"][1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_target_probability_near_one(make_case, assert_matches, dtype):
    # p_y - 1 is about -1e-4: rounding p_y to bfloat16 first would lose it altogether.
    case = make_case((6,), 1009, dtype, ignored=False)
    case.leaf.scatter_(1, case.targets[:, None], 16.0)
    got = assert_matches(case, reduction="sum")
    at_target = got["grad_logits"].gather(1, case.targets[:, None])
    assert at_target.all()


@pytest.mark.parametrize("inplace_backward", [False, True], ids=["out_of_place", "inplace"])
def test_z_loss_of_a_certain_target(make_case, inplace_backward):
    # p_y is 1, so only the z-loss is left of its gradient: 6e-6 of what cancels, which plain PyTorch has to 1 %.
    case = make_case((5,), 257, ignored=False)
    leaf = torch.zeros_like(case.leaf).scatter_(1, case.targets.unsqueeze(1), 30.0).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    options = {"z_loss": 1e-7, "reduction": "sum"}
    reference.pdl_loss(exact, case.targets, case.token_weight, **options).backward()
    functional.pdl_loss(
        computed(leaf), case.targets, case.token_weight, inplace_backward=inplace_backward, **options
    ).backward()
    places = (torch.arange(5), case.targets.cpu())
    torch.testing.assert_close(leaf.grad.cpu()[places], exact.grad.cpu()[places].float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_far_from_zero(device, dtype):
    # Off the target each is its probability, rounded: 1/16 of an ulp is left for all that is computed.
    offsets = [0.0, 5.0, -40.0, 300.0, -1500.0, 3000.0, 20000.0, -60000.0]
    if dtype == torch.bfloat16:
        offsets += [1e6, -3e9, 3e38]
    largest = torch.tensor(offsets, dtype=torch.float64).to(dtype).double()[:, None]
    eps = torch.finfo(dtype).eps
    step = torch.where(largest == 0, 0.25, torch.exp2(largest.abs().clamp(min=1).log2().floor()) * eps)
    steps = torch.randint(12, (len(offsets), 1500), generator=torch.Generator().manual_seed(5))
    steps[:, 1] = 0
    logits = (largest - step * steps).to(dtype)
    assert (logits.double() == largest - step * steps).all()
    leaf = logits.to(device).requires_grad_()
    functional.pdl_loss(leaf, torch.zeros(len(offsets), dtype=torch.int64, device=device), reduction="sum").backward()
    exact = logits.double().softmax(-1)[:, 1:]
    least = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}[dtype]
    ulp = torch.exp2(exact.clamp(min=least).log2().floor()).mul(eps).clamp(min=least)
    worst = (leaf.grad.cpu().double()[:, 1:] - exact).abs().div(ulp).amax(1)
    assert (worst <= 0.5 + 1 / 16).all(), worst


@pytest.mark.parametrize("reduction", ["mean", "token_mean"])
def test_weights_that_sum_to_zero(make_case, reduction):
    case = make_case((5,), 257, row_weight=True)
    case.token_weight = torch.zeros_like(case.token_weight)
    got = case.run(functional.pdl_loss, reduction=reduction)
    assert got["loss"] == 0
    assert not got["grad_logits"].any()
    assert not got["grad_row_weight"].any()


def test_zero_weight_hides_one_row(make_case, assert_matches):
    case = make_case((6,), 257, row_weight=True, ignored=False)
    case.row_weight[2] = 0
    got = assert_matches(case)
    assert not got["grad_logits"][2].any()


def test_zero_normalizer_tensor_gives_zero(make_case):
    case = make_case((5,), 257)
    got = case.run(functional.pdl_loss, normalizer=torch.zeros((), device=case.leaf.device))
    assert got["loss"] == 0
    assert not got["grad_logits"].any()


def test_large_weights_stay_finite(make_case, assert_matches):
    # The authors' weight of a token never seen.
    case = make_case((6,), 257)
    case.token_weight = torch.full_like(case.token_weight, 1e7)
    assert_matches(case, reduction="sum")


@pytest.mark.parametrize("inplace_backward", [False, True], ids=["out_of_place", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 2, 33, 65])
def test_the_largest_logit_is_found_at_every_place(make_case, assert_matches, vocab_size, dtype, inplace_backward):
    case = make_case((vocab_size,), vocab_size, dtype, ignored=False)
    # exp(3000) is infinite in every dtype.
    case.leaf += 3000 * torch.eye(vocab_size, dtype=dtype, device=case.leaf.device)
    case.view = computed
    assert_matches(case, inplace_backward=inplace_backward)


@pytest.mark.devices("emulated", "cuda")
@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", [-1, 1000, 2**31 - 1, -(2**31), 2**32 + 3, -(2**63)])
def test_target_out_of_range_gives_nan(make_case, dtype, target, options):
    case = make_case((4,), 1000, dtype, ignored=False)
    clean = case.run(functional.pdl_loss, reduction="none", return_stats=True, **options)
    case.targets[2] = target
    got = case.run(functional.pdl_loss, reduction="none", return_stats=True, **options)
    others = [0, 1, 3]
    assert clean["grad_logits"][others].any(-1).all()
    for name in ("loss", "grad_logits", "nll", "weight", "lse"):
        assert got[name][2].isnan().all(), name
        assert torch.equal(got[name][others], clean[name][others]), name
    got = case.run(functional.pdl_loss, **options)
    assert got["loss"].isnan()


def test_modules_take_empty_and_ignored_batches(device):
    loss_fn = PDLLoss(vocab_size=11).to(device)
    logits = torch.zeros(3, 11, device=device, requires_grad=True)
    loss = loss_fn(logits, torch.full((3,), -100, device=device))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
    assert loss_fn.frequency.ignored == 3


@pytest.mark.devices("cpu", "emulated")
@pytest.mark.parametrize("card", ["sm_75", "sm_90"])  # one reads rows from memory twice, the other keeps them on chip
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("inplace_backward", [False, True], ids=["out_of_place", "inplace"])
def test_rows_more_than_2_to_31_elements_apart(device, monkeypatch, inplace_backward, reduction, card):
    monkeypatch.setenv("PDL_EXT_EMULATOR_DEVICE", card)
    vocab_size, apart = 1009, 2**31
    # Memory that is never touched costs nothing, so only the two rows are real.
    memory = mmap.mmap(-1, 2 * (apart + vocab_size))
    rows = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((2, vocab_size), (apart, 1))
    rows.copy_(torch.randn(2, vocab_size, generator=torch.Generator().manual_seed(0)))
    targets = torch.tensor([3, 1008])
    near = rows.clone(memory_format=torch.contiguous_format).requires_grad_()
    expected = functional.pdl_loss(near, targets, reduction=reduction)
    expected.backward(torch.full_like(expected, 3.0))
    assert near.grad.any(-1).all()
    leaf = rows.requires_grad_()
    loss = functional.pdl_loss(computed(leaf), targets, reduction=reduction, inplace_backward=inplace_backward)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 3.0))
    assert torch.equal(loss, expected)
    # At once, an upstream gradient other than 1 rounds once more.
    torch.testing.assert_close(gradient, near.grad, rtol=2**-6 if inplace_backward else 0, atol=0)
    assert (gradient.data_ptr() == rows.data_ptr()) == inplace_backward


@pytest.mark.parametrize("inplace_backward", [False, True], ids=["out_of_place", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_of_nan_shows_in_its_row(make_case, dtype, inplace_backward):
    # All bits set, as in memory that nobody has written: rounding to bfloat16 must not carry it into a number.
    case = make_case((4,), 1009, dtype, ignored=False)
    bits = torch.full((), -1, dtype=torch.int32).view(torch.float32)
    case.token_weight[case.targets[2]] = bits.to(case.token_weight.device)
    leaf = case.leaf.clone().requires_grad_()
    loss = functional.pdl_loss(
        leaf * 1, case.targets, case.token_weight, reduction="sum", inplace_backward=inplace_backward
    )
    loss.backward()
    assert loss.isnan()
    assert leaf.grad[2].isnan().all()
    assert leaf.grad[[0, 1, 3]].isfinite().all()
