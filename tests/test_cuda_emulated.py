"""The CUDA kernels, run on the CPU by cuda_emulator: every launch path, alignment and dtype against the reference."""

from __future__ import annotations

import cuda_emulator
import pytest
import torch

from pdl_ext import PowerLaw, _ops, functional, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOKEN_DTYPES = [torch.uint8, torch.uint16, torch.int32, torch.uint32, torch.int64]
REDUCTIONS = ["mean", "token_mean", "sum", "none"]
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": -1.3},
    "offset": {"offset": True},
    "everything": {"label_smoothing": 0.05, "z_loss": 1e-3, "softcap": 20.0, "logit_scale": 1.3, "offset": True},
}


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """The emulated kernels stand in for the CPU's. What an op leaves unwritten is NaN, or the largest integer."""
    monkeypatch.setattr(_ops, "ops", cuda_emulator.load())
    torch.use_deterministic_algorithms(True)
    yield torch.device("cpu")
    torch.use_deterministic_algorithms(False)


def options_of(name, case):
    options = dict(OPTIONS[name])
    if options.pop("offset", False):
        options["logit_offset"] = torch.randn(case.leaf.shape[-1], generator=torch.Generator().manual_seed(3))
    return options


def misalign(case, before, after):
    """Puts the rows into wider ones, so that they lie `before` elements past an aligned address, each another way."""
    rows, vocab_size = case.leaf.shape
    wide = torch.full((rows, before + vocab_size + after), torch.nan, dtype=case.leaf.dtype)
    wide[:, before : before + vocab_size] = case.leaf
    case.leaf = wide
    # A leaf may not be written to in place; what a model hands over never is one.
    case.view = lambda leaf: leaf.clone()[:, before : before + vocab_size]


@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_matches_reference(make_case, assert_matches, dtype, reduction, options):
    # Four rows, one of them ignored; 1000: a multiple of no vector but float32's and float64's.
    case = make_case((4,), 1000, dtype, row_weight=True, peaked=options == "plain")
    assert_matches(case, reduction=reduction, return_stats=True, **options_of(options, case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocab_size"),
    [
        (5, 7),  # rows shorter than a vector or its head
        (5, 127),  # one element short of one a thread
        (5, 128),  # one element a thread; whole vectors, and threads without any
        (1, 1000),  # a vector a thread, not for every thread
        (5, 4096),  # the longest row for 128 threads
        (5, 4097),  # the shortest for 512; every other row differently misaligned
        (1, 32000),  # several vectors a thread, nothing left over
        (2, 50257),  # the same with head and tail
    ],
)
def test_sizes_match_reference(make_case, assert_matches, rows, vocab_size, dtype):
    case = make_case((rows,), vocab_size, dtype, row_weight=True)
    assert_matches(case, reduction="sum")
    assert_matches(case, reduction="token_mean", label_smoothing=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vocabulary_of_one(make_case, assert_matches, dtype):
    # p = 1, so only the z-loss has a gradient.
    assert_matches(make_case((5,), 1, dtype), z_loss=0.5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options_match_reference(make_case, assert_matches, dtype, options):
    case = make_case((3,), 257, dtype)
    assert_matches(case, **options_of(options, case))


@pytest.mark.parametrize("inplace_backward", [False, True], ids=["out_of_place", "inplace"])
@pytest.mark.parametrize("after", [0, 3], ids=["rows_alike", "rows_differ"])
@pytest.mark.parametrize("before", [0, 1, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_alignments_match_reference(make_case, assert_matches, dtype, before, after, inplace_backward):
    # 1001 with `before` and a whole number of vectors after; the gradient is contiguous, unless in place.
    case = make_case((4,), 1001, dtype)
    whole = -(before + 1001) % 8
    misalign(case, before, whole + after)
    assert_matches(case, label_smoothing=0.1, inplace_backward=inplace_backward)


@pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "inplace"])
@pytest.mark.parametrize("at_end", [False, True], ids=["before", "past_the_end"])
@pytest.mark.parametrize("vocab_size", [1, 7, 129, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_stays_within_its_tensors(make_case, dtype, vocab_size, at_end, inplace):
    case = make_case((3,), vocab_size, dtype, row_weight=True)
    case.row_weight = case.row_weight.to(_ops.accumulator_dtype(dtype))
    guarded = [cuda_emulator.guarded(x, at_end) for x in (case.leaf, case.targets, case.token_weight, case.row_weight)]
    logits, targets, token_weight, row_weight = guarded
    normalizer = cuda_emulator.guarded(torch.tensor([2.5], dtype=row_weight.dtype), at_end)
    offset = cuda_emulator.guarded(torch.ones(vocab_size), at_end)
    options = (_ops.REDUCTIONS["mean"], -100, 0.1, 0.01, 1.0, 9.0)
    loss, rows, totals, _ = _ops.ops.loss_forward(
        logits, targets, token_weight, row_weight, offset, normalizer, *options, True, inplace
    )
    saved = [cuda_emulator.guarded(x, at_end) for x in (torch.ones_like(loss), rows, totals)]
    arguments = (saved[0], logits, targets, *saved[1:], row_weight, offset, *options)
    if inplace:
        _ops.ops.loss_backward_(*arguments)
        assert logits.any()
        assert logits.isfinite().all()
    else:
        assert torch.equal(logits, case.leaf)
        gradient = _ops.ops.loss_backward(*arguments)
        assert gradient.any()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int32_targets(make_case, assert_matches, dtype, reduction, options):
    case = make_case((5,), 1000, dtype, row_weight=True)
    case.targets = case.targets.int()
    assert_matches(case, reduction=reduction, **options_of(options, case))


@pytest.mark.parametrize("layout", ["expanded", "strided"])
def test_layouts_of_the_upstream_gradient(make_case, layout):
    case = make_case((6,), 257, row_weight=True)
    upstream = torch.full((1,), 0.7).expand(6) if layout == "expanded" else torch.arange(1.0, 13.0)[::2]
    gradients = []
    for gradient in (upstream, upstream.contiguous()):
        leaf = case.leaf.clone().requires_grad_()
        functional.pdl_loss(leaf, case.targets, case.token_weight, reduction="none").backward(gradient)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_unsupported_dtypes_are_refused():
    ids = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="logits must be float32, bfloat16, float16 or float64"):
        _ops.ops.loss_forward(
            torch.zeros(3, 5, dtype=torch.int32), ids, None, None, None, None, 0, -100, 0.0, 0.0, 1.0, 0.0, False, False
        )
    with pytest.raises(RuntimeError, match="tokens must be"):
        _ops.ops.count_tokens_(ids, ids[0], ids[1], ids.short(), -100, False)


@pytest.mark.parametrize("reduction", ["mean", "token_mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_normalizer(make_case, assert_matches, dtype, reduction):
    assert_matches(make_case((5,), 1000, dtype, row_weight=True), reduction=reduction, normalizer=7.5, z_loss=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_weights(make_case, assert_matches, dtype):
    assert_matches(make_case((5,), 1000, dtype, token_weight=False))


def test_more_rows_than_threads(make_case, assert_matches):
    # 1024 threads sum up the rows: some take two.
    assert_matches(make_case((1500,), 7, row_weight=True), z_loss=0.1)


@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", [-1, 1000, 2**31 - 1, -(2**31), 2**32 + 3, -(2**63)])
def test_target_out_of_range_gives_nan(make_case, dtype, target, options):
    case = make_case((4,), 1000, dtype, ignored=False)
    clean = case.run(functional.pdl_loss, reduction="none", return_stats=True, **options_of(options, case))
    case.targets[2] = target
    got = case.run(functional.pdl_loss, reduction="none", return_stats=True, **options_of(options, case))
    others = [0, 1, 3]
    assert clean["grad_logits"][others].any(-1).all()
    for name in ("loss", "grad_logits", "nll", "weight", "lse"):
        assert got[name][2].isnan().all(), name
        assert torch.equal(got[name][others], clean[name][others]), name
    got = case.run(functional.pdl_loss, **options_of(options, case))
    assert got["loss"].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_count_for_nothing(make_case, dtype):
    case = make_case((5,), 1001, dtype, row_weight=True)
    ignored = case.targets == -100
    clean = case.run(functional.pdl_loss, z_loss=0.1)
    case.leaf[ignored], case.row_weight[ignored] = torch.nan, torch.inf
    got = case.run(functional.pdl_loss, z_loss=0.1)
    for name in clean:
        assert torch.equal(got[name], clean[name]), name
    assert not got["grad_logits"][ignored].any()
    assert got["grad_logits"][~ignored].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignore_index_inside_the_vocabulary(make_case, assert_matches, dtype):
    case = make_case((5,), 1001, dtype, row_weight=True, ignored=False)
    case.targets[2] = 7
    got = assert_matches(case, reduction="sum", ignore_index=7, return_stats=True)
    assert not got["grad_logits"][2].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_count(rows, reduction):
    logits = torch.ones(rows, 11, requires_grad=True)
    loss = functional.pdl_loss(logits, torch.full((rows,), -100), reduction=reduction, z_loss=0.1)
    assert not loss.any()
    loss.sum().backward()
    assert logits.grad.shape == logits.shape
    assert not logits.grad.any()


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
def test_masked_logits(make_case, assert_matches, dtype, masked):
    case = make_case((3,), 5001, dtype, ignored=False)
    case.targets[:] = torch.tensor([4501, 4555, 4599])
    case.leaf[:, masked] = -torch.inf
    got = assert_matches(case, z_loss=0.01)
    assert not got["grad_logits"][:, masked].any()
    # Through the transform as well; label smoothing would make the loss infinite.
    assert_matches(case, logit_scale=0.7)


@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [0, 600, 1000])
def test_nan_and_infinity_reach_the_loss(make_case, dtype, column, options):
    case = make_case((4,), 1001, dtype, ignored=False)
    case.leaf[0, column] = torch.nan
    got = case.run(functional.pdl_loss, reduction="none", **options_of(options, case))
    assert got["loss"][0].isnan()
    assert got["grad_logits"][0].isnan().all()
    assert got["loss"][1:].isfinite().all()
    assert got["grad_logits"][1:].isfinite().all()
    assert got["grad_logits"][1:].any(-1).all()
    if options == "plain":
        case.leaf[0, column] = torch.inf
        assert case.run(functional.pdl_loss, reduction="none")["loss"][0].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("vocab_size", [7, 1001, 4097])
def test_predicted_ties_take_the_lowest_index(make_case, dtype, vocab_size, start):
    case = make_case((5,), vocab_size, dtype, ignored=False)
    case.leaf.clamp_(max=1.0)
    places = torch.linspace(0, vocab_size - 1, 5).long()
    for row, first in enumerate(places):
        case.leaf[row, places[places >= first]] = 2.0
    misalign(case, start, 0)
    logits = case.view(case.leaf)
    _, stats = functional.pdl_loss(logits, case.targets, return_stats=True)
    assert torch.equal(stats.predicted, places)
    # All alike, and all masked but one.
    _, stats = functional.pdl_loss(torch.full_like(logits, 0.5), case.targets, return_stats=True)
    assert not stats.predicted.any()
    logits[:, :-1] = -torch.inf
    _, stats = functional.pdl_loss(logits, torch.full_like(case.targets, vocab_size - 1), return_stats=True)
    assert (stats.predicted == vocab_size - 1).all()


SMALL = 65537  # counts a grid of 256 blocks strides over once, and one entry more


@pytest.mark.parametrize(
    "law",
    [
        PowerLaw(),
        PowerLaw(alpha=0.5, normalize="types"),
        PowerLaw(alpha=0.0, blend=0.3),
        PowerLaw(alpha=2.0, smoothing=0.5, max_weight=3.0, blend=0.25),
        PowerLaw.reference(),
        PowerLaw(fixed={0: 0.25, 200: 3.0}),
    ],
    ids=["default", "types", "uniform", "limited", "authors", "fixed"],
)
@pytest.mark.parametrize(
    "vocab_size",
    [
        1,  # one block, one thread with work
        255,  # one thread without
        256,  # one block
        SMALL,  # the grid's limit passed by one entry
        100003,  # some threads take a second entry
    ],
)
def test_token_weights_match_reference(vocab_size, law):
    if vocab_size == 1:
        law = PowerLaw(alpha=0.5, normalize="none") if law.fixed else law
    counts = torch.randint(0, 1000, (vocab_size,), generator=torch.Generator().manual_seed(vocab_size))
    counts[::3] = 0
    counts[-1] = 2**40
    got = functional.token_weights(cuda_emulator.guarded(counts), law).double()
    truth = reference.token_weights(counts, law)
    # Computed in float64 and rounded once.
    assert ((got - truth).abs() <= torch.finfo(torch.float32).eps * truth).all()
    assert truth.all()


@pytest.mark.parametrize("normalize", ["corpus", "types", "none"])
def test_token_weights_without_counts_are_uniform(normalize):
    law = PowerLaw(normalize=normalize)
    counts = torch.zeros(300, dtype=torch.int64)
    got = functional.token_weights(counts, law)
    assert (got == got[0]).all()
    assert got[0] == reference.token_weights(counts, law)[0].float()


def test_token_weights_read_the_blend_where_it_is():
    counts = torch.arange(300)
    blend = cuda_emulator.guarded(torch.tensor([0.25])).view(())
    got = functional.weights_with_fixed(counts, PowerLaw(), blend, None)
    truth = reference.token_weights(counts, PowerLaw(blend=0.25))
    assert ((got - truth).abs() <= torch.finfo(torch.float32).eps * truth).all()


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
def test_histogram_is_exact(dtype, size, at_end):
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
    counts = cuda_emulator.guarded(torch.ones(vocab_size, dtype=torch.int64), at_end)
    rejected = cuda_emulator.guarded(torch.ones(2, dtype=torch.int64), at_end)
    ids = cuda_emulator.guarded(tokens.to(dtype), at_end)
    functional.add_tokens(counts, rejected[0], rejected[1], ids, ignore_index=ignore_index)
    assert torch.equal(counts - 1, reference.count_tokens(tokens, vocab_size, ignore_index=ignore_index))
    ignored = int((tokens == ignore_index).sum())
    assert rejected.tolist() == [1 + ignored, 1 + size - int((counts - 1).sum()) - ignored]


@pytest.mark.parametrize("token", [0, 99, 100, -100])
def test_histogram_of_one_id(token):
    counts, rejected = torch.zeros(100, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    functional.add_tokens(counts, rejected[0], rejected[1], torch.full((5001,), token), ignore_index=-100)
    truth = [0] * 102
    truth[{100: 101, -100: 100}.get(token, token)] = 5001
    assert [*counts.tolist(), *rejected.tolist()] == truth


def test_histogram_that_ignores_id_zero():
    # What the last warp's idle lanes hold must not be taken for it.
    tokens = torch.arange(45) % 9
    counts, rejected = torch.zeros(9, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    functional.add_tokens(counts, rejected[0], rejected[1], tokens, ignore_index=0)
    assert [*counts.tolist(), *rejected.tolist()] == [0, *[5] * 8, 5, 0]


def test_results_do_not_depend_on_the_order_of_threads(make_case, monkeypatch):
    # Everything is summed in a fixed order, so another schedule must not even change a rounding.
    case = make_case((5,), 4097, row_weight=True)
    counts = torch.arange(3000) % 7
    results = []
    for seed in range(8):
        monkeypatch.setenv("PDL_EXT_EMULATOR_SEED", str(seed))
        result = case.run(functional.pdl_loss, label_smoothing=0.1, z_loss=0.1, return_stats=True)
        result["weights"] = functional.token_weights(counts, PowerLaw())
        result["counts"] = functional.count_tokens(case.targets.clamp(min=0).repeat(999), 4097)
        results.append(result)
    for result in results[1:]:
        for name in result:
            assert torch.equal(result[name], results[0][name]), name
    assert results[0]["grad_logits"].any()


def test_strict_counting_is_refused():
    counts = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="strict counting"):
        torch.ops.pdl_ext_emulated.count_tokens_(counts, counts[0], counts[1], counts, -100, True)
