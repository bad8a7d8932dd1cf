"""The default training step: loss and gradient in one call, for the expected upstream gradient.

A wrong guess must change no bit, and a gradient must not be read where it was not written.
"""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from pdl_ext import PDLLoss, functional
from pdl_ext.engine import call as engine
from pdl_ext.engine import ops
from pdl_ext.modulation import Focal, MiLe
from pdl_ext.options import LossOptions

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = {
    "plain": {},
    "entropy": {"modulation": Focal()},
    "everything": {"label_smoothing": 0.1, "softcap": 9.0, "z_loss": 0.1, "logit_scale": 1.3},
    "by class": {"label_smoothing": 0.1, "label_smoothing_weight": "class", "modulation": MiLe(normalize=False)},
}
UPSTREAM = [1.0, 0.37, -65536.0, 0.0, -0.0, float("nan")]


def same_bits(a, b):
    """Also of NaN and of zeros with a sign."""
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(size), b.contiguous().view(size))


@pytest.fixture
def calls(monkeypatch):
    """The ops of the loss that were called, in order. Of loss_and_gradient also for which upstream gradient it computed
    one, and where that lies: a list that held it would keep it alive.
    """
    seen = []

    def spied(name):
        op = getattr(ops.compiled, name)

        def call(*arguments):
            result = op(*arguments)
            at_once = name == "loss_and_gradient"
            seen.append((name, float(result[2][4]), result[4].data_ptr()) if at_once else (name, None, None))
            return result

        return call

    names = ("loss_forward", "loss_backward", "loss_backward_", "loss_and_gradient", "loss_and_gradient_")
    for name in (*names, "correct_gradient_"):
        monkeypatch.setattr(ops.compiled, name, spied(name))
    return seen


def names_of(calls):
    return [name for name, *_ in calls]


AT_ONCE = ["loss_and_gradient", "correct_gradient_"]
TWO_CALLS = ["loss_forward", "loss_backward"]


def ops_of_step(loss_fn, case):
    leaf = case.leaf.clone().requires_grad_()
    loss_fn(leaf * 1, case.targets).sum().backward()
    assert leaf.grad.any()
    return leaf.grad


class TestBits:
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("vocab_size", [7, 4099, pytest.param(20011, marks=pytest.mark.slow)])
    def test_a_wrong_guess_changes_no_bit(self, make_case, vocab_size, dtype, options):
        case = make_case((6,), vocab_size, dtype, row_weight=True)
        wide = ops.accumulator_dtype(dtype)
        device = case.leaf.device
        options = LossOptions(**options).packed
        inputs = (case.targets, case.token_weight, case.row_weight.to(wide), None)
        by_class = case.token_weight if LossOptions.unpacked(options).smooths_by_class else None
        for number, other in zip(UPSTREAM, UPSTREAM[1:] + UPSTREAM[:1], strict=True):
            upstream = torch.tensor(number, dtype=wide, device=device)
            of_backward = (case.targets, by_class, case.row_weight.to(wide), None)

            def corrected(of, upstream=upstream, of_backward=of_backward):
                loss, saved_rows, factors, _, gradient = of
                targets, *rest = of_backward
                ops.compiled.correct_gradient_(
                    gradient, None, upstream, case.leaf, targets, saved_rows, factors, *rest, options
                )
                return loss, gradient

            right = ops.compiled.loss_and_gradient(case.leaf, *inputs, None, upstream, options, False)
            untouched = right[4].clone()
            loss, of_right = corrected(right)
            assert same_bits(of_right, untouched)
            for guess in (None, torch.tensor(other, dtype=wide, device=device)):
                guessed = ops.compiled.loss_and_gradient(case.leaf, *inputs, None, guess, options, False)
                other_loss, of_wrong = corrected(guessed)
                assert same_bits(of_wrong, of_right), (number, guess)
                assert same_bits(other_loss, loss)
            loss, saved_rows, factors, _ = ops.compiled.loss_forward(case.leaf, *inputs, None, options, False)
            by_two = ops.compiled.loss_backward(
                upstream, case.leaf, case.targets, saved_rows, factors, *of_backward[1:], options, 0, vocab_size
            )
            assert same_bits(by_two, of_right)
            assert same_bits(other_loss, loss)

    # Rows of one block, of clusters of 2 to 16 blocks, and rows that are read from L2.
    @pytest.mark.slow
    @pytest.mark.devices("emulated", "cuda")
    @pytest.mark.parametrize(
        ("card", "vocab_size"),
        [
            *(("sm_90", size) for size in (10_007, 30_011, 60_013, 150_001, 300_007, 700_001)),
            *((card, size) for card in ("sm_75", "sm_80") for size in (4_001, 60_013)),
        ],
    )
    def test_one_call_has_the_bits_of_two_however_it_divides_rows(self, make_case, monkeypatch, card, vocab_size):
        monkeypatch.setenv("PDL_EXT_EMULATOR_DEVICE", card)
        case = make_case((2,), vocab_size, torch.float32)
        inputs = (case.targets, case.token_weight, None, None)
        for stats in (False, True):
            packed = LossOptions().packed
            loss, saved_rows, _, predicted, gradient = ops.compiled.loss_and_gradient(
                case.leaf, *inputs, None, None, packed, stats
            )
            by_two = ops.compiled.loss_forward(case.leaf, *inputs, None, packed, stats)
            for of_one, of_two in zip((loss, saved_rows, predicted), (by_two[0], by_two[1], by_two[3]), strict=True):
                assert same_bits(of_one, of_two)
            of_two = ops.compiled.loss_backward(
                case.leaf.new_ones(()), case.leaf, case.targets, *by_two[1:3], None, None, None, packed, 0, vocab_size
            )
            assert same_bits(gradient, of_two)

    @pytest.mark.devices("emulated")
    def test_a_right_guess_where_rows_are_read_from_l2(self, make_case, monkeypatch):
        monkeypatch.setenv("PDL_EXT_EMULATOR_DEVICE", "sm_75")
        case = make_case((6,), 1009, torch.bfloat16)
        packed, upstream = LossOptions().packed, torch.tensor(3.0)
        gradients = []
        for guess in (upstream, None):
            _, saved_rows, factors, _, gradient = ops.compiled.loss_and_gradient(
                case.leaf, case.targets, case.token_weight, None, None, None, guess, packed, False
            )
            gradients.append(gradient.clone())
        rest = (case.leaf, case.targets, saved_rows, factors, None, None, None, packed)
        ops.compiled.correct_gradient_(gradient, None, upstream, *rest)
        assert not same_bits(gradients[0], gradients[1])
        assert same_bits(gradients[0], gradient)

    def test_the_upstream_gradient_is_kept_for_the_next(self, make_case):
        case = make_case((6,), 257)
        packed = LossOptions().packed
        expected, upstream = (torch.tensor(x, device=case.leaf.device) for x in (2.0, 3.0))
        _, saved_rows, factors, _, gradient = ops.compiled.loss_and_gradient(
            case.leaf, case.targets, None, None, None, None, expected, packed, False
        )
        assert factors[4] == 2
        rest = (case.leaf, case.targets, saved_rows, factors, None, None, None, packed)
        ops.compiled.correct_gradient_(gradient, expected, upstream, *rest)
        assert expected == 3
        # The upstream gradient of a computed gradient is stored with it.
        assert factors[4] == 2


class TestWhenItIs:
    def test_by_default(self, make_case, calls):
        case = make_case((6,), 257)
        ops_of_step(functional.pdl_loss, case)
        ops_of_step(PDLLoss(vocab_size=257).to(case.leaf.device), case)
        assert names_of(calls) == 2 * AT_ONCE

    @pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_of_every_scalar(self, make_case, calls, dtype, reduction):
        case = make_case((2, 3), 257, dtype)
        ops_of_step(lambda x, y: functional.pdl_loss(x, y, reduction=reduction, shift=True, return_stats=True)[0], case)
        assert names_of(calls) == AT_ONCE

    def test_two_calls(self, make_case, calls):
        case, half = (make_case((6,), 257, dtype) for dtype in (torch.float32, torch.float16))
        ops_of_step(lambda x, y: functional.pdl_loss(x, y, reduction="none"), case)
        # The mean of a modulation is known only after all rows.
        ops_of_step(lambda x, y: functional.pdl_loss(x, y, modulation=MiLe()), case)
        # A float16 gradient has a loss scale, which a function cannot guess.
        ops_of_step(functional.pdl_loss, half)
        # Its loss is read, and rarely differentiated.
        ops_of_step(PDLLoss(case.leaf.new_ones(257).long()).eval(), case)
        assert names_of(calls) == 4 * TWO_CALLS

    @pytest.mark.devices("cpu")
    def test_two_calls_of_a_shard(self, make_case, calls):
        # A rank knows its gradient only after the statistics of all ranks.
        case = make_case((6,), 257)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            group = {"process_group": dist.group.WORLD}
            ops_of_step(lambda x, y: functional.pdl_loss(x, y, **group), case)
            loss_fn = PDLLoss(vocab_size=257)
            ops_of_step(lambda x, y: loss_fn(x, y, **group), case)
            ops_of_step(lambda x, y: functional.pdl_loss(x, y, inplace_backward=True, **group), case)
        finally:
            dist.destroy_process_group()
        assert names_of(calls) == [*2 * TWO_CALLS, "loss_forward", "loss_backward_"]

    def test_without_a_gradient_none_is_computed(self, make_case, calls):
        case = make_case((6,), 257, row_weight=True)
        functional.pdl_loss(case.leaf, case.targets)
        with torch.no_grad():
            functional.pdl_loss(case.leaf.clone().requires_grad_(), case.targets)
        row_weight = case.row_weight.clone().requires_grad_()
        functional.pdl_loss(case.leaf, case.targets, row_weight=row_weight).backward()
        assert row_weight.grad.any()
        assert names_of(calls) == 3 * ["loss_forward"]

    def test_the_logits_stay(self, make_case):
        case = make_case((6,), 257)
        logits = case.leaf.clone().requires_grad_() * 1
        (3 * functional.pdl_loss(logits, case.targets)).backward()
        assert torch.equal(logits.detach(), case.leaf)
        assert logits._version == 0

    @pytest.mark.devices("cpu")
    def test_no_copy_is_made_of_it(self, make_case, calls):
        case = make_case((6,), 257)
        leaf = case.leaf.clone().requires_grad_()
        (3 * functional.pdl_loss(leaf, case.targets)).backward()
        assert leaf.grad.data_ptr() == calls[0][2]


def peak_of(work):
    """The most bytes that PyTorch holds at a time of those it allocates during work(), exactly."""
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        kept = work()
    del kept
    changes = [event.nbytes() for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@pytest.mark.devices("cpu")
class TestMemory:
    ROWS, VOCAB_SIZE = 64, 4096
    # Of a row: saved numbers, and what is reduced of them.
    SMALL = ROWS * 256

    def step_of(self, make_case, kind, dtype, reduction):
        """step(factor): forward and backward of the function, or of a module that expects 1."""
        case = make_case((self.ROWS,), self.VOCAB_SIZE, dtype)
        loss_fn = PDLLoss(case.leaf.new_ones(self.VOCAB_SIZE).long(), reduction=reduction)
        if kind == "function":
            loss_fn = functools.partial(functional.pdl_loss, token_weight=case.token_weight, reduction=reduction)

        def step(factor=1.0):
            leaf = case.leaf.detach().requires_grad_()
            (factor * loss_fn(leaf, case.targets)).backward()
            return leaf.grad

        # The first step computes the weights.
        assert step().any()
        return step

    @pytest.mark.parametrize("factor", [1.0, 3.0], ids=["expected", "another"])
    @pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", ["function", "module"])
    def test_the_peak_of_a_step_is_that_of_two_calls(
        self, make_case, calls, monkeypatch, kind, dtype, reduction, factor
    ):
        step = self.step_of(make_case, kind, dtype, reduction)
        calls.clear()
        by_one = peak_of(lambda: step(factor))
        assert names_of(calls) == AT_ONCE
        weighted_loss = engine.weighted_loss
        monkeypatch.setattr(engine, "weighted_loss", lambda *inputs: weighted_loss(*inputs[:6]))
        calls.clear()
        by_two = peak_of(lambda: step(factor))
        assert names_of(calls) == TWO_CALLS
        gradient = self.ROWS * self.VOCAB_SIZE * dtype.itemsize
        assert gradient <= by_two <= gradient + self.SMALL
        assert by_one <= by_two + self.SMALL

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_second_buffer_would_be_seen(self, make_case, monkeypatch, dtype):
        step = self.step_of(make_case, "function", dtype, "mean")
        peak = peak_of(step)
        op = ops.compiled.loss_and_gradient

        def with_another(*arguments):
            another = torch.empty_like(arguments[0])
            return op(*arguments), another

        monkeypatch.setattr(ops.compiled, "loss_and_gradient", lambda *arguments: with_another(*arguments)[0])
        assert peak_of(step) > peak + self.SMALL

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_loss_that_is_never_differentiated_holds_a_gradient(self, make_case, dtype):
        case = make_case((self.ROWS,), self.VOCAB_SIZE, dtype)
        leaf = case.leaf.clone().requires_grad_()
        gradient = leaf.nbytes

        def alone():
            with torch.no_grad():
                return functional.pdl_loss(leaf, case.targets)

        assert peak_of(alone) <= self.SMALL
        assert gradient <= peak_of(lambda: functional.pdl_loss(leaf, case.targets)) <= gradient + self.SMALL


class TestExpected:
    def upstream_of(self, calls):
        """For which upstream gradient each gradient at once was computed."""
        return [upstream for name, upstream, _ in calls if name == "loss_and_gradient"]

    def test_a_module_expects_what_came_last(self, make_case, calls):
        case = make_case((6,), 257)
        loss_fn = PDLLoss(vocab_size=257).to(case.leaf.device)
        for factor in (0.25, 0.25, 8.0, 8.0):
            leaf = case.leaf.clone().requires_grad_()
            (factor * loss_fn(leaf, case.targets)).backward()
        assert self.upstream_of(calls) == [1.0, 0.25, 0.25, 8.0]

    def test_float16_has_one_call_after_the_first(self, make_case, calls):
        case = make_case((6,), 257, torch.float16)
        loss_fn = PDLLoss(case.leaf.new_ones(257).long())
        gradients = []
        for _ in range(3):
            leaf = case.leaf.clone().requires_grad_()
            (1024 * loss_fn(leaf, case.targets)).backward()
            gradients.append(leaf.grad)
        assert self.upstream_of(calls) == [1.0, 1024.0, 1024.0]
        assert all(same_bits(gradient, gradients[0]) for gradient in gradients)

    def test_of_losses_under_way_one_holds_a_gradient(self, make_case, calls):
        case = make_case((6,), 257)
        loss_fn = PDLLoss(case.leaf.new_ones(257).long())
        leaves = [case.leaf.clone().requires_grad_() for _ in range(3)]
        losses = [loss_fn(leaf, case.targets) for leaf in leaves]
        assert names_of(calls) == ["loss_and_gradient", "loss_forward", "loss_forward"]
        for loss in losses:
            (4 * loss).backward()
        del loss, losses
        assert names_of(calls)[3:] == ["correct_gradient_", "loss_backward", "loss_backward"]
        calls.clear()
        ops_of_step(loss_fn, case)
        assert names_of(calls) == AT_ONCE
        expected = case.leaf.clone().requires_grad_()
        (4 * functional.pdl_loss(expected, case.targets, reduction="none").mean()).backward()
        for leaf in leaves:
            assert same_bits(leaf.grad, leaves[0].grad)
        counted = (case.targets != -100).sum()
        torch.testing.assert_close(leaves[0].grad * counted, expected.grad * len(case.targets), rtol=1e-5, atol=1e-9)

    def test_what_was_expected_stays_with_a_loss(self, make_case):
        # Backward of the first changes the expected gradient, but not the one of the second.
        case = make_case((6,), 257)
        gradients = []
        for factor in (4.0, 4.0, 4.0):
            first, second = PDLLoss(case.leaf.new_ones(257).long()), PDLLoss(case.leaf.new_ones(257).long())
            second._last_upstream = first._last_upstream
            leaves = [case.leaf.clone().requires_grad_() for _ in range(2)]
            loss = first(leaves[0], case.targets)
            first._last_upstream._waiting = None
            other = second(leaves[1], case.targets)
            (factor * loss).backward()
            (factor * other).backward()
            gradients += [leaf.grad for leaf in leaves]
        assert all(same_bits(gradient, gradients[0]) for gradient in gradients)
        assert gradients[0].any()

    def test_one_module_for_several_dtypes(self, make_case, calls):
        loss_fn = PDLLoss(make_case((6,), 257).leaf.new_ones(257).long())
        for _ in range(2):
            for dtype in DTYPES:
                case = make_case((6,), 257, dtype)
                leaf = case.leaf.clone().requires_grad_()
                (2 * loss_fn(leaf, case.targets)).backward()
                expected = case.leaf.clone().requires_grad_()
                (2 * copy.deepcopy(loss_fn).eval()(expected, case.targets)).backward()
                assert same_bits(leaf.grad, expected.grad)
        # float32 is expected by the 16-bit ones, too.
        assert self.upstream_of(calls) == [1.0, 2.0, 2.0, 1.0, 2.0, 2.0, 2.0, 2.0]

    def test_it_is_no_state(self, make_case, calls):
        case = make_case((6,), 257)
        loss_fn = PDLLoss(vocab_size=257).to(case.leaf.device)
        names = list(loss_fn.state_dict())
        (2 * loss_fn(case.leaf.clone().requires_grad_(), case.targets)).backward()
        assert list(loss_fn.state_dict()) == names
        for other in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn)), loss_fn):
            other(case.leaf.clone().requires_grad_(), case.targets).backward()
        assert self.upstream_of(calls) == [1.0, 1.0, 1.0, 2.0]

    def test_accumulation_and_loss_scale(self, make_case, calls):
        case = make_case((6,), 257, torch.float16)
        loss_fn = PDLLoss(case.leaf.new_ones(257).long())
        scaler = torch.amp.GradScaler(case.leaf.device.type, init_scale=256.0)
        leaf = case.leaf.clone().requires_grad_()
        for _ in range(4):
            scaler.scale(loss_fn(leaf, case.targets) / 4).backward()
        assert self.upstream_of(calls) == [1.0, 64.0, 64.0, 64.0]


class TestGraphs:
    @pytest.mark.parametrize("factors", [(1.0, 1.0), (1.0, 3.0), (3.0, 1.0), (3.0, 5.0)])
    def test_retained(self, make_case, factors):
        case = make_case((6,), 257)
        leaf = case.leaf.clone().requires_grad_()
        # Of a leaf itself autograd returns the very gradient of the loss.
        loss = functional.pdl_loss(leaf, case.targets)
        for factor in factors:
            expected = case.leaf.clone().requires_grad_()
            functional.pdl_loss(expected * 1, case.targets).backward(gradient=torch.full_like(loss, factor))
            (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, factor), retain_graph=True)
            assert same_bits(gradient, expected.grad)
            # It is its owner's.
            gradient.zero_()

    def test_a_second_backward_without_retaining_raises(self, make_case):
        case = make_case((6,), 257)
        loss = functional.pdl_loss(case.leaf.clone().requires_grad_(), case.targets)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()

    @pytest.mark.devices("cpu", "cuda")
    def test_second_derivative(self, make_case):
        case = make_case((6,), 17, torch.float64)
        assert torch.autograd.gradgradcheck(
            lambda x: functional.pdl_loss(x, case.targets), case.leaf.clone().requires_grad_()
        )

    def test_written_logits_raise(self, make_case):
        case = make_case((6,), 257)
        logits = case.leaf.clone().requires_grad_() * 1
        loss = functional.pdl_loss(logits, case.targets)
        with torch.no_grad():
            logits.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("factor", [1.0, 3.0])
    def test_inside_a_checkpoint(self, make_case, calls, reentrant, factor):
        case = make_case((6,), 257)
        loss_fn = PDLLoss(case.leaf.new_ones(257).long())
        gradients = []
        for recompute in (False, True):
            leaf = case.leaf.clone().requires_grad_()

            def body(x):
                return loss_fn(x * 1, case.targets)

            loss = checkpoint(body, leaf, use_reentrant=reentrant) if recompute else body(leaf)
            (factor * loss).backward()
            gradients.append(leaf.grad)
        assert same_bits(*gradients)
        assert gradients[0].any()

    @pytest.mark.parametrize("early_stop", [False, True])
    @pytest.mark.parametrize("other_first", [False, True])
    def test_inside_a_checkpoint_with_another_loss_pending(self, make_case, other_first, early_stop):
        # Another loss may be pending when the checkpoint runs, or only when it runs again.
        case = make_case((6,), 257)
        loss_fn = PDLLoss(case.leaf.new_ones(257).long())
        leaves = [case.leaf.clone().requires_grad_() for _ in range(2)]

        def inside():
            return checkpoint(lambda x: loss_fn(x * 1, case.targets), leaves[0], use_reentrant=False)

        with set_checkpoint_early_stop(early_stop):
            if other_first:
                other = loss_fn(leaves[1], case.targets)
                loss = inside()
                other.backward()
                loss.backward()
            else:
                loss = inside()
                other = loss_fn(leaves[1], case.targets)
                loss.backward()
                other.backward()
        assert leaves[0].grad.any()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-6, atol=1e-9)

    def test_no_gradient_is_held_longer_than_needed(self, make_case, monkeypatch):
        op, made = ops.compiled.loss_and_gradient, []

        def remembered(*arguments):
            result = op(*arguments)
            made.append(weakref.ref(result[4]))
            return result

        def alive():
            return [gradient() is not None for gradient in made]

        monkeypatch.setattr(ops.compiled, "loss_and_gradient", remembered)
        case = make_case((6,), 257)
        leaf = case.leaf.clone().requires_grad_()
        loss = functional.pdl_loss(leaf * 1, case.targets)
        assert alive() == [True]
        del loss
        assert alive() == [False]
        loss = functional.pdl_loss(leaf * 1, case.targets)
        loss.backward()
        # The node still exists, but not its saved gradient.
        assert alive() == [False, False]
        # A checkpoint makes it twice, and holds it only while backward needs it.
        loss = checkpoint(lambda x: functional.pdl_loss(x * 1, case.targets), leaf, use_reentrant=False)
        assert alive() == [False, False, False]
        loss.backward()
        assert alive() == [False, False, False, False]

    def test_hooks_of_saved_tensors(self, make_case):
        case = make_case((6,), 257)
        leaf = case.leaf.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
            loss = functional.pdl_loss(leaf, case.targets)
        (2 * loss).backward()
        expected = case.leaf.clone().requires_grad_()
        (2 * functional.pdl_loss(expected, case.targets)).backward()
        assert same_bits(leaf.grad, expected.grad)

    @pytest.mark.devices("cpu", "cuda")
    def test_compiled(self, make_case):
        case = make_case((6,), 257)
        torch.compiler.reset()

        def step(loss_fn, factor):
            leaf = case.leaf.clone().requires_grad_()
            loss = loss_fn(leaf, case.targets)
            (factor * loss).backward()
            return loss.detach(), leaf.grad

        loss_fn = PDLLoss(case.leaf.new_ones(257).long())
        compiled_fn = torch.compile(loss_fn, fullgraph=True)
        for factor in (1.0, 3.0):
            eager, compiled = step(loss_fn, factor), step(compiled_fn, factor)
            if case.leaf.device.type == "cpu":
                assert all(map(same_bits, compiled, eager))
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-9)
