"""The fused linear beside other ways to compute a loss and its gradients of hidden states and a classifier.

A module of cpu.py and gpu.py. Every provider returns the loss and the gradients of hidden states and classifier; peaks
do not include those gradients. TFLOP/s count the three products that the task needs, 6 N H V, whatever a provider
computes. One provider is not a peer: it computes those products without a loss, which is the lower bound of the task.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence

import harness
import torch
import torch.nn.functional as F
from harness import Clock, Group, Provider, Workload
from torch import Tensor
from workloads import PART, loss_limit

import pdl_ext
from pdl_ext.engine import linear
from pdl_ext.engine.products import product_into

# The provider that is not a peer: the cost of the task without a loss.
PRODUCTS = "the three products alone"
# The first release of TRL whose head does not need Triton.
OLDEST_TRL = (1, 16)
# A mean loss of hidden states, classifier and targets.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
# A slow peer's calls take half a minute.
LEAST_ROUNDS = 3


class LinearInputs:
    """Hidden states, classifier and targets, and the true results."""

    def __init__(self, clock: Clock, rows: int, hidden: int, vocab_size: int, dtype: torch.dtype) -> None:
        generator = torch.Generator(clock.device).manual_seed(0)
        make = functools.partial(torch.randn, device=clock.device, generator=generator)
        self.hidden = make(rows, hidden).to(dtype).requires_grad_()
        # The logits resemble those of a model: their size is about 2.
        self.classifier = (make(vocab_size, hidden) * 2 / hidden**0.5).to(dtype).requires_grad_()
        self.targets = torch.randint(vocab_size, (rows,), device=clock.device, generator=generator)
        self.weight = 0.5 + torch.rand(vocab_size, device=clock.device, generator=generator)

    def truth(self, weighted: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The loss in float64, and both of its gradients."""
        return self._weighted_truth if weighted else self._unweighted_truth

    @functools.cached_property
    def _weighted_truth(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._compute_truth(self.weight)

    @functools.cached_property
    def _unweighted_truth(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._compute_truth(torch.ones_like(self.weight))

    @torch.no_grad()
    def _compute_truth(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        classifier = self.classifier.double()
        weights = weight[self.targets].double()
        weights = weights / weights.sum()
        loss = weights.new_zeros(())
        of_hidden, of_classifier = torch.empty_like(self.hidden, dtype=torch.float64), torch.zeros_like(classifier)
        for part in _parts(len(weights), classifier):
            hidden, targets = self.hidden[part].double(), self.targets[part, None]
            logs = (hidden @ classifier.t()).log_softmax(1)
            loss -= weights[part] @ logs.gather(1, targets).squeeze(1)
            errors = logs.exp_().scatter_add_(1, targets, -torch.ones_like(targets, dtype=torch.float64))
            errors *= weights[part, None]
            of_hidden[part] = errors @ classifier
            of_classifier.addmm_(errors.t(), hidden)
        return loss, of_hidden, of_classifier

    def error(self, result: tuple[Tensor, Tensor, Tensor], weighted: bool) -> float:
        """The largest error of the loss and of the whole gradients."""
        return harness.largest(map(harness.relative_error, result, self.truth(weighted)))


def _parts(rows: int, classifier: Tensor) -> tuple[Tensor, ...]:
    """Groups of rows whose float64 logits have a limited size."""
    return torch.arange(rows, device=classifier.device).split(max(1, PART // len(classifier)))


def cpu_peers() -> dict[str, str]:
    """The versions of the peers that run on a CPU and may be missing, for a report."""
    version = harness.version_of("trl", "trl")
    if version != "absent" and not _has_trl_head():
        version += ", too old: its head runs on a CPU from 1.16 on"
    there = "in this PyTorch" if hasattr(F, "linear_cross_entropy") else "not in this PyTorch"
    return {"TRL": version, "F.linear_cross_entropy": there}


def _has_trl_head() -> bool:
    parts = harness.version_of("trl", "trl").split(".")[:2]
    return all(map(str.isdigit, parts)) and tuple(map(int, parts)) >= OLDEST_TRL


def products_provider(inputs: LinearInputs) -> Provider:
    """h W^T, g W and g^T h in the slabs of rows that pdl_ext takes on this device. g are the logits as they are."""
    hidden, classifier = inputs.hidden.detach(), inputs.classifier.detach()
    vocab_size = len(classifier)
    # The alignment of pdl_ext's slabs, which makes products faster.
    stride = linear._row_stride(vocab_size)
    most = min(linear._MOST_ROWS, linear._MAX_CHUNK_BYTES[hidden.device.type] // hidden.itemsize // stride)
    slabs = linear._ranges(len(hidden), most, linear._LEAST_ROWS)
    # As pdl_ext sums a 16-bit classifier's gradient there.
    wide = torch.float32 if hidden.is_cuda and len(slabs) > 1 else hidden.dtype

    def call(_: int) -> tuple[Tensor, Tensor]:
        of_hidden, of_classifier = torch.empty_like(hidden), torch.empty_like(classifier, dtype=wide)
        memory = hidden.new_empty(slabs[0][1], stride)
        # oneDNN's 16-bit products read the memory between the rows.
        memory[:, vocab_size:].zero_()
        for begin, end in slabs:
            rows, slab = hidden[begin:end], memory[: end - begin, :vocab_size]
            product_into(slab, rows, classifier.t())
            product_into(of_hidden[begin:end], slab, classifier)
            product_into(of_classifier, slab.t(), rows, add=begin > 0)
        return of_hidden, of_classifier

    def error(result: tuple[Tensor, Tensor]) -> float:
        exact, exact_classifier = hidden.double(), classifier.double()
        of_hidden, of_classifier = torch.empty_like(exact), torch.zeros_like(exact_classifier)
        for part in _parts(len(exact), classifier):
            logits = exact[part] @ exact_classifier.t()
            of_hidden[part] = logits @ exact_classifier
            of_classifier.addmm_(logits.t(), exact[part])
        return harness.largest(map(harness.relative_error, result, (of_hidden, of_classifier)))

    return Provider(PRODUCTS, call, error, not_capturable="not tried", note="no loss")


def _ours(weight: Tensor) -> Iterator[tuple[str, Loss, bool]]:
    yield "pdl_ext, linear", lambda h, w, y: pdl_ext.functional.linear_pdl_loss(h, w, y, weight), True


def _pytorch(weight: Tensor, dtype: torch.dtype, compiled: bool) -> Iterator[tuple[str, Loss, bool]]:
    in_dtype = weight.to(dtype)
    yield "F.linear, F.cross_entropy", lambda h, w, y: F.cross_entropy(F.linear(h, w), y, in_dtype), True
    if compiled:
        torch.compiler.reset()
        fused = torch.compile(lambda h, w, y: F.cross_entropy(F.linear(h, w).float(), y, weight), dynamic=False)
        yield "F.linear, F.cross_entropy, compiled", fused, True
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()

        def chunked(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return F.linear_cross_entropy(h, w, y, weight=in_dtype, options=options)

        yield "F.linear_cross_entropy", chunked, True


def _installed(weight: Tensor) -> Iterator[tuple[str, Loss, bool]]:
    # Resolved inside the calls, so that a peer that cannot be imported loses only its own rows.
    def liger(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(ce_weight=weight)(w, h, y)

    def cut(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(h, w, y)

    def quack(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return chunked_linear_cross_entropy(h, w, y)

    if _has_trl_head():

        def trl(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            from trl.kernels import ChunkedLogProbFunction
            from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

            # As its head calls it, with rows weighted as its user does.
            log_probs, *_ = ChunkedLogProbFunction.apply(h, w, None, y, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
            of_rows = weight[y]
            return -(of_rows * log_probs).sum() / of_rows.sum()

        yield "TRL's head", trl, True
    peers: list[tuple[str, str, Loss, bool]] = [
        ("liger-kernel, linear", "liger_kernel", liger, True),
        ("cut-cross-entropy", "cut_cross_entropy", cut, False),
        ("quack-kernels, linear", "quack", quack, False),
    ]
    for name, module, loss, weighted in peers:
        if importlib.util.find_spec(module) is not None:
            yield name, loss, weighted


def linear_group(
    clock: Clock,
    name: str,
    shapes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    peers: bool = True,
    compiled: bool = True,
) -> Group:
    """The loss of hidden states with both gradients, at shapes (N, H, V); `compiled` adds the compiler to the peers."""
    dtype_name = str(dtype).removeprefix("torch.")

    def provider(inputs: LinearInputs, name: str, loss: Loss, weighted: bool) -> Provider:
        def call(_: int) -> tuple[Tensor, ...]:
            result = loss(inputs.hidden, inputs.classifier, inputs.targets)
            return result, *torch.autograd.grad(result, (inputs.hidden, inputs.classifier))

        note = "" if weighted else "unweighted"
        return Provider(
            name, call, functools.partial(inputs.error, weighted=weighted), not_capturable="not tried", note=note
        )

    def workloads() -> Iterator[Workload]:
        for rows, hidden, vocab_size in shapes:
            inputs = LinearInputs(clock, rows, hidden, vocab_size, dtype)
            losses = [*_ours(inputs.weight)]
            if peers:
                losses += [*_pytorch(inputs.weight, dtype, compiled), *_installed(inputs.weight)]
            providers = [provider(inputs, *loss) for loss in losses]
            providers.append(products_provider(inputs))
            yield Workload(
                f"{name} {dtype_name} [{rows}, {hidden}] x {vocab_size}",
                providers,
                loss_limit(dtype),
                0,
                flop=6 * rows * hidden * vocab_size,
                result_bytes=inputs.hidden.nbytes + inputs.classifier.nbytes,
                least_rounds=LEAST_ROUNDS,
            )

    return Group(f"{name} {dtype_name}", workloads)
