"""The cost of the losses of the family beside the plain one, beside PyTorch, and beside two passes of our own.

A module of cpu.py. The first provider of a workload is the plain loss, so the ratios of the others are their extra
cost. Two passes: first statistics, then a row weight computed from them, as every modulation did before it was fused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import harness
import torch
import torch.nn.functional as F
from harness import Clock, Group, Provider, Workload
from linear import LEAST_ROUNDS, LinearInputs
from torch import Tensor
from workloads import LossFunction, LossInputs, forward_and_backward, loss_limit

from pdl_ext import functional, reference
from pdl_ext.modulation import DFT, EAFT, Focal, MiLe, Modulation

# A loss of logits and targets.
Loss = Callable[[Tensor, Tensor], Tensor]
FAMILY: Sequence[Modulation] = (DFT(), Focal(), EAFT(), MiLe())
IN_PYTORCH: Sequence[Modulation] = (DFT(), EAFT(), MiLe())


def _factor_of(modulation: Modulation, nll: Tensor, entropy: Tensor, vocab_size: int) -> Tensor:
    """The factor of each row, detached; all rows count."""
    factor = modulation.factor(nll, entropy, vocab_size)
    return factor / factor.mean() if modulation.is_normalized else factor


def _by_two_passes(modulation: Modulation, statistics: Callable, loss: Callable, vocab_size: int) -> Tensor:
    with torch.no_grad():
        _, stats = statistics(return_stats=True)
        factor = _factor_of(modulation, stats.nll, stats.entropy, vocab_size)
    return loss(row_weight=factor, normalizer=stats.weight.sum())


def _in_pytorch(modulation: Modulation, weight: Tensor) -> Loss:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.float()
        nll = F.cross_entropy(logits, targets, reduction="none")
        entropy = nll.detach()
        if modulation.of_entropy:
            log_p = torch.log_softmax(logits.detach(), -1)
            entropy = -(log_p.exp() * log_p).sum(-1)
        factor = _factor_of(modulation, nll.detach(), entropy, logits.shape[-1])
        of_rows = weight[targets]
        return (of_rows * factor * nll).sum() / of_rows.sum()

    return loss


class _Truth:
    """The mean loss under a modulation in float64, and its gradient at some rows, in parts."""

    def __init__(self, logits_of: Callable[[Tensor], Tensor], targets: Tensor, weight: Tensor, vocab_size: int) -> None:
        self.logits_of, self.targets, self.weight = logits_of, targets, weight
        self.parts = torch.arange(len(targets)).split(max(1, 2**24 // vocab_size))
        self._found: dict[Modulation | None, tuple[Tensor, float]] = {}

    def of(self, modulation: Modulation | None) -> tuple[Tensor, float]:
        """The loss, and by what its sum was divided."""
        if modulation not in self._found:
            self._found[modulation] = self._compute(modulation)
        return self._found[modulation]

    def _compute(self, modulation: Modulation | None) -> tuple[Tensor, float]:
        of_row = None if modulation is None else modulation.of_row
        total, factors = torch.zeros((), dtype=torch.float64), 0.0
        for part in self.parts:
            logits, targets = self.logits_of(part).detach(), self.targets[part]
            loss, stats = reference.pdl_loss(
                logits, targets, self.weight, reduction="sum", modulation=of_row, return_stats=True
            )
            total += loss
            if modulation is not None:
                factors += float(modulation.factor(stats.nll, stats.entropy, logits.shape[-1]).sum())
        divisor = float(self.weight[self.targets].double().sum())
        if modulation is not None and modulation.is_normalized:
            divisor *= factors / len(self.targets)
        return total / divisor, divisor

    def gradient(self, modulation: Modulation | None, rows: Tensor) -> Tensor:
        """Of the logits of some rows."""
        logits = self.logits_of(rows).detach().requires_grad_()
        of_row = None if modulation is None else modulation.of_row
        loss = reference.pdl_loss(logits, self.targets[rows], self.weight, reduction="sum", modulation=of_row)
        return torch.autograd.grad(loss / self.of(modulation)[1], logits)[0]


def _dense_losses(inputs: LossInputs) -> Iterator[tuple[str, Loss, Modulation | None, bool]]:
    weight, vocab_size = inputs.weight, inputs.weight.shape[0]
    over_logits = functools.partial(functional.pdl_loss, inplace_backward=True)
    yield "pdl_ext", lambda x, y: over_logits(x, y, weight), None, True
    for modulation in FAMILY:
        name = type(modulation).__name__
        yield f"pdl_ext, {name}", lambda x, y, m=modulation: over_logits(x, y, weight, modulation=m), modulation, True
    yield "pdl_ext, statistics", lambda x, y: over_logits(x, y, weight, return_stats=True)[0], None, True
    for modulation in IN_PYTORCH:
        name = type(modulation).__name__

        def two_passes(x: Tensor, y: Tensor, m: Modulation = modulation) -> Tensor:
            statistics = functools.partial(functional.pdl_loss, x, y, weight)
            return _by_two_passes(m, statistics, functools.partial(over_logits, x, y, weight), vocab_size)

        yield f"two passes, {name}", two_passes, modulation, True
        yield f"PyTorch, {name}", _in_pytorch(modulation, weight), modulation, False
    torch.compiler.reset()
    for modulation in IN_PYTORCH:
        compiled = torch.compile(_in_pytorch(modulation, weight), dynamic=False)
        yield f"PyTorch compiled, {type(modulation).__name__}", compiled, modulation, False


def family_group(clock: Clock, elements: int, vocab_size: int, dtype: torch.dtype) -> Group:
    """Losses over their logits, with the gradient."""
    rows = -(-elements // vocab_size)
    name = f"family {str(dtype).removeprefix('torch.')} [{rows}, {vocab_size}]"

    def workloads() -> Iterator[Workload]:
        inputs = LossInputs(clock, rows, vocab_size, dtype, peaked=False, ignored=0.0)
        first = inputs.logits[0].detach()
        truth = _Truth(lambda part: first[part].double(), inputs.targets[0], inputs.weight, vocab_size)

        def provider(name: str, loss: Loss, modulation: Modulation | None, in_place: bool) -> Provider:
            def error(result: tuple[Tensor, Tensor]) -> float:
                gradient = torch.cat([truth.gradient(modulation, part) for part in truth.parts])
                return harness.largest(map(harness.relative_error, result, (truth.of(modulation)[0], gradient)))

            function = LossFunction(name, loss, overwrites="forward" if in_place else "")
            call = forward_and_backward(inputs, function)
            return Provider(name, call, error, restore=inputs.restore if in_place else None)

        yield Workload(
            name,
            [provider(*each) for each in _dense_losses(inputs)],
            loss_limit(dtype),
            2 * rows * vocab_size * dtype.itemsize,
            len(inputs.logits),
            items=rows * vocab_size,
        )

    return Group(name, workloads)


def family_linear_group(clock: Clock, shape: tuple[int, int, int], dtype: torch.dtype) -> Group:
    """The fused linear, with both gradients, at a shape (N, H, V)."""
    rows, hidden, vocab_size = shape
    name = f"family, linear {str(dtype).removeprefix('torch.')} [{rows}, {hidden}] x {vocab_size}"

    def workloads() -> Iterator[Workload]:
        inputs = LinearInputs(clock, rows, hidden, vocab_size, dtype)
        weight, targets = inputs.weight, inputs.targets
        classifier = inputs.classifier.detach().double()
        truth = _Truth(lambda part: inputs.hidden.detach()[part].double() @ classifier.t(), targets, weight, vocab_size)
        fused = functools.partial(functional.linear_pdl_loss, inputs.hidden, inputs.classifier, targets, weight)

        def provider(name: str, loss: Callable[[], Tensor], modulation: Modulation | None) -> Provider:
            def call(_: int) -> tuple[Tensor, Tensor, Tensor]:
                result = loss()
                return result, *torch.autograd.grad(result, (inputs.hidden, inputs.classifier))

            def error(result: tuple[Tensor, Tensor, Tensor]) -> float:
                of_hidden, of_classifier = [], torch.zeros_like(classifier)
                for part in truth.parts:
                    gradient = truth.gradient(modulation, part)
                    of_hidden.append(gradient @ classifier)
                    of_classifier.addmm_(gradient.t(), inputs.hidden.detach()[part].double())
                truths = (truth.of(modulation)[0], torch.cat(of_hidden), of_classifier)
                return harness.largest(map(harness.relative_error, result, truths))

            return Provider(name, call, error)

        providers = [provider("pdl_ext, linear", fused, None)]
        for modulation in FAMILY:
            fused_family = functools.partial(fused, modulation=modulation)
            providers.append(provider(f"pdl_ext, {type(modulation).__name__}", fused_family, modulation))
        providers.append(provider("pdl_ext, statistics", lambda: fused(return_stats=True)[0], None))
        for modulation in IN_PYTORCH:
            of_modulation = type(modulation).__name__
            two_passes = functools.partial(_by_two_passes, modulation, fused, fused, vocab_size)
            providers.append(provider(f"two passes, {of_modulation}", two_passes, modulation))
            in_pytorch = _in_pytorch(modulation, weight)

            def unfused(loss: Loss = in_pytorch) -> Tensor:
                return loss(F.linear(inputs.hidden, inputs.classifier), targets)

            providers.append(provider(f"PyTorch, {of_modulation}", unfused, modulation))
        yield Workload(
            name,
            providers,
            loss_limit(dtype),
            0,
            flop=6 * rows * hidden * vocab_size,
            result_bytes=inputs.hidden.nbytes + inputs.classifier.nbytes,
            least_rounds=LEAST_ROUNDS,
        )

    return Group(name, workloads)
