"""functional.pdl_loss against the reference in float64: every dtype, reduction, option and size regime."""

from __future__ import annotations

import math

import pytest
import torch

from pdl_ext import TokenFrequency, functional, reference
from pdl_ext.modulation import DFT, EAFT, AntiFocal, Focal, MiLe

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REDUCTIONS = ["mean", "token_mean", "sum", "none"]

# Each option alone, and all of them where they meet: "offset" stands for a random logit_offset.
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing_only": {"label_smoothing": 1.0},
    "smoothing_unweighted": {"label_smoothing": 0.1, "label_smoothing_weight": "none"},
    "smoothing_by_class": {"label_smoothing": 0.1, "label_smoothing_weight": "class"},
    "z_loss": {"z_loss": 0.01},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.7},
    "negative_scale": {"logit_scale": -1.3},
    "offset": {"offset": True},
    "focal": {"modulation": Focal()},
    "focal_below_one": {"modulation": Focal(0.5)},
    "focal_detached": {"modulation": Focal(1.0, detach=True)},
    "anti_focal": {"modulation": AntiFocal(1.5, 0.5)},
    "dft": {"modulation": DFT()},
    "mile": {"modulation": MiLe()},
    "mile_of_rows": {"modulation": MiLe(2.0, normalize=False)},
    "eaft": {"modulation": EAFT(1.5)},
    "everything": {
        "label_smoothing": 0.05,
        "z_loss": 1e-3,
        "softcap": 20.0,
        "logit_scale": 1.3,
        "offset": True,
        "modulation": Focal(0.7),
    },
}
# Whose derivative is not that of the value.
DETACHED = {"focal_detached", "anti_focal", "dft", "mile", "mile_of_rows", "eaft"}


def options_of(name, case):
    options = dict(OPTIONS[name])
    if options.pop("offset", False):
        generator = torch.Generator().manual_seed(3)
        options["logit_offset"] = torch.randn(case.leaf.shape[-1], generator=generator).to(case.leaf.device)
    return options


@pytest.mark.parametrize("peaked", [False, True], ids=["flat", "peaked"])
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_matches_reference(make_case, assert_matches, dtype, reduction, options, peaked):
    # 1009: prime, so no vector width, chunk or block divides it. Eight rows, two of them ignored.
    case = make_case((8,), 1009, dtype, peaked=peaked, row_weight=True)
    assert_matches(case, reduction=reduction, **options_of(options, case))


@pytest.mark.parametrize("peaked", [False, True], ids=["flat", "peaked"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_core_options_match_reference(make_case, assert_matches, dtype, options, peaked):
    case = make_case((4, 3), 257, dtype, peaked=peaked, row_weight=True)
    assert_matches(case, **options_of(options, case))
    assert_matches(case, return_stats=True, **options_of(options, case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5], ids=["one_row", "rows"])
@pytest.mark.parametrize(
    "vocab_size",
    [
        7,  # shorter than any vector
        127,  # CUDA: one element short of one a thread
        128,  # CUDA: one element a thread, in whole vectors, so that most threads have none
        257,  # one past a power of two: a byte tokenizer and its end token
        1000,  # no power of two; CUDA: a vector for some of the threads
        1023,  # one short of the CPU kernel's chunk
        1024,  # the chunk itself
        1025,  # a second chunk of one element
        2049,  # a third chunk of one element
        4096,  # CUDA: the longest row for 128 threads
        4097,  # CUDA: the shortest for 512, each row differently misaligned
        32000,  # LLaMA 2: even and aligned; CUDA: several vectors a thread, nothing left over
        50257,  # GPT-2: odd, so every other row is misaligned; CUDA: a head and a tail besides
        128256,  # LLaMA 3: a row of 256 KB in bfloat16
    ],
)
def test_sizes_match_reference(make_case, assert_matches, vocab_size, rows, dtype):
    case = make_case((rows,), vocab_size, dtype, peaked=rows == 1)
    assert_matches(case, reduction="sum")
    assert_matches(case, label_smoothing=0.1, z_loss=0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vocabulary_of_one(make_case, assert_matches, dtype):
    # p = 1, so only the z-loss has a gradient.
    case = make_case((5,), 1, dtype)
    assert_matches(case, z_loss=0.5)
    plain = case.run(functional.pdl_loss)
    assert plain["loss"] == 0
    assert not plain["grad_logits"].any()


@pytest.mark.parametrize(
    "rows",
    [
        2,  # fewer rows than threads on most machines
        300,  # several grains of the thread pool
        1024,  # CUDA: two for each of the threads that sum the rows
        1500,  # CUDA: some of those threads take three
        4099,  # prime, so that the parts of the threads are uneven; CUDA: a second turn of three rows
    ],
)
def test_many_rows_match_reference(make_case, assert_matches, rows):
    assert_matches(make_case((rows,), 131, row_weight=True), reduction="token_mean")


@pytest.mark.parametrize("reduction", ["mean", "token_mean"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_normalizer_replaces_the_denominator(make_case, assert_matches, dtype, as_tensor, reduction):
    case = make_case((8,), 101, dtype, row_weight=True)
    normalizer = torch.tensor(12.5, device=case.leaf.device) if as_tensor else 12.5
    got = assert_matches(case, reduction=reduction, normalizer=normalizer, z_loss=0.01)
    summed = case.run(functional.pdl_loss, reduction="sum", z_loss=0.01)
    torch.testing.assert_close(got["loss"], summed["loss"] / 12.5)


def test_integer_normalizer_tensor(make_case):
    case = make_case((8,), 101)
    got = case.run(functional.pdl_loss, normalizer=torch.tensor(6, device=case.leaf.device))
    assert torch.equal(got["loss"], case.run(functional.pdl_loss, normalizer=6)["loss"])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4), (2, 1)], ids=str)
def test_shift_matches_reference(make_case, assert_matches, shape, reduction):
    case = make_case(shape, 257, row_weight=True)
    if shape[-1] > 1:
        got = assert_matches(case, reduction=reduction, shift=True, return_stats=True, z_loss=0.01)
        assert not got["grad_logits"][..., -1, :].any()
    else:
        # Nothing has a next token.
        got = case.run(functional.pdl_loss, reduction=reduction, shift=True)
        assert not got["loss"].any()
        assert not got["grad_logits"].any()


def test_shift_equals_slicing(make_case):
    case = make_case((3, 6), 101, row_weight=True)
    got = case.run(functional.pdl_loss, shift=True)
    sliced = functional.pdl_loss(
        case.leaf[:, :-1], case.targets[:, 1:], case.token_weight, row_weight=case.row_weight[:, 1:]
    )
    torch.testing.assert_close(got["loss"], sliced, rtol=1e-6, atol=0)
    assert not got["grad_row_weight"][:, 0].any()


@pytest.mark.parametrize("peaked", [False, True], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_stats_match_reference(make_case, assert_matches, shift, dtype, peaked):
    case = make_case((3, 5), 2049, dtype, peaked=peaked, row_weight=True)
    options = {"shift": shift, "label_smoothing": 0.1, "softcap": 30.0}
    assert_matches(case, return_stats=True, **options)
    _, got = functional.pdl_loss(
        case.leaf, case.targets, case.token_weight, row_weight=case.row_weight, return_stats=True, **options
    )
    _, truth = reference.pdl_loss(
        case.leaf, case.targets, case.token_weight, row_weight=case.row_weight, return_stats=True, **options
    )
    assert torch.equal(got.predicted, truth.predicted)
    assert (got.predicted == -1).any()
    for values in got:
        assert not values.requires_grad
        assert values.shape == case.targets.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("vocab_size", [7, 3001, 4097])
def test_predicted_ties_take_the_lowest_index(make_case, dtype, vocab_size, start):
    case = make_case((5,), vocab_size, dtype, ignored=False)
    case.leaf.clamp_(max=1.0)
    places = torch.linspace(0, vocab_size - 1, 5, device=case.leaf.device).long()
    for row, first in enumerate(places):
        case.leaf[row, places[places >= first]] = 2.0
    logits = torch.nn.functional.pad(case.leaf, (start, 0))[:, start:]
    # By two calls, and by one.
    for requires_grad in (False, True):
        of_these = logits.clone().requires_grad_(requires_grad)
        _, stats = functional.pdl_loss(of_these, case.targets, return_stats=True)
        assert torch.equal(stats.predicted, places)
    # Equals that one thread of a CUDA block sees at once.
    spread = torch.zeros(1, 20_000, dtype=dtype, device=logits.device)
    spread[0, [100, 4196, 8292]] = 1.0
    _, stats = functional.pdl_loss(spread, case.targets[:1], return_stats=True)
    assert stats.predicted.tolist() == [100]
    # All alike, and all masked but one.
    _, stats = functional.pdl_loss(torch.full_like(logits, 0.5), case.targets, return_stats=True)
    assert not stats.predicted.any()
    logits[:, :-1] = -torch.inf
    _, stats = functional.pdl_loss(logits, torch.full_like(case.targets, vocab_size - 1), return_stats=True)
    assert (stats.predicted == vocab_size - 1).all()


def test_stats_change_neither_loss_nor_gradient(make_case):
    case = make_case((8,), 1009, row_weight=True)
    without, with_stats = (case.run(functional.pdl_loss, return_stats=value) for value in (False, True))
    for name in without:
        assert torch.equal(without[name], with_stats[name])
        assert without[name].any()


@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int32_targets_equal_int64(make_case, dtype, reduction, options):
    case = make_case((8,), 257, dtype)
    keywords = options_of(options, case)
    wide = case.run(functional.pdl_loss, reduction=reduction, **keywords)
    case.targets = case.targets.int()
    narrow = case.run(functional.pdl_loss, reduction=reduction, **keywords)
    for name in wide:
        assert torch.equal(wide[name], narrow[name])
        assert wide[name].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [-1, 0, 5, 300])
def test_other_ignore_index(make_case, assert_matches, ignore_index, reduction):
    # Also one inside the vocabulary, and one above it.
    case = make_case((9,), 257, ignored=False)
    case.targets[::3] = ignore_index
    got = assert_matches(case, ignore_index=ignore_index, reduction=reduction, return_stats=True)
    assert not got["grad_logits"][::3].any()
    assert got["grad_logits"][1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_row_weight_of_another_dtype(make_case, dtype):
    case = make_case((8,), 257, row_weight=True)
    case.row_weight = case.row_weight.to(dtype)
    got = case.run(functional.pdl_loss)
    case.row_weight = case.row_weight.float()
    wide = case.run(functional.pdl_loss)
    assert torch.equal(got["loss"], wide["loss"])
    assert torch.equal(got["grad_row_weight"], wide["grad_row_weight"].to(dtype))


def test_result_dtypes(make_case):
    for dtype in DTYPES:
        got = make_case((4,), 11, dtype).run(functional.pdl_loss, return_stats=True)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert {got[name].dtype for name in ("loss", "nll", "weight", "lse")} == {wide}
        assert got["grad_logits"].dtype == dtype
        assert got["grad_logits"].any()


@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradients_are_rounded_to_nearest(make_case, dtype, options):
    case = make_case((8,), 2049, dtype, peaked=True)
    keywords = options_of(options, case)
    narrow = case.run(functional.pdl_loss, reduction="sum", **keywords)["grad_logits"]
    case.leaf = case.leaf.float()
    wide = case.run(functional.pdl_loss, reduction="sum", **keywords)["grad_logits"]
    # The sums of the statistics may differ in their last bit, which now and then is what a tie hangs on.
    assert (narrow == wide.to(dtype)).double().mean() > 0.995
    assert narrow.any(-1)[0]


def test_one_position_without_leading_shape(make_case, assert_matches):
    case = make_case((), 257)
    assert case.run(functional.pdl_loss, reduction="none")["loss"].shape == ()
    assert_matches(case)


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("options", [name for name in OPTIONS if name not in DETACHED])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(make_case, reduction, options):
    case = make_case((2, 3), 11, torch.float64, row_weight=True)
    keywords = options_of(options, case)

    def loss(logits, row_weight):
        return functional.pdl_loss(
            logits, case.targets, case.token_weight, row_weight=row_weight, reduction=reduction, **keywords
        )

    inputs = (case.leaf.requires_grad_(), case.row_weight.double().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize(
    "keywords", [{"normalizer": 3.5}, {"shift": True}, {"shift": True, "normalizer": 2.0}], ids=str
)
def test_gradcheck_of_normalizer_and_shift(make_case, keywords):
    case = make_case((2, 4), 7, torch.float64, row_weight=True)

    def loss(logits, row_weight):
        return functional.pdl_loss(
            logits, case.targets, case.token_weight, row_weight=row_weight, z_loss=0.1, **keywords
        )

    assert torch.autograd.gradcheck(loss, (case.leaf.requires_grad_(), case.row_weight.double().requires_grad_()))


def test_only_row_weight_requires_grad(make_case):
    case = make_case((8,), 101, row_weight=True)
    both = case.run(functional.pdl_loss)
    row_weight = case.row_weight.clone().requires_grad_()
    loss = functional.pdl_loss(case.leaf, case.targets, case.token_weight, row_weight=row_weight)
    (alone,) = torch.autograd.grad(loss, row_weight)
    upstream = torch.randn((), generator=torch.Generator().manual_seed(17)) + 0.1
    torch.testing.assert_close(alone * upstream.to(alone), both["grad_row_weight"])
    assert alone.any()


def test_no_graph_without_grad(make_case):
    case = make_case((4,), 11)
    assert not functional.pdl_loss(case.leaf, case.targets).requires_grad
    with torch.no_grad():
        assert not functional.pdl_loss(case.leaf.clone().requires_grad_(), case.targets).requires_grad


def test_loss_of_a_uniform_row_is_log_v(device):
    loss = functional.pdl_loss(torch.full((3, 50257), 2.5, device=device), torch.tensor([0, 7, 50256], device=device))
    assert float(loss) == pytest.approx(math.log(50257), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.uint32, torch.int64])
def test_count_tokens_matches_reference(device, dtype):
    tokens = torch.randint(0, 130, (7, 33), generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    got = functional.count_tokens(tokens, 120, ignore_index=3)
    assert torch.equal(got, reference.count_tokens(tokens, 120, ignore_index=3))
    assert got[3] == 0
    assert got.sum() > 0


def test_decoding_offset(device):
    counts = torch.tensor([7, 0, 1], device=device)
    offset = functional.decoding_offset(counts, 0.5)
    assert offset.dtype == torch.float32
    expected = torch.tensor([-0.5 * math.log(count / 11) for count in (8, 1, 2)], device=device)
    torch.testing.assert_close(offset, expected)
    assert torch.equal(functional.decoding_offset(TokenFrequency.from_counts(counts), 0.5), offset)


@pytest.mark.parametrize(
    ("frequency", "alpha", "message"),
    [
        (torch.ones(3), 0.5, "counts: got dtype torch.float32, expected int64"),
        (torch.ones(3, dtype=torch.int64), math.inf, r"alpha: got inf, expected a number from -10000 to 10000"),
    ],
)
def test_decoding_offset_of_what_is_none(frequency, alpha, message):
    with pytest.raises((TypeError, ValueError), match=message):
        functional.decoding_offset(frequency, alpha)


def test_decoding_offset_of_huge_counts():
    counts = torch.tensor([2**62, 2**62 - 1, 0])
    expected = torch.tensor([math.log(2), math.log(2), 63 * math.log(2)])
    torch.testing.assert_close(functional.decoding_offset(counts, 1.0), expected)
