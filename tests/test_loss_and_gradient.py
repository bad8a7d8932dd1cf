"""The loss that overwrites the logits with their gradient, in one call: accuracy in each regime, and its conditions."""

from __future__ import annotations

import functools
import itertools

import cuda_emulator
import pytest
import torch

from pdl_ext import PDLLoss, functional, reference
from pdl_ext.engine import ops
from pdl_ext.modulation import Focal, MiLe
from pdl_ext.options import LossOptions

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Replaced by the number that the fixture of this name gives.
UNCUT = "uncut"
EVERYTHING = {"label_smoothing": 0.1, "softcap": 9.0, "z_loss": 0.1, "logit_scale": 1.3}
NORMALIZED = {"modulation": MiLe(), "label_smoothing": 0.1, "label_smoothing_weight": "class", "z_loss": 0.1}


def from_a_model(case):
    """Gives the case logits that are not a leaf, so that they may be overwritten."""
    case.view = lambda leaf: leaf * 1
    return case


@pytest.fixture
def uncut(device, device_name):
    """So many rows that a card divides none of them, and more of them than run at once."""
    # If they are cheap, enough that plain PyTorch is not right by luck on the few targets near 1.
    numbers = {"emulated": 6, "cpu": 24}
    # A multiprocessor runs three at most.
    return numbers.get(device_name) or 3 * torch.cuda.get_device_properties(device).multi_processor_count + 1


@pytest.fixture
def assert_in_place_matches(assert_matches):
    return functools.partial(assert_matches, inplace_backward=True)


@pytest.mark.parametrize("options", [{}, EVERYTHING, NORMALIZED], ids=["plain", "everything", "normalized"])
@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_match_reference(make_case, assert_in_place_matches, dtype, reduction, options):
    # 1009: prime. Eight rows, two of them ignored.
    case = from_a_model(make_case((8,), 1009, dtype, row_weight=True))
    assert_in_place_matches(case, reduction=reduction, **options)


def test_offset_matches_reference(make_case, assert_in_place_matches):
    case = from_a_model(make_case((8,), 1009))
    offset = torch.randn(1009, generator=torch.Generator().manual_seed(1)).to(case.leaf.device)
    offset[5] = -torch.inf
    case.targets[case.targets == 5] = 6
    assert_in_place_matches(case, logit_offset=offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab_size"),
    [
        (5, 1),  # nothing but a target
        (5, 7),  # shorter than any vector
        (64, 5),  # CUDA: whole warps of rows
        (1300, 5),  # CUDA: more rows than the sum of their weights has threads
        (5, 1025),  # CPU: a second chunk of one element
        (5, 4097),  # CUDA: the shortest row of 256 threads, each row differently misaligned
        (1, 4097),  # CUDA: one row in one part of 16-bit logits, else in more
        (1, 32000),  # CUDA: one row in parts, merged in another launch
        (3, 50257),  # CUDA: misaligned rows in parts
        (UNCUT, 24576),  # CUDA: a block's share of 48 KiB, which with the kernel's own variables has to be asked for
        (UNCUT, 32000),  # CUDA: a row of one block, or of a cluster of 2 (float32) or 4 (float64)
        (UNCUT, 40009),  # CUDA: clusters of 2, 4 and 8, of whose blocks the last one has less
        pytest.param(UNCUT, 50257, marks=pytest.mark.slow),  # CUDA: misaligned rows, clusters of 2, 4 and 8
        pytest.param(UNCUT, 128256, marks=pytest.mark.slow),  # CUDA: clusters of 4, 8 and 16
    ],
)
def test_sizes_match_reference(make_case, assert_in_place_matches, uncut, rows, vocab_size, dtype):
    rows = uncut if rows == UNCUT else rows
    case = from_a_model(
        make_case((rows,), vocab_size, dtype, peaked=rows > 1 and vocab_size > 1025, row_weight=rows > 1)
    )
    assert_in_place_matches(case)
    assert_in_place_matches(case, return_stats=True)


@pytest.mark.devices("emulated")
@pytest.mark.parametrize(
    ("card", "dtype", "vocab_size"),
    [
        ("sm_75", torch.float32, 150001),  # fewer rows under way than there are: a block takes a second one
        ("sm_75", torch.bfloat16, 1009),  # no asynchronous copies: the second pass reads from L2
        ("sm_80", torch.bfloat16, 32000),  # two rows a multiprocessor
        ("sm_80", torch.float32, 50257),  # too long for that: from L2
        ("sm_90", torch.float64, 262144),  # too long for 16 blocks: from L2
        ("sm_100", torch.float32, 262144),  # 16 blocks
    ],
)
def test_cards_match_reference(make_case, assert_in_place_matches, monkeypatch, card, dtype, vocab_size):
    monkeypatch.setenv("PDL_EXT_EMULATOR_DEVICE", card)
    case = from_a_model(make_case((6,), vocab_size, dtype, peaked=True, row_weight=True))
    assert_in_place_matches(case, label_smoothing=0.1)
    assert_in_place_matches(case)


@pytest.mark.devices("emulated")
def test_a_build_for_an_older_card_uses_no_clusters(make_case, assert_in_place_matches, monkeypatch):
    # Its kernels know nothing of clusters, also where the driver compiles them for a card that has them.
    monkeypatch.setenv("PDL_EXT_EMULATOR_PTX", "80")
    assert_in_place_matches(from_a_model(make_case((6,), 50257)))


@pytest.mark.parametrize("vocab_size", [1009, 40001])
def test_masked_vocabulary(make_case, assert_in_place_matches, vocab_size):
    # Whole parts of a row are -inf, and one logit of a row may be +inf or NaN, which its whole gradient has to show.
    case = make_case((6,), vocab_size, ignored=False)
    case.leaf[:, : vocab_size // 2] = -torch.inf
    case.targets.fill_(vocab_size - 2)
    assert_in_place_matches(from_a_model(case))
    for bad in (torch.inf, torch.nan):
        leaf = case.leaf.clone()
        leaf[2, -1] = bad
        leaf.requires_grad_()
        loss = functional.pdl_loss(leaf * 1, case.targets, reduction="sum", inplace_backward=True)
        loss.backward()
        assert loss.isnan()
        assert leaf.grad[2].isnan().all()
        assert leaf.grad[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("level", [-88.6, -88.9, -500.0])
def test_a_masked_tile_below_no_other(make_case, assert_in_place_matches, level):
    # The origin of what is all -inf is 0, which may be far above every logit.
    case = make_case((6,), 9001, ignored=False)
    case.leaf += level - case.leaf.amax(-1, keepdim=True)
    case.leaf[:, :4500] = -torch.inf
    case.targets.fill_(9000)
    assert_in_place_matches(from_a_model(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("before", [0, 1, 3], ids=["aligned", "misaligned", "misaligned_differently"])
@pytest.mark.parametrize("vocab_size", [257, 20011])
def test_gradient_into_another_buffer(make_case, assert_accurate, dtype, options, before, vocab_size):
    case = make_case((6,), vocab_size, dtype)
    wide = torch.full((6, vocab_size + 16), 7.0, dtype=dtype, device=case.leaf.device)
    gradient = wide[:, before : before + vocab_size]
    given = case.leaf.clone()
    packed = LossOptions(**options).packed
    ops.compiled.loss_and_gradient_(
        case.leaf, gradient, case.targets, case.token_weight, None, None, None, packed, False
    )
    assert torch.equal(case.leaf, given)
    assert (wide[:, :before] == 7).all()
    assert (wide[:, before + vocab_size :] == 7).all()
    gradients = []
    for exact in (torch.float64, dtype):
        leaf = given.to(exact).requires_grad_()
        reference.pdl_loss(leaf, case.targets, case.token_weight, **options).backward()
        gradients.append(leaf.grad)
    assert_accurate(gradient, gradients[1], gradients[0])


FRESH_DEVICES = itertools.count(100)


@pytest.mark.devices("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Of MiLe the mean over rows is known only after all kernels of rows.
@pytest.mark.parametrize(
    "options", [{}, {"modulation": Focal()}, {"modulation": MiLe()}], ids=["plain", "Focal", "MiLe"]
)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("vocab_size", [257, 40009])  # a block, and a cluster of them
def test_the_kernels_of_a_step_prefer_the_same_shared_memory(
    make_case, monkeypatch, vocab_size, in_place, options, dtype
):
    # A device of its own, whose kernels have not been asked by another test.
    monkeypatch.setenv("PDL_EXT_EMULATOR_MULTIPROCESSORS", str(next(FRESH_DEVICES)))
    case = from_a_model(make_case((3,), vocab_size, dtype))
    # Another upstream gradient than the expected one, so that a kernel corrects or scales the gradient.
    upstream = torch.tensor(2.0)
    counts = []
    for _ in range(2):
        leaf = case.leaf.clone().requires_grad_()
        functional.pdl_loss(case.view(leaf), case.targets, inplace_backward=in_place, **options).backward(upstream)
        counts.append(cuda_emulator.library().cuda_emulator_carveout_changes())
    # The first step's kernels come after those of another test.
    assert counts[1] == counts[0]


@pytest.mark.parametrize("at_end", [False, True], ids=["before", "past_the_end"])
@pytest.mark.parametrize("vocab_size", [1, 7, 129, 4097, 20001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stays_within_its_tensors(make_case, guarded, dtype, vocab_size, at_end):
    case = make_case((5,), vocab_size, dtype, row_weight=True)
    case.row_weight = case.row_weight.to(ops.accumulator_dtype(dtype))
    logits, targets, token_weight, row_weight = (
        guarded(x, at_end) for x in (case.leaf, case.targets, case.token_weight, case.row_weight)
    )
    normalizer = guarded(torch.tensor([2.5, 3.5], dtype=row_weight.dtype), at_end)
    offset = guarded(torch.ones(vocab_size), at_end)
    options = LossOptions(label_smoothing=0.1, z_loss=0.01, softcap=9.0).packed
    ops.compiled.loss_and_gradient_(
        logits, logits, targets, token_weight, row_weight, offset, normalizer, options, True
    )
    assert logits.any()
    assert logits.isfinite().all()
    before = logits.clone()
    ops.compiled.scale_(logits, guarded(torch.tensor([2.0], dtype=row_weight.dtype), at_end))
    assert torch.equal(logits, 2 * before)


@pytest.mark.parametrize("vocab_size", [257, 50257])  # CUDA: a block, and a cluster of them
def test_a_bad_target_leaves_the_logits_alone(make_case, device_name, vocab_size):
    case = make_case((6,), vocab_size)
    case.targets[3] = vocab_size
    leaf = case.leaf.clone().requires_grad_()
    logits = leaf * 1
    if device_name == "cpu":
        with pytest.raises(IndexError, match=rf"got {vocab_size} at position \[3\]"):
            functional.pdl_loss(logits, case.targets, inplace_backward=True)
        assert torch.equal(logits.detach(), case.leaf)
        return
    loss = functional.pdl_loss(logits, case.targets, reduction="sum", inplace_backward=True)
    loss.backward()
    assert loss.isnan()
    assert leaf.grad[3].isnan().all()
    assert leaf.grad[0].isfinite().all()
    # In the mean the bad row's unknown weight is in the denominator of all.
    leaf.grad = None
    functional.pdl_loss(leaf * 1, case.targets, inplace_backward=True).backward()
    assert leaf.grad[[0, 2, 3, 4]].isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_when_the_logits_are_overwritten(make_case, dtype, reduction):
    case = make_case((2, 3), 257, dtype, ignored=False)
    logits = case.leaf.clone().requires_grad_() * 1
    loss = functional.pdl_loss(logits, case.targets, reduction=reduction, inplace_backward=True)
    at_once = reduction == "mean" and dtype != torch.float16
    assert torch.equal(logits.detach(), case.leaf) != at_once
    loss.sum().backward()
    assert not torch.equal(logits.detach(), case.leaf)


def test_logits_without_a_gradient_are_not_overwritten(make_case):
    case = make_case((6,), 257, row_weight=True)
    before = case.leaf.clone()
    functional.pdl_loss(case.leaf, case.targets, inplace_backward=True)
    row_weight = case.row_weight.requires_grad_()
    functional.pdl_loss(case.leaf, case.targets, row_weight=row_weight, inplace_backward=True).backward()
    assert row_weight.grad.any()
    with torch.no_grad():
        functional.pdl_loss(case.leaf.requires_grad_(), case.targets, inplace_backward=True)
    assert torch.equal(case.leaf.detach(), before)


def test_an_upstream_gradient_of_one_changes_no_bit(make_case):
    case = make_case((6,), 4099, torch.bfloat16)
    leaf = case.leaf.clone().requires_grad_()
    logits = leaf * 1
    loss = functional.pdl_loss(logits, case.targets, inplace_backward=True)
    at_once = logits.detach().clone()
    assert at_once.any()
    loss.backward()
    assert torch.equal(leaf.grad, at_once)


@pytest.mark.parametrize("factor", [3.0, -0.37, 0.0])
@pytest.mark.parametrize("vocab_size", [1009, 33001])
def test_scaling(device, factor, vocab_size):
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        values = torch.randn(5, vocab_size, generator=generator).to(device, dtype)
        wide = torch.cat([values, values], 1)
        wide_dtype = ops.accumulator_dtype(dtype)
        ops.compiled.scale_(wide[:, :vocab_size], torch.tensor(factor, dtype=wide_dtype, device=device))
        assert torch.equal(wide[:, :vocab_size], (values.to(wide_dtype) * factor).to(dtype))
        assert torch.equal(wide[:, vocab_size:], values)


def test_writing_to_the_logits_before_backward_raises(make_case):
    case = make_case((6,), 257)
    logits = case.leaf.clone().requires_grad_() * 1
    loss = functional.pdl_loss(logits, case.targets, inplace_backward=True)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_another_gradient_that_needs_the_logits_raises_before_any_backward(make_case):
    case = make_case((6,), 257)
    logits = case.leaf.clone().requires_grad_() * 1
    other = logits.square().sum()
    functional.pdl_loss(logits, case.targets, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("vocab_size", [17, 50257])
def test_empty_and_ignored(device, vocab_size):
    for targets in (torch.empty(0, dtype=torch.int64), torch.full((6,), -100)):
        leaf = torch.randn(targets.numel(), vocab_size).to(device).requires_grad_()
        loss = functional.pdl_loss(leaf * 1, targets.to(device), inplace_backward=True)
        loss.backward()
        assert loss.item() == 0
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_leaf_is_refused(make_case, dtype, reduction):
    # Its value would be gone, and its .grad would lie where it was.
    case = make_case((6,), 257, dtype)
    leaf = case.leaf.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="logits: got a leaf that requires grad"):
        functional.pdl_loss(leaf, case.targets, reduction=reduction, inplace_backward=True)
    assert torch.equal(leaf.detach(), case.leaf)


class Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def view_without_grad(leaf):
    with torch.no_grad():
        return leaf[:]


VIEWS = {
    "view": lambda leaf: leaf.view(2, 3, 257),
    "reshape": lambda leaf: leaf.reshape(3, 2, 257),
    "slice": lambda leaf: leaf[:],
    "rows": lambda leaf: leaf[2:5],
    "columns": lambda leaf: leaf[:, :200],
    "narrow": lambda leaf: leaf.narrow(0, 1, 3),
    "split": lambda leaf: leaf.split(2)[1],
    "unbind": lambda leaf: leaf.unbind(0)[1],
    "transposed twice": lambda leaf: leaf.t().t(),
    "transposed": lambda leaf: leaf[:, :6].t(),
    "as_strided": lambda leaf: leaf.as_strided((3, 257), (514, 1)),
    "expanded": lambda leaf: leaf[0].expand(4, 257),
    "cast to its own dtype": lambda leaf: leaf.to(leaf.dtype).view_as(leaf),
    "detached and attached": lambda leaf: Passed.apply(leaf),
    "made without gradients": view_without_grad,
    "view of a view": lambda leaf: leaf.view(2, 3, 257)[1].unsqueeze(0),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.devices("cpu", "cuda")
def test_a_view_of_a_leaf_is_refused(make_case, kind, reduction):
    # As PyTorch refuses to write to it: the parameter would become its own gradient.
    case = make_case((6,), 257)
    leaf = case.leaf.clone().requires_grad_()
    logits = VIEWS[kind](leaf)
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=leaf.device)
    with pytest.raises(RuntimeError, match=r"logits: got a (view of a )?leaf that requires grad"):
        functional.pdl_loss(logits, targets, reduction=reduction, inplace_backward=True)
    assert torch.equal(leaf.detach(), case.leaf)
    # Its gradient is not needed: nothing is overwritten.
    functional.pdl_loss(logits.detach(), targets, reduction=reduction, inplace_backward=True)
    with torch.no_grad():
        functional.pdl_loss(logits, targets, reduction=reduction, inplace_backward=True)
    assert torch.equal(leaf.detach(), case.leaf)
    if kind in ("split", "unbind", "detached and attached", "made without gradients"):
        # PyTorch itself refuses writes to these, whatever they are views of.
        return
    # The same view of a model's output is accepted.
    functional.pdl_loss(VIEWS[kind](leaf * 1), targets, reduction=reduction, inplace_backward=True).sum().backward()
    assert leaf.grad.any()


def test_copied_logits_are_left_alone(make_case):
    # Rows that are no view of the logits are copied, and the gradient lies in the copy.
    case = make_case((2, 5), 101)
    leaf = case.leaf.clone().requires_grad_()
    logits = leaf * 1
    part = logits[:, :-1].transpose(0, 1)
    loss = functional.pdl_loss(part, case.targets[:, :-1].t(), inplace_backward=True)
    with torch.no_grad():
        logits.zero_()
    (gradient,) = torch.autograd.grad(loss, leaf)
    gradient = gradient[:, :-1].transpose(0, 1)
    expected = case.leaf[:, :-1].transpose(0, 1).contiguous().requires_grad_()
    functional.pdl_loss(expected, case.targets[:, :-1].t()).backward()
    torch.testing.assert_close(gradient, expected.grad, rtol=1e-5, atol=1e-9)
    assert gradient.any()


def test_checkpointed_loss(make_case):
    case = make_case((6,), 257)
    gradients = []
    for inplace_backward in (False, True):
        leaf = case.leaf.clone().requires_grad_()
        loss_fn = PDLLoss(case.leaf.new_ones(257).long(), inplace_backward=inplace_backward)
        loss = torch.utils.checkpoint.checkpoint(
            lambda x, loss_fn=loss_fn: loss_fn(x * 1, case.targets), leaf, use_reentrant=False
        )
        (2 * loss).backward()
        gradients.append(leaf.grad)
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-9)


@pytest.mark.devices("emulated")
@pytest.mark.parametrize(
    ("rows", "vocab_size"),
    [
        (5, 33001),  # clusters
        (2, 33001),  # parts
    ],
)
def test_results_do_not_depend_on_the_order_of_threads(make_case, monkeypatch, rows, vocab_size):
    case = from_a_model(make_case((rows,), vocab_size, peaked=True))
    results = []
    for seed in range(6):
        monkeypatch.setenv("PDL_EXT_EMULATOR_SEED", str(seed))
        results.append(case.run(functional.pdl_loss, inplace_backward=True, label_smoothing=0.1, return_stats=True))
    assert results[0]["grad_logits"].any()
    for result in results[1:]:
        for name in result:
            assert torch.equal(result[name], results[0][name]), name


@pytest.mark.parametrize("inplace_backward", [False, True], ids=["two_calls", "at_once"])
def test_few_rows_without_a_target(make_case, device_name, inplace_backward):
    # Rows in parts, whose statistics another kernel merges. That kernel must recognise a bad target and an ignored row,
    # even if the ignored id is in the vocabulary.
    case = make_case((3,), 40001, ignored=False)
    case.targets[0] = 7
    leaf = case.leaf.clone().requires_grad_()
    options = {"reduction": "sum", "ignore_index": 7, "inplace_backward": inplace_backward, "return_stats": True}
    if device_name != "cpu":
        case.targets[1] = 40001
    loss, stats = functional.pdl_loss(leaf * 1, case.targets, case.token_weight, **options)
    loss.backward()
    assert stats.nll[0] == stats.weight[0] == 0
    assert stats.predicted[0] == -1
    assert not leaf.grad[0].any()
    assert leaf.grad[2].any()
    assert leaf.grad[2].isfinite().all()
    if device_name != "cpu":
        assert loss.isnan()
        assert stats.nll[1].isnan()
        assert leaf.grad[1].isnan().all()


@pytest.mark.devices("emulated", "cuda")
def test_few_rows_with_a_bad_target_read_nothing_behind_the_logits(make_case, guarded):
    case = make_case((3,), 40001, ignored=False)
    case.targets[2] = 2**30
    loss = functional.pdl_loss(guarded(case.leaf), case.targets, reduction="none")
    assert loss[:2].isfinite().all()
    assert loss[2].isnan()
