"""Shared by the benchmarks of both devices: inputs, true results, and the providers that run on either."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import Clock, Group, Provider, Report, Row, Workload
from torch import Tensor

import pdl_ext
from pdl_ext import PDLLoss, PowerLaw, TokenFrequency, reference

IGNORED = -100
# The number of elements of a float64 truth that are computed at once.
PART = 2**25


@dataclasses.dataclass(frozen=True)
class LossFunction:
    """A mean loss of logits and targets."""

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    weighted: bool = True
    # Whether backward overwrites the logits with the gradient; "forward" if forward already does.
    overwrites: str = ""
    # Whether the graph of one forward can be differentiated again and again.
    repeats_backward: bool = False
    forward_alone: bool = True
    not_capturable: str = ""
    note: str = ""
    leeway: float = 1.0


def pdl_ext_functions(weight: Tensor) -> list[LossFunction]:
    """The fused loss, with a new gradient and with one over the logits."""
    return [
        LossFunction("pdl_ext", lambda x, y: pdl_ext.functional.pdl_loss(x, y, weight), repeats_backward=True),
        LossFunction(
            "pdl_ext, in place",
            lambda x, y: pdl_ext.functional.pdl_loss(x, y, weight, inplace_backward=True),
            # float16 is overwritten only in backward, which is as good for a caller that restores the logits.
            overwrites="forward",
            forward_alone=False,
        ),
    ]


def pytorch_functions(weight: Tensor, dtype: torch.dtype, compiled: bool = True) -> list[LossFunction]:
    """PyTorch's losses: eager and, if `compiled`, compiled."""
    in_dtype = weight.to(dtype)
    eager = LossFunction(
        "F.cross_entropy",
        lambda x, y: F.cross_entropy(x, y, weight=in_dtype),
        repeats_backward=True,
        # It rounds log-probabilities to the dtype: in bfloat16 half a unit of the last place of 12 is 3 %.
        leeway=2.0 if dtype.itemsize == 2 else 1.0,
    )
    if not compiled:
        return [eager]
    # A graph compiled for another vocabulary must not make this one dynamic, nor count towards the limit of
    # recompilations.
    torch.compiler.reset()
    function = torch.compile(lambda x, y: F.cross_entropy(x.float(), y, weight=weight), dynamic=False)
    # Compiled once, with its backward: compiling takes longer than measuring.
    return [eager, LossFunction("F.cross_entropy, compiled", function, forward_alone=False, note="logits.float()")]


class LossInputs:
    """The rotating logits and targets of a group, and the true results."""

    def __init__(
        self, clock: Clock, rows: int, vocab_size: int, dtype: torch.dtype, peaked: bool, ignored: float
    ) -> None:
        generator = torch.Generator(clock.device).manual_seed(0)
        self.weight = 0.5 + torch.rand(vocab_size, device=clock.device, generator=generator)
        self.logits: list[Tensor] = []
        self.targets: list[Tensor] = []
        # Copies for the providers that overwrite their logits.
        self.scratch: list[Tensor] = []
        self._truths: dict[bool, tuple[Tensor, Tensor]] = {}
        for _ in range(harness.buffers_for(clock, rows * vocab_size * dtype.itemsize)):
            logits = torch.empty(rows, vocab_size, dtype=dtype, device=clock.device)
            logits.normal_(std=6.0 if peaked else 1.0, generator=generator)
            targets = torch.randint(vocab_size, (rows,), device=clock.device, generator=generator)
            if peaked:  # every other row is nearly sure of its target, the rest of something else
                sure = torch.arange(0, rows, 2, device=clock.device)
                logits[sure, targets[sure]] += 18
            targets[torch.rand(rows, device=clock.device, generator=generator) < ignored] = IGNORED
            self.logits.append(logits.requires_grad_())
            self.targets.append(targets)
        self.scratch = [logits.detach().clone().requires_grad_() for logits in self.logits]

    @property
    def counted(self) -> int:
        """The rows of the first buffer that are not ignored."""
        return int((self.targets[0] != IGNORED).sum())

    def truth(self, weighted: bool) -> tuple[Tensor, Tensor]:
        """The float64 mean loss of the first buffer, and its gradient."""
        if weighted not in self._truths:
            self._truths[weighted] = self._compute_truth(weighted)
        return self._truths[weighted]

    def _compute_truth(self, weighted: bool) -> tuple[Tensor, Tensor]:
        logits, targets = self.logits[0].detach(), self.targets[0]
        weight = self.weight if weighted else torch.ones_like(self.weight)
        denominator = weight[targets[targets != IGNORED]].double().sum()
        total = torch.zeros_like(denominator)
        gradient = torch.empty_like(logits, dtype=torch.float64)
        # In parts: otherwise intermediate results would take many times the logits' memory.
        for part in torch.arange(targets.numel(), device=targets.device).split(max(1, PART // logits.shape[1])):
            exact = logits[part].double().requires_grad_()
            loss = reference.pdl_loss(exact, targets[part], weight, reduction="sum") / denominator
            (gradient[part],) = torch.autograd.grad(loss, exact)
            total += loss.detach()
        return total, gradient

    def error(self, result: tuple[Tensor | None, Tensor | None], weighted: bool) -> float:
        """The largest error of the loss, of the gradient at a target, and of any row's gradient off the target.

        Either may be missing. Off the target it is the error of the row's norm, relative to the truth's: the target's
        element would hide it.
        """
        loss, gradient = result
        true_loss, true_gradient = self.truth(weighted)
        errors = []
        if loss is not None:
            errors.append(harness.relative_error(loss, true_loss))
        if gradient is not None:
            size = true_gradient.abs().max()
            # Half of the dtype's smallest step: off the targets, a mean over many rows is smaller than that in float16.
            step = torch.finfo(gradient.dtype).smallest_normal * torch.finfo(gradient.dtype).eps / 2
            for part in torch.arange(len(gradient), device=gradient.device).split(256):
                off = (gradient[part].detach().double() - true_gradient[part]).abs() - step
                off.clamp_(min=0)
                counted = self.targets[0][part] != IGNORED
                # An ignored row is 0 everywhere.
                target = torch.where(counted, self.targets[0][part], 0).unsqueeze(1)
                errors.append(float((off.gather(1, target) / size).max()))
                truth = true_gradient[part].scatter(1, target, 0).norm(dim=1)
                off = off.scatter(1, target, 0).norm(dim=1)
                errors.append(float(torch.where(counted, off / truth, off / size).max()))
        return harness.largest(errors)

    def restore(self) -> None:
        with torch.no_grad():
            for scratch, logits in zip(self.scratch, self.logits, strict=True):
                scratch.copy_(logits)


def forward(inputs: LossInputs, loss: LossFunction) -> Callable[[int], tuple[Tensor, None]]:
    def call(i: int) -> tuple[Tensor, None]:
        with torch.no_grad():
            return loss.function(logits[i], inputs.targets[i]), None

    logits = inputs.scratch if loss.overwrites == "forward" else inputs.logits
    return call


def forward_with_graph(inputs: LossInputs, loss: LossFunction) -> Callable[[int], tuple[Tensor, None]]:
    """The loss of logits that require grad, of which backward is never asked."""

    def call(i: int) -> tuple[Tensor, None]:
        return loss.function(inputs.logits[i], inputs.targets[i]).detach(), None

    return call


def backward(inputs: LossInputs, loss: LossFunction) -> Callable[[int], tuple[None, Tensor]]:
    @functools.cache
    def graph(i: int) -> Tensor:
        return loss.function(inputs.logits[i], inputs.targets[i])

    def call(i: int) -> tuple[None, Tensor]:
        (gradient,) = torch.autograd.grad(graph(i), inputs.logits[i], retain_graph=True)
        return None, gradient

    return call


class _Computed(torch.autograd.Function):
    """A tensor's memory as the output of a model."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def forward_and_backward(inputs: LossInputs, loss: LossFunction) -> Callable[[int], tuple[Tensor, Tensor]]:
    def call(i: int) -> tuple[Tensor, Tensor]:
        # A loss in place accepts neither a leaf nor a view of one.
        computed = _Computed.apply(logits[i]) if loss.overwrites else logits[i].view_as(logits[i])
        result = loss.function(computed, inputs.targets[i])
        (gradient,) = torch.autograd.grad(result, logits[i])
        return result, gradient

    logits = inputs.scratch if loss.overwrites else inputs.logits
    return call


def loss_provider(
    inputs: LossInputs, loss: LossFunction, make: Callable[[LossInputs, LossFunction], Callable[[int], Any]]
) -> Provider:
    """A provider of one pass of the loss: `forward`, `forward_with_graph`, `backward` or `forward_and_backward`."""
    return Provider(
        loss.name,
        make(inputs, loss),
        functools.partial(inputs.error, weighted=loss.weighted),
        restore=inputs.restore if loss.overwrites else None,
        not_capturable=loss.not_capturable,
        note=loss.note,
        leeway=loss.leeway,
    )


def loss_limit(dtype: torch.dtype) -> float:
    """The largest error of the loss or the gradient of a valid time."""
    # The exponent of a large logit has a rounding error of more than one epsilon.
    return max(4 * torch.finfo(dtype).eps, 1e-5)


def zipf_ids(clock: Clock, count: int, vocab_size: int) -> Tensor:
    """int32 ids; the id of rank r has a probability proportional to 1 / r."""
    generator = torch.Generator(clock.device).manual_seed(1)
    ranks = torch.arange(1, vocab_size + 1, device=clock.device, dtype=torch.float64)
    edges = (1 / ranks).cumsum(0)
    edges = (edges / edges[-1]).float()
    ids = torch.empty(count, dtype=torch.int32, device=clock.device)
    for part in ids.split(2**26):
        draws = torch.rand(part.numel(), device=clock.device, generator=generator)
        part.copy_(torch.searchsorted(edges, draws, out_int32=True).clamp_(max=vocab_size - 1))
    return ids


def scattered_ids(clock: Clock, count: int, vocab_size: int) -> Tensor:
    """zipf_ids of an unordered vocabulary: frequent ids are anywhere in it."""
    generator = torch.Generator(clock.device).manual_seed(2)
    order = torch.randperm(vocab_size, device=clock.device, generator=generator, dtype=torch.int32)
    return order[zipf_ids(clock, count, vocab_size)]


def uniform_ids(clock: Clock, count: int, vocab_size: int) -> Tensor:
    generator = torch.Generator(clock.device).manual_seed(1)
    return torch.randint(vocab_size, (count,), dtype=torch.int32, device=clock.device, generator=generator)


def equal_ids(clock: Clock, count: int, vocab_size: int) -> Tensor:
    return torch.full((count,), vocab_size // 3, dtype=torch.int32, device=clock.device)


def sorted_ids(clock: Clock, count: int, vocab_size: int) -> Tensor:
    """zipf_ids in ascending order: each id in one run."""
    return torch.repeat_interleave(torch.bincount(zipf_ids(clock, count, vocab_size))).int()


def alternating_ids(clock: Clock, count: int, vocab_size: int) -> Tensor:
    """The first id and the last in turns: never a run, and always the same two counters."""
    return torch.arange(count, dtype=torch.int32, device=clock.device).remainder_(2).mul_(vocab_size - 1)


IDS = {
    "Zipf": zipf_ids,
    "Zipf, scattered": scattered_ids,
    "uniform": uniform_ids,
    "sorted": sorted_ids,
    "all equal": equal_ids,
    "two in turn": alternating_ids,
}


# Makes a provider of the counts of each buffer: (buffers, vocabulary's size, error of the first one's counts).
Counter = Callable[[list[Tensor], int, Callable[[Tensor], float]], Provider]


def count_by_pdl_ext(buffers: list[Tensor], vocab_size: int, error: Callable[[Tensor], float]) -> Provider:
    # The first call adds to zeros, so its results are the counts of its buffer.
    frequency = TokenFrequency(vocab_size).to(buffers[0].device)

    def call(i: int) -> Tensor:
        frequency.update(buffers[i])
        return frequency.counts

    return Provider("pdl_ext", call, error)


def count_by_torch(buffers: list[Tensor], vocab_size: int, error: Callable[[Tensor], float]) -> Provider:
    widened = buffers[0].dtype == torch.uint16

    def call(i: int) -> Tensor:
        return torch.bincount(buffers[i].to(torch.int32) if widened else buffers[i], minlength=vocab_size)

    note = "of ids.to(int32)" if widened else ""
    return Provider("torch.bincount", call, error, not_capturable="it waits for the device", note=note)


def histogram_group(
    clock: Clock, vocab_size: int, kind: str, count: int, dtypes: Sequence[torch.dtype], counters: Sequence[Counter]
) -> Group:
    """Counting of ids, in each of the dtypes."""
    name = f"histogram of {count} ids, V {vocab_size}, {kind}"

    def workloads() -> Iterator[Workload]:
        ids = IDS[kind](clock, count, vocab_size)
        truth = torch.zeros(vocab_size, dtype=torch.int64, device=clock.device)
        for part in ids.split(2**26):
            truth += reference.count_tokens(part, vocab_size)
        error = functools.partial(harness.relative_error, truth=truth.double())
        for dtype in dtypes:
            size = count * dtype.itemsize
            buffers = [ids.to(dtype) for _ in range(harness.buffers_for(clock, size))]
            providers = [counter(buffers, vocab_size, error) for counter in counters]
            dtype_name = str(dtype).removeprefix("torch.")
            yield Workload(f"{name}, {dtype_name}", providers, 0.0, size + 8 * vocab_size, len(buffers), items=count)

    return Group(name, workloads)


def weights_group(clock: Clock, vocab_size: int) -> Group:
    """The table of weights from the counts."""
    name = f"token weights, V {vocab_size}"
    law = PowerLaw(alpha=0.5)

    def workloads() -> Iterator[Workload]:
        counts = torch.bincount(zipf_ids(clock, 16 * vocab_size, vocab_size), minlength=vocab_size)
        buffers = [counts.clone() for _ in range(harness.buffers_for(clock, 12 * vocab_size))]
        error = functools.partial(harness.relative_error, truth=reference.token_weights(counts, law))
        providers = [
            Provider("pdl_ext", lambda i: pdl_ext.functional.token_weights(buffers[i], law), error),
            Provider(
                "plain PyTorch",
                lambda i: reference.token_weights(buffers[i], law).float(),
                error,
                not_capturable="it waits for the device",
                note="in float64",
            ),
        ]
        yield Workload(name, providers, 1e-5, 12 * vocab_size, len(buffers), items=vocab_size)

    return Group(name, workloads)


def tiny_group(clock: Clock, rows: int, vocab_size: int, calls: int) -> Group:
    """A step of the module on logits so few that only the overhead remains."""
    name = f"step of the module, float32 [{rows}, {vocab_size}]"
    law = PowerLaw(alpha=0.5)

    def workloads() -> Iterator[Workload]:
        inputs = LossInputs(clock, rows, vocab_size, torch.float32, peaked=False, ignored=0.0)
        logits, targets = inputs.logits[0], inputs.targets[0]
        counts = torch.bincount(zipf_ids(clock, 16 * vocab_size, vocab_size), minlength=vocab_size)
        given, online = PDLLoss(counts, weighting=law), PDLLoss(vocab_size=vocab_size, weighting=law).to(clock.device)
        seen_once = reference.count_tokens(targets, vocab_size)
        table = law.weights(given.frequency)
        steps: list[tuple[str, Callable[[Tensor, Tensor], Tensor], Tensor]] = [
            ("PDLLoss", given, counts),
            ("PDLLoss, online", online, seen_once),
            ("pdl_ext", functools.partial(pdl_ext.functional.pdl_loss, token_weight=table), counts),
            ("F.cross_entropy", functools.partial(F.cross_entropy, weight=table), counts),
        ]

        def provider(name: str, step: Callable[[Tensor, Tensor], Tensor], counted: Tensor) -> Provider:
            exact = logits.detach().double().requires_grad_()
            loss = reference.pdl_loss(exact, targets, reference.token_weights(counted, law))
            (gradient,) = torch.autograd.grad(loss, exact)

            def call(_: int) -> tuple[Tensor, Tensor]:
                loss = step(logits, targets)
                return loss, torch.autograd.grad(loss, logits)[0]

            def error(result: tuple[Tensor, Tensor]) -> float:
                return harness.largest(map(harness.relative_error, result, (loss, gradient)))

            return Provider(name, call, error)

        providers = [provider(*step) for step in steps]
        yield Workload(name, providers, 1e-5, 2 * 4 * rows * vocab_size, calls)

    return Group(name, workloads)


def is_ours(row: Row) -> bool:
    return row.provider.startswith(("pdl_ext", "PDLLoss"))


def failures(report: Report) -> list[str]:
    """The failures of a run, a line each. Failures of peers are left out."""
    ours = [row for row in report.rows if is_ours(row)]
    lines = [f"{row.workload}, {row.provider}: {row.failure}" for row in ours if row.failure]
    lines += [f"{name}: {why}" for name, why in report.failures.items()]
    return lines if ours else [*lines, "nothing of pdl_ext was measured"]
