"""The compiled ops for PyTorch: schemas, fake kernels, torch.compile, autocast, and the CPU's code paths."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import fresh_python
import pytest
import torch

from pdl_ext import PDLLoss, functional
from pdl_ext.counts import TOKEN_DTYPES
from pdl_ext.engine import linear, ops
from pdl_ext.engine.vocabulary import VocabularyShard
from pdl_ext.modulation import DFT, EAFT, AntiFocal, Focal, MiLe
from pdl_ext.options import DEFAULTS, OP_OPTIONS, REDUCTIONS, LossKeywords, LossOptions, OptionsAsAttributes

# torch.compile and opcheck need the fake kernels of the compiled ops, which the emulated ones lack.
pytestmark = pytest.mark.devices("cpu", "cuda")
compiled = torch.ops.pdl_ext
BARE = LossOptions()
EVERY = LossOptions(label_smoothing=0.1, z_loss=0.01, softcap=12.0, logit_scale=0.8, modulation=Focal(1.5))


@pytest.fixture(autouse=True)
def forget_compiled_code():
    # A guard that failed in one test must not count as a recompilation in the next.
    torch._dynamo.reset()


@pytest.fixture
def op_inputs(device):
    generator = torch.Generator().manual_seed(0)

    def build(dtype=torch.float32, optional=False):
        wide = ops.accumulator_dtype(dtype)
        logits = torch.randn(4, 9, generator=generator).to(device, dtype)
        targets = torch.tensor([1, 8, -100, 4], device=device)
        if not optional:
            return logits, targets, None, None, None, None
        row_weight = torch.rand(4, generator=generator).to(device, wide)
        return (
            logits,
            targets,
            torch.rand(9, generator=generator).to(device),
            row_weight,
            torch.randn(9, generator=generator).to(device),
            torch.tensor([2.5, 3.5], device=device, dtype=wide),
        )

    return build


def test_options_have_one_order_everywhere():
    assert tuple(ops._C.loss_option_names().split()) == OP_OPTIONS
    assert list(DEFAULTS) == list(LossKeywords.__annotations__)
    attributes = [name for name in vars(OptionsAsAttributes) if not name.startswith("_")]
    assert attributes == list(DEFAULTS)


def test_ops_of_the_linear_loss_end_with_the_fields_of_settings_and_shard():
    for name in ("linear_loss_forward", "linear_loss_backward"):
        arguments = [argument.name for argument in getattr(compiled, name).default._schema.arguments]
        assert arguments[-9:] == [*linear.Settings._fields, *VocabularyShard._fields]


def test_inputs_have_one_order_everywhere():
    # Behind the logits, and in loss_and_gradient_ behind where the gradient goes.
    for name, first in (("loss_forward", 1), ("loss_and_gradient_", 2)):
        arguments = [argument.name for argument in getattr(compiled, name).default._schema.arguments]
        assert arguments[first:-2] == list(ops.LossInputs._fields)
        assert arguments[-2:] == ["options", "stats"]


def test_options_of_a_build_with_fewer_are_packed_anew():
    state = {**EVERY.__dict__, "_packed": EVERY.packed[:-1]}
    del state["logit_scale"]
    older = LossOptions.__new__(LossOptions)
    older.__setstate__(state)
    assert older == dataclasses.replace(EVERY, logit_scale=1.0)
    assert older.packed == dataclasses.replace(EVERY, logit_scale=1.0).packed


def test_options_survive_packing():
    assert LossOptions.unpacked(EVERY.packed) == EVERY
    assert LossOptions.unpacked(BARE.packed) == BARE
    for reduction in REDUCTIONS:
        options = LossOptions(reduction=reduction, ignore_index=-(2**31), softcap=1e-300)
        assert LossOptions.unpacked(options.packed) == options
    for modulation in (
        Focal(0.5, detach=True),
        AntiFocal(2.0, 0.3),
        DFT(),
        MiLe(0.5),
        MiLe(2.0, normalize=False),
        EAFT(0.5),
    ):
        options = LossOptions(modulation=modulation)
        assert LossOptions.unpacked(options.packed) == options


@pytest.mark.parametrize("numbers", [[], [2.0] * 9, [2.0] * 11], ids=len)
def test_another_number_of_options_is_refused(op_inputs, numbers):
    with pytest.raises(ValueError, match=f"options: got {len(numbers)} numbers, expected reduction ignore_index"):
        compiled.loss_forward(*op_inputs(), numbers, False)


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("optional", [False, True], ids=["bare", "all_tensors"])
def test_opcheck_loss_forward(op_inputs, optional, reduction, stats):
    inputs = op_inputs(optional=optional)
    options = dataclasses.replace(EVERY if optional else BARE, reduction=reduction)
    torch.library.opcheck(compiled.loss_forward.default, (*inputs, options.packed, stats))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_opcheck_loss_forward_dtypes(op_inputs, dtype):
    inputs = op_inputs(dtype, optional=True)
    torch.library.opcheck(compiled.loss_forward.default, (*inputs, EVERY.packed, True))


@pytest.mark.parametrize("optional", [False, True], ids=["bare", "all_tensors"])
def test_opcheck_loss_and_gradient(op_inputs, optional):
    logits, *others = op_inputs(optional=optional)
    options = EVERY if optional else BARE
    arguments = (logits, torch.empty_like(logits), *others, options.packed, optional)
    torch.library.opcheck(compiled.loss_and_gradient_.default, arguments)


@pytest.mark.parametrize("optional", [False, True], ids=["bare", "all_tensors"])
def test_opcheck_loss_and_new_gradient(op_inputs, device, optional):
    logits, *others = op_inputs(optional=optional)
    upstream = torch.tensor(2.5, device=device) if optional else None
    options = EVERY if optional else BARE
    arguments = (logits, *others, upstream, options.packed, optional)
    torch.library.opcheck(compiled.loss_and_gradient.default, arguments)
    _, saved_rows, factors, _, gradient = compiled.loss_and_gradient(*arguments)
    targets, token_weight, row_weight, offset, _ = others
    rest = (logits, targets, saved_rows, factors, token_weight, row_weight, offset, options.packed)
    torch.library.opcheck(compiled.correct_gradient_.default, (gradient, upstream, torch.ones_like(factors[0]), *rest))


def test_opcheck_scale(device):
    gradient, factor = torch.randn(4, 9, device=device), torch.tensor(2.5, device=device)
    torch.library.opcheck(compiled.scale_.default, (gradient, factor))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", ["loss_backward", "loss_backward_"])
def test_opcheck_loss_backward(op_inputs, name, reduction):
    logits, targets, token_weight, row_weight, offset, normalizer = op_inputs(optional=True)
    options = dataclasses.replace(EVERY, reduction=reduction).packed
    loss, saved_rows, factors, _ = compiled.loss_forward(
        logits, targets, token_weight, row_weight, offset, normalizer, options, False
    )
    upstream = torch.rand_like(loss)
    arguments = (upstream, logits, targets, saved_rows, factors, token_weight, row_weight, offset, options, 0, 9)
    torch.library.opcheck(getattr(compiled, name).default, arguments)


@pytest.mark.parametrize("width", [9, 12, 16, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradient_of_columns_lies_as_they_do(op_inputs, device, dtype, width):
    logits, targets, *_ = op_inputs(dtype)
    wide = torch.zeros(4, width, dtype=dtype, device=device)
    wide[:, :9] = logits
    columns = wide[:, :9]
    loss, saved_rows, factors, _ = compiled.loss_forward(columns, targets, None, None, None, None, BARE.packed, False)
    arguments = (torch.ones_like(loss), columns, targets, saved_rows, factors, None, None, None, BARE.packed, 0, 9)
    gradient = compiled.loss_backward(*arguments)
    if device.type == "cpu":
        assert gradient.is_contiguous()
    else:
        # Equal strides up to whole vectors of 16 bytes, of which none is wasted: it reads and writes in those.
        assert (gradient.stride(0) - width) * dtype.itemsize % 16 == 0
        assert 9 <= gradient.stride(0) < 9 + 16 // dtype.itemsize
        assert gradient.is_contiguous() == (width == 9 or (width - 9) * dtype.itemsize % 16 == 0)
    torch.library.opcheck(compiled.loss_backward.default, arguments)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("optional", [False, True], ids=["bare", "all_tensors"])
def test_opcheck_reduce_rows(op_inputs, optional, reduction):
    logits, targets, token_weight, row_weight, offset, normalizer = op_inputs(optional=optional)
    options = LossOptions(reduction=reduction, z_loss=0.1).packed
    _, saved_rows, _, _ = compiled.loss_forward(
        logits, targets, token_weight, row_weight, offset, normalizer, options, False
    )
    torch.library.opcheck(compiled.reduce_rows.default, (saved_rows, targets, row_weight, normalizer, options))


def test_opcheck_complete_rows(op_inputs):
    saved_rows = compiled.loss_forward(*op_inputs(), EVERY.packed, False)[1]
    torch.library.opcheck(compiled.complete_rows_.default, (saved_rows, EVERY.packed, 9))


@pytest.mark.parametrize("shape", [(5, 4), (6, 4, 1)])
def test_what_are_no_saved_rows_is_not_completed(device, shape):
    with pytest.raises(RuntimeError, match="saved_rows must have the shape of what loss_forward returns"):
        compiled.complete_rows_(torch.zeros(shape, device=device), BARE.packed, 9)


@pytest.mark.parametrize("optional", [False, True], ids=["bare", "all_tensors"])
def test_opcheck_token_weights(device, optional):
    counts = torch.tensor([5, 0, 2, 9], device=device)
    blend = torch.tensor(0.5, device=device) if optional else None
    fixed = torch.tensor([torch.nan, 1.5, torch.nan, torch.nan], device=device) if optional else None
    torch.library.opcheck(compiled.token_weights.default, (counts, blend, fixed, 0.5, 1e-7, 1.0, True, 1, float("inf")))


@pytest.mark.parametrize("dtype", TOKEN_DTYPES, ids=str)
def test_opcheck_count_tokens(device, dtype):
    counts, *others = (torch.zeros(size, dtype=torch.int64, device=device) for size in ((7,), (), (), ()))
    tokens = torch.tensor([1, 6, 6, 9, 3], device=device).to(dtype)
    torch.library.opcheck(compiled.count_tokens_.default, (counts, *others, tokens, 3, False))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_function_with_dynamic_shapes(make_case, reduction):
    compiled = torch.compile(functional.pdl_loss, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        # The second batch has another number of rows, and must not compile again.
        for rows in (6, 11):
            case = make_case((rows,), 101, row_weight=True)
            # No leaf, which the eager one may not overwrite.
            case.view = lambda leaf: leaf * 1
            options = {"reduction": reduction, "label_smoothing": 0.1, "return_stats": True, "inplace_backward": True}
            eager, got = case.run(functional.pdl_loss, **options), case.run(compiled, **options)
            assert eager["grad_logits"].any()
            for name in eager:
                # In one call and in two a row is summed in another order.
                torch.testing.assert_close(got[name], eager[name], rtol=4e-6, atol=0)


@pytest.mark.slow
def test_compiled_shift(make_case):
    case = make_case((2, 6), 101, row_weight=True)
    # What Inductor makes of it is tested without shift.
    compiled = torch.compile(functional.pdl_loss, fullgraph=True, backend="aot_eager")
    eager = case.run(functional.pdl_loss, shift=True)
    got = case.run(compiled, shift=True)
    for name in eager:
        torch.testing.assert_close(got[name], eager[name], rtol=1e-6, atol=0)


@pytest.mark.slow
def test_compiled_online_module(device):
    eager, wrapped = (PDLLoss(vocab_size=31, alpha=0.5).to(device) for _ in range(2))
    compiled = torch.compile(wrapped, fullgraph=True, dynamic=True)
    generator = torch.Generator().manual_seed(0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (4, 9, 5):
            logits = torch.randn(rows, 31, generator=generator).to(device)
            targets = torch.randint(31, (rows,), generator=generator).to(device)
            losses, grads = [], []
            for loss_fn in (eager, compiled):
                leaf = logits.clone().requires_grad_()
                loss = loss_fn(leaf, targets)
                loss.backward()
                losses.append(loss.detach())
                grads.append(leaf.grad)
            torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
            torch.testing.assert_close(*grads, rtol=1e-6, atol=0)
            assert grads[0].any()
            assert torch.equal(eager.frequency.counts, wrapped.frequency.counts)
    assert wrapped.frequency.total == 18


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_logits_alone(make_case, device, dtype):
    case = make_case((6,), 257, dtype)
    outside = case.run(functional.pdl_loss)
    with torch.autocast(device.type, torch.bfloat16):
        inside = case.run(functional.pdl_loss)
    assert inside["loss"].dtype == torch.float32
    assert inside["grad_logits"].any()
    for name in outside:
        assert torch.equal(inside[name], outside[name])


def test_autocast_model_trains(device):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 31).to(device)
    targets = torch.arange(12, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(torch.randn(12, 8, device=device))
        loss = PDLLoss()(logits, targets)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert model.weight.grad.any()


def test_meta_tensors_have_the_right_shapes():
    logits = torch.empty(3, 5, 11, device="meta", dtype=torch.bfloat16)
    targets = torch.empty(3, 5, device="meta", dtype=torch.int64)
    loss, stats = functional.pdl_loss(logits, targets, reduction="none", return_stats=True)
    assert loss.shape == stats.nll.shape == targets.shape
    assert loss.dtype == torch.float32


def run_python(*arguments, capability):
    return fresh_python.run(*arguments, env={"PDL_EXT_CPU_CAPABILITY": capability})


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512", "avx512_bf16"])
def test_every_cpu_capability_matches_reference(capability):
    tests = str(Path(__file__).resolve().with_name("test_functional.py"))
    own = ops._C.cpu_capability()
    # All other tests run with this process' own.
    code = "import sys, pytest; from pdl_ext.engine.ops import _C; print(_C.cpu_capability()); "
    code += f"sys.exit(_C.cpu_capability() != {own!r} and pytest.main(sys.argv[1:]))"
    chosen_tests = ("-q", "-k", "test_core_matches_reference and cpu", "-p", "no:cacheprovider")
    done = run_python("-c", code, tests, *chosen_tests, capability=capability)
    assert done.returncode == 0, done.stdout[-3000:]
    # Capabilities above this machine's are clamped to it.
    order = ["DEFAULT", "AVX2", "AVX512", "AVX512_BF16"]
    chosen = done.stdout.splitlines()[0]
    assert (" passed" in done.stdout) == (chosen != own)
    assert order.index(chosen) <= order.index(capability.upper())
    if capability == "default":
        assert chosen == "DEFAULT"


@pytest.mark.slow
def test_unknown_cpu_capability_is_refused():
    code = "import torch, pdl_ext; pdl_ext.functional.pdl_loss(torch.zeros(1, 2), torch.tensor([0]))"
    done = run_python("-c", code, capability="sse9")
    assert done.returncode != 0
    assert "PDL_EXT_CPU_CAPABILITY is 'sse9', expected 'default', 'avx2', 'avx512' or 'avx512_bf16'" in done.stderr


LOAD = """
import sys, torch, pdl_ext.functional
program = torch.export.load(sys.argv[1]).module()
print(float(program(torch.zeros(4, 10), torch.arange(4))))
"""


@pytest.mark.slow
def test_an_exported_program_is_loaded_by_another_process(tmp_path):
    class Loss(torch.nn.Module):
        def forward(self, logits, targets):
            return functional.pdl_loss(logits, targets)

    program = torch.export.export(Loss(), (torch.randn(4, 10), torch.arange(4)))
    torch.export.save(program, tmp_path / "loss.pt2")
    told = fresh_python.run("-c", LOAD, tmp_path / "loss.pt2", check=True).stdout
    assert float(told) == pytest.approx(math.log(10))


FIRST_USE = """
import torch, pdl_ext

def step(logits, targets):
    weights = pdl_ext.functional.token_weights(counts, weighting)
    return pdl_ext.functional.pdl_loss(logits, targets, weights)

counts, weighting = torch.ones(10, dtype=torch.int64), pdl_ext.PowerLaw(alpha=0.5)
compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
print(float(compiled(torch.zeros(4, 10), torch.arange(4))))
"""


@pytest.mark.slow
def test_names_may_first_be_used_under_the_compiler():
    assert float(fresh_python.run("-c", FIRST_USE, check=True).stdout) == pytest.approx(math.log(10))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(make_case, threads):
    case = make_case((301,), 257, row_weight=True)
    before = torch.get_num_threads()
    expected = case.run(functional.pdl_loss)
    try:
        torch.set_num_threads(threads)
        got = case.run(functional.pdl_loss)
    finally:
        torch.set_num_threads(before)
    for name in expected:
        assert torch.equal(got[name], expected[name])
