"""The fused linear: its accuracy against the unfused reference in float64, its memory, and its errors."""

from __future__ import annotations

import copy
import sys

import fresh_python
import pytest
import torch
import torch.nn.functional as F
from test_functional import DTYPES, OPTIONS, REDUCTIONS
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from pdl_ext import PDLLoss, functional, reference
from pdl_ext.engine import linear
from pdl_ext.options import LossOptions

HIDDEN = 24


@pytest.fixture
def small_slabs(monkeypatch):
    """Allows slabs of a few rows or columns, so that small inputs have several of them."""
    monkeypatch.setattr(linear, "_LEAST_ROWS", 4)
    monkeypatch.setattr(linear, "_LEAST_COLUMNS", 64)


@pytest.fixture
def make_linear(device):
    """Builds hidden, weight, bias, targets, token_weight and row_weight; the first three and the last require grad."""

    def make(rows=13, vocab_size=257, dtype=torch.float32, *, hidden=HIDDEN, ignored=True):
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, hidden, generator=generator).to(device, dtype).requires_grad_()
        weight = (0.4 * torch.randn(vocab_size, hidden, generator=generator)).to(device, dtype).requires_grad_()
        bias = torch.randn(vocab_size, generator=generator).to(device, dtype).requires_grad_()
        targets = torch.randint(vocab_size, (rows,), generator=generator).to(device)
        if ignored:
            targets[1::4] = -100
        token_weight = (0.2 + 3 * torch.rand(vocab_size, generator=generator)).to(device)
        row_weight = (0.3 + torch.rand(rows, generator=generator)).to(device).requires_grad_()
        return x, weight, bias, targets, token_weight, row_weight

    return make


def run(function, tensors, dtype=None, upstream=None, **options):
    """Loss, statistics and gradients of a call, in `dtype` if given."""
    x, weight, bias, targets, token_weight, row_weight = tensors
    x, weight, bias, row_weight = (
        None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_(t.requires_grad)
        for t in (x, weight, bias, row_weight)
    )
    loss, stats = function(
        x, weight, targets, token_weight, bias=bias, row_weight=row_weight, return_stats=True, **options
    )
    if upstream is None:
        upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)) + 0.1
    loss.backward(upstream.to(loss))
    results = {"loss": loss.detach(), "nll": stats.nll, "weight": stats.weight, "lse": stats.lse}
    leaves = {"grad_hidden": x, "grad_weight": weight, "grad_bias": bias, "grad_row_weight": row_weight}
    return results | {name: leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}


def assert_all_accurate(assert_accurate, got, plain, truth):
    assert got.keys() == truth.keys()
    for name in truth:
        # Entries of a product are sums of terms that cancel: several of the largest set the size of the rounding.
        size = 4 * truth[name].abs().max().expand_as(truth[name]) if name.startswith("grad") else None
        assert_accurate(got[name], plain[name], truth[name], name, size)


def options_of(name, tensors):
    options = dict(OPTIONS[name])
    if options.pop("offset", False):
        options["logit_offset"] = torch.randn(tensors[1].shape[0], generator=torch.Generator().manual_seed(3)).to(
            tensors[0].device
        )
    return options


@pytest.mark.parametrize("slab_rows", [None, 4], ids=["one_slab", "slabs"])
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(make_linear, small_slabs, assert_accurate, dtype, reduction, options, slab_rows):
    tensors = make_linear(dtype=dtype)
    options = options_of(options, tensors) | {"reduction": reduction}
    limit = None if slab_rows is None else slab_rows * 320 * dtype.itemsize
    got = run(functional.linear_pdl_loss, tensors, max_chunk_bytes=limit, **options)
    plain = run(reference.linear_pdl_loss, tensors, **options)
    truth = run(reference.linear_pdl_loss, tensors, torch.float64, **options)
    assert_all_accurate(assert_accurate, got, plain, truth)


@pytest.mark.parametrize("slab_rows", [None, 4], ids=["one_slab", "slabs"])
@pytest.mark.parametrize("options", ["focal", "anti_focal", "dft", "mile", "eaft", "smoothing_unweighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_family_matches_reference(make_linear, small_slabs, assert_accurate, dtype, options, slab_rows):
    tensors = make_linear(dtype=dtype)
    limit = None if slab_rows is None else slab_rows * 320 * dtype.itemsize
    got = run(functional.linear_pdl_loss, tensors, max_chunk_bytes=limit, **OPTIONS[options])
    plain = run(reference.linear_pdl_loss, tensors, **OPTIONS[options])
    truth = run(reference.linear_pdl_loss, tensors, torch.float64, **OPTIONS[options])
    assert_all_accurate(assert_accurate, got, plain, truth)


@pytest.mark.parametrize("options", OPTIONS)
def test_options_match_the_unfused_loss(make_linear, small_slabs, options):
    tensors = make_linear(dtype=torch.float64)
    options = options_of(options, tensors) | {"normalizer": 7.5}

    def unfused(hidden, weight, targets, token_weight, *, bias, **others):
        return functional.pdl_loss(F.linear(hidden, weight, bias), targets, token_weight, **others)

    got = run(functional.linear_pdl_loss, tensors, max_chunk_bytes=4 * 320 * 8, **options)
    expected = run(unfused, tensors, **options)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("accumulate", ["float32", "weight"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_rows_than_a_column_slab_takes(make_linear, small_slabs, assert_accurate, reduction, accumulate):
    # 40 rows of 64 columns at 4 of 320 elements: slabs of columns are cut along the rows, too.
    tensors = make_linear(53, dtype=torch.bfloat16)
    options = {"reduction": reduction}
    got = run(functional.linear_pdl_loss, tensors, max_chunk_bytes=4 * 320 * 2, accumulate=accumulate, **options)
    plain = run(reference.linear_pdl_loss, tensors, **options)
    truth = run(reference.linear_pdl_loss, tensors, torch.float64, **options)
    if accumulate == "weight":
        # Ten roundings in between, which is the documented limit.
        error = (got.pop("grad_weight").double() - truth["grad_weight"]).norm() / truth.pop("grad_weight").norm()
        assert error < 0.02
    assert_all_accurate(assert_accurate, got, plain, truth)


def test_sums_in_float32(make_linear, small_slabs, assert_accurate, monkeypatch):
    # As on CUDA, but for how one product is added.
    monkeypatch.setattr(linear._Problem, "sums_in_float32", True)
    tensors = make_linear(53, dtype=torch.bfloat16)
    got = run(functional.linear_pdl_loss, tensors, max_chunk_bytes=4 * 320 * 2)
    plain = run(reference.linear_pdl_loss, tensors)
    truth = run(reference.linear_pdl_loss, tensors, torch.float64)
    assert_all_accurate(assert_accurate, got, plain, truth)


def test_sum_over_slabs_does_not_lose_small_terms(make_linear, small_slabs):
    # 256 equal terms: a bfloat16 sum stops growing at half of it.
    hidden = torch.ones(256, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(256, dtype=torch.int64)
    loss = functional.linear_pdl_loss(hidden, weight, targets, reduction="sum", max_chunk_bytes=4 * 64 * 2)
    loss.backward()
    assert weight.grad.flatten().tolist() == [-128.0, 128.0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("ignored", [0, 1, 30, 59, 60])
def test_dropped_rows_leave_no_trace(make_linear, small_slabs, reduction, ignored):
    x, weight, bias, targets, token_weight, row_weight = make_linear(60, dtype=torch.float64, ignored=False)
    targets[torch.randperm(60, generator=torch.Generator().manual_seed(0))[:ignored]] = -100
    tensors = x, weight, bias, targets, token_weight, row_weight
    got = run(functional.linear_pdl_loss, tensors, reduction=reduction, max_chunk_bytes=8 * 320 * 8)
    expected = run(reference.linear_pdl_loss, tensors, reduction=reduction)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-14, msg=name)
    if ignored == 60:
        assert not any(value.any() for value in got.values())


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(make_linear, rows):
    tensors = make_linear(rows, dtype=torch.float64, ignored=False)
    got = run(functional.linear_pdl_loss, tensors)
    expected = run(reference.linear_pdl_loss, tensors)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("shape", ["rows", "batch_of_one"])
def test_transposed_hidden_states(make_linear, shape, retain):
    _, weight, _, targets, *_ = make_linear(dtype=torch.float64, ignored=False)
    results = []
    for function in (functional.linear_pdl_loss, reference.linear_pdl_loss):
        base = torch.randn(HIDDEN, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        base = base.to(weight.device).requires_grad_()
        hidden, ids = (base.t(), targets) if shape == "rows" else (base[None].transpose(1, 2), targets[None])
        function(hidden, weight, ids).mul(1.5).backward(retain_graph=retain)
        results.append(base.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shape_shift_strides_and_int32(make_linear, device, reduction):
    _, weight, bias, _, token_weight, _ = make_linear(dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, HIDDEN, 7, generator=generator, dtype=torch.float64).to(device).transpose(1, 2)
    targets = torch.randint(257, (3, 7), generator=generator, dtype=torch.int32).to(device)
    targets[0, 3] = -100
    row_weight = torch.rand(3, 7, generator=generator).to(device).requires_grad_()
    strided = torch.empty(HIDDEN, 257, dtype=torch.float64, device=device).copy_(weight.detach().t()).t()
    tensors = hidden.requires_grad_(), strided.requires_grad_(), bias, targets, token_weight, row_weight
    got = run(functional.linear_pdl_loss, tensors, shift=True, reduction=reduction)
    expected = run(reference.linear_pdl_loss, tensors, shift=True, reduction=reduction)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-14, msg=name)


def products_of(call):
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    counts = {event.key: event.count for event in recorded.key_averages()}
    return sum(counts.get(f"aten::{name}", 0) for name in ("mm", "addmm", "addmm_"))


@pytest.mark.devices("cpu")
@pytest.mark.parametrize(
    ("needs", "products"),
    [((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)],
    ids=["both", "frozen_head", "frozen_body", "neither"],
)
def test_what_is_not_needed_is_not_computed(make_linear, needs, products):
    hidden, weight, _, targets, *_ = make_linear()
    hidden.requires_grad_(needs[0]), weight.requires_grad_(needs[1])

    def step():
        loss = functional.linear_pdl_loss(hidden, weight, targets)
        if any(needs):
            loss.backward()

    assert products_of(step) == products
    assert [hidden.grad is not None, weight.grad is not None] == list(needs)


@pytest.mark.devices("cpu")
def test_no_grad_makes_one_product(make_linear):
    hidden, weight, _, targets, *_ = make_linear()
    with torch.no_grad():
        assert products_of(lambda: functional.linear_pdl_loss(hidden, weight, targets)) == 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_of_a_retained_graph(make_linear, reduction):
    hidden, weight, bias, targets, token_weight, _ = make_linear()
    loss = functional.linear_pdl_loss(hidden, weight, targets, token_weight, bias=bias, reduction=reduction)
    inputs = hidden, weight, bias
    first = torch.autograd.grad(loss, inputs, torch.full_like(loss, 0.5), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, inputs, torch.full_like(loss, 2.0))
    for before, now, later in zip(kept, first, second, strict=True):
        assert torch.equal(before, now)
        torch.testing.assert_close(later, 4 * before)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward(torch.ones_like(loss))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_refused(make_linear, reduction):
    hidden, weight, _, targets, *_ = make_linear()
    loss = functional.linear_pdl_loss(hidden, weight, targets, reduction=reduction).sum()
    for gradient in torch.autograd.grad(loss, (hidden, weight), create_graph=True):
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward(retain_graph=True)


def test_tied_embeddings_add_up(make_linear):
    _, table, _, targets, token_weight, _ = make_linear(dtype=torch.float64, ignored=False)
    ids = targets.flip(0)
    results = []
    for function in (functional.linear_pdl_loss, reference.linear_pdl_loss):
        table.grad = None
        function(F.embedding(ids, table).tanh(), table, targets, token_weight).backward()
        results.append(table.grad)
    torch.testing.assert_close(*results)


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(make_linear, reentrant):
    hidden, weight, bias, targets, token_weight, _ = make_linear()
    results = []
    for recompute in (False, True):
        hidden.grad = weight.grad = None

        def body(x):
            return functional.linear_pdl_loss(x.tanh(), weight, targets, token_weight, bias=bias)

        loss = checkpoint(body, hidden, use_reentrant=reentrant) if recompute else body(hidden)
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_linear(make_linear, device, small_slabs, assert_accurate, dtype, reduction):
    tensors = make_linear()

    def autocast(function):
        def call(*args, **options):
            with torch.autocast(device.type, dtype):
                return function(*args, **options)

        return call

    got = run(autocast(functional.linear_pdl_loss), tensors, reduction=reduction, max_chunk_bytes=4 * 320 * 2)
    plain = run(autocast(reference.linear_pdl_loss), tensors, reduction=reduction)
    truth = run(reference.linear_pdl_loss, tensors, torch.float64, reduction=reduction)
    assert got["grad_weight"].dtype == got["grad_hidden"].dtype == torch.float32
    for name in truth:
        size = truth[name].abs().max().expand_as(truth[name])
        error = ((got[name] - truth[name]).abs() / size).max()
        allowed = 2 * ((plain[name] - truth[name]).abs() / size).max() + torch.finfo(dtype).eps
        assert error <= allowed < 0.1, name


@pytest.mark.devices("cpu", "cuda")
def test_float16_gradients_wait_for_the_loss_scale_whatever_autocast_computes_in(make_linear, device):
    tensors = make_linear(dtype=torch.float16)
    with torch.autocast(device.type, torch.bfloat16):
        # Without the scale a gradient is far below the smallest float16.
        loss = functional.linear_pdl_loss(*tensors[:2], tensors[3], normalizer=1e9)
    (loss * 2.0**24).backward()
    assert tensors[0].grad.any()
    assert tensors[1].grad.any()


@pytest.mark.devices("cpu", "cuda")
def test_autocast_casts_no_float64(make_linear, device):
    hidden, weight, _, targets, *_ = make_linear()
    with torch.autocast(device.type, torch.bfloat16):
        with pytest.raises(TypeError, match=r"weight: got dtype torch\.float32, expected torch\.float64"):
            functional.linear_pdl_loss(hidden.double(), weight, targets)
        with pytest.raises(TypeError, match=r"weight: got dtype torch\.float64, expected torch\.float32"):
            functional.linear_pdl_loss(hidden, weight.double(), targets)


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("function", ["linear", "logits"])
def test_first_derivative_with_a_graph_through_a_checkpoint(make_linear, function):
    hidden, weight, _, targets, *_ = make_linear()

    def body(x):
        if function == "linear":
            return functional.linear_pdl_loss(x.tanh(), weight, targets)
        return functional.pdl_loss(x.tanh() @ weight.t(), targets)

    (expected,) = torch.autograd.grad(body(hidden), hidden)
    loss = checkpoint(body, hidden, use_reentrant=False)
    (got,) = torch.autograd.grad(loss, hidden, create_graph=True)
    torch.testing.assert_close(got, expected)


@pytest.mark.slow
@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_break(make_linear, reduction):
    torch._dynamo.reset()
    tensors = make_linear()
    compiled = torch.compile(functional.linear_pdl_loss, fullgraph=True)
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01}
    eager, got = run(functional.linear_pdl_loss, tensors, **options), run(compiled, tensors, **options)
    for name in eager:
        torch.testing.assert_close(got[name], eager[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.devices("cpu", "cuda")
def test_opcheck(make_linear, device):
    hidden, weight, bias, targets, token_weight, row_weight = (t.detach() for t in make_linear())
    options = LossOptions(label_smoothing=0.1, z_loss=0.01).packed
    how = (torch.float32, None, True, True, 0, 257, 257, 257, "")
    needs = [True, True, False]
    classifier = (hidden, weight, bias, needs)
    arguments = (*classifier, targets, token_weight, row_weight, None, None, options, True, *how)
    torch.library.opcheck(torch.ops.pdl_ext.linear_loss_forward.default, arguments)
    loss, saved_rows, factors, *_ = torch.ops.pdl_ext.linear_loss_forward(*arguments)
    arguments = (loss, *classifier, targets, saved_rows, factors, None, row_weight, None, options, *how)
    torch.library.opcheck(torch.ops.pdl_ext.linear_loss_backward.default, arguments)


def test_module_counts_as_forward_does(make_linear):
    hidden, weight, bias, targets, _, row_weight = make_linear()
    hidden, weight, bias = (t.detach() for t in (hidden, weight, bias))
    fused = PDLLoss(alpha=0.7, label_smoothing=0.1)
    unfused = copy.deepcopy(fused)
    for _ in range(2):
        loss = fused.linear(hidden, weight, targets, bias, row_weight=row_weight)
        torch.testing.assert_close(loss, unfused(F.linear(hidden, weight, bias), targets, row_weight=row_weight))
    assert torch.equal(fused.frequency.counts, unfused.frequency.counts)
    assert fused.frequency.total == 2 * int((targets >= 0).sum())


HIDDEN_STATES, WEIGHT, TARGETS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"hidden": torch.zeros(2, 3, 5)},
            ValueError,
            r"hidden: got shape \[2, 3, 5\], expected \[..., 4\]: weight is",
        ),
        ({"hidden": torch.zeros(())}, ValueError, r"hidden: got shape \[\], expected \[..., 4\]"),
        ({"hidden": [1.0]}, TypeError, "hidden: got list, expected a tensor"),
        ({"hidden": HIDDEN_STATES.long()}, TypeError, "hidden: got dtype torch.int64, expected one of float32"),
        (
            {"hidden": HIDDEN_STATES.half()},
            TypeError,
            "weight: got dtype torch.float32, expected torch.float16, that of",
        ),
        ({"weight": torch.zeros(5)}, ValueError, r"weight: got shape \[5\], expected \[V, H\] with H >= 1"),
        ({"weight": torch.zeros(0, 4)}, ValueError, r"weight: got shape \[0, 4\], expected \[V, H\] with H >= 1"),
        ({"weight": torch.zeros(5, 0)}, ValueError, r"weight: got shape \[5, 0\], expected \[V, H\] with H >= 1"),
        ({"process_group": "tp"}, TypeError, "process_group: got str, expected a ProcessGroup or None"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight: got device meta, expected cpu, where hidden is"),
        ({"weight": None}, TypeError, "weight: got NoneType, expected a tensor"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: got shape \[4\], expected \[5\], the classifier's rows"),
        ({"bias": torch.zeros(5).double()}, TypeError, "bias: got dtype torch.float64, expected torch.float32"),
        ({"bias": 1.0}, TypeError, "bias: got float, expected a tensor"),
        (
            {"targets": TARGETS[0]},
            ValueError,
            r"targets: got shape \[3\], expected \[2, 3\]: that of hidden \[2, 3, 4\]",
        ),
        ({"targets": TARGETS.to("meta")}, ValueError, "targets: got device meta, expected cpu, where hidden is"),
        ({"targets": TARGETS + 5}, IndexError, r"targets: got 5 at position \[0, 0\], expected 0 <= id < 5"),
        ({"max_chunk_bytes": 0}, ValueError, "max_chunk_bytes: got 0, expected None or an int > 0"),
        ({"max_chunk_bytes": 1e6}, ValueError, "max_chunk_bytes: got 1000000.0, expected None or an int > 0"),
        (
            {"accumulate": "bfloat16"},
            ValueError,
            r"accumulate: got 'bfloat16', expected one of \['float32', 'weight'\]",
        ),
        ({"row_weight": torch.ones(2)}, ValueError, r"row_weight: got shape \[2\], expected that of targets, \[2, 3\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named_and_changes_nothing(arguments, error, message):
    arguments = {"hidden": HIDDEN_STATES, "weight": WEIGHT, "targets": TARGETS} | arguments
    with pytest.raises(error, match=message):
        functional.linear_pdl_loss(**arguments)
    loss = PDLLoss(vocab_size=5)
    with pytest.raises(error, match=message):
        loss.linear(**arguments)
    assert loss.frequency.total == 0


def test_frequency_of_another_vocabulary():
    with pytest.raises(ValueError, match="weight: got a vocabulary of 5, expected 7, the frequency's"):
        PDLLoss(vocab_size=7).linear(HIDDEN_STATES, WEIGHT, TARGETS)


@pytest.mark.devices("cpu", "cuda")
def test_training_reaches_what_the_unfused_loss_reaches(make_linear):
    tensors = make_linear(64, dtype=torch.float64)
    weights = []
    for fused in (True, False):
        head = nn.Linear(HIDDEN, 257, dtype=torch.float64, device=tensors[0].device)
        with torch.no_grad():
            head.weight.copy_(tensors[1]), head.bias.copy_(tensors[2])
        optimizer, loss_fn = torch.optim.SGD(head.parameters(), lr=0.5), PDLLoss()
        for _ in range(5):
            optimizer.zero_grad()
            hidden = tensors[0].detach()
            (
                loss_fn.linear(hidden, head.weight, tensors[3], head.bias)
                if fused
                else loss_fn(head(hidden), tensors[3])
            ).backward()
            optimizer.step()
        weights.append(head.weight.detach().clone())
    torch.testing.assert_close(*weights)
    assert not torch.equal(weights[0], tensors[1])


PEAK = """
import sys, torch
from pdl_ext import functional
rows, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
hidden = torch.zeros(rows, 32, dtype=dtype, requires_grad=True)
weight = torch.zeros(50257, 32, dtype=dtype, requires_grad=True)
targets = torch.zeros(rows, dtype=torch.int64)
functional.linear_pdl_loss(hidden[:256], weight, targets[:256]).backward()
hidden.grad = weight.grad = None
def of(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
open("/proc/self/clear_refs", "w").write("5")
before = of("VmRSS")
functional.linear_pdl_loss(hidden, weight, targets).backward()
print(of("VmHWM") - before - (hidden.grad.nbytes + weight.grad.nbytes) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "larger"), [("float32", 1900), ("bfloat16", 1200)])
def test_memory_does_not_grow_with_the_rows(dtype, larger):
    def peak(rows):
        return float(fresh_python.run("-c", PEAK, str(rows), dtype, check=True).stdout)

    # Besides the slab, which is 49 MiB for few rows, and the gradients, almost no memory. 1,200 and 1,900 are not
    # multiples of a slab's fewest rows.
    few, many = peak(512), peak(larger)
    assert many < 64e6 / 2**20 + 20
    assert many < few + 24
