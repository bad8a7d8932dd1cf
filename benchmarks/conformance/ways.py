"""The implementations, each with the few lines that its user would write."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import NotOffered, Task, Way
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

from pdl_ext import functional

__all__ = ["ways"]


def ways(device: torch.device) -> Iterator[Way]:
    """All implementations that are installed here and run on a device. Those with ranks run on the CPU."""
    yield Way("pdl_ext", True, _pdl_ext)
    yield Way("pdl_ext, in place", True, lambda scores, task: _pdl_ext(scores, task, inplace_backward=True))
    yield Way("F.cross_entropy", True, _cross_entropy)
    yield Way("F.cross_entropy, compiled", True, _compiled, may_abort=True)
    if device.type == "cuda":
        yield from _of_logits_on_cuda()
    yield Way("pdl_ext.linear", False, _pdl_ext_linear)
    if hasattr(F, "linear_cross_entropy"):
        yield Way("F.linear_cross_entropy, chunked", False, _linear_cross_entropy)
    if importlib.util.find_spec("trl") is not None and _version("trl") >= (1, 16):
        yield Way("TRL's head", False, _trl)
    if device.type == "cuda":
        yield from _of_hidden_states_on_cuda()
    yield from _of_ranks()


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


def _options(task: Task) -> dict[str, object]:
    options: dict[str, object] = {"ignore_index": task.ignore_index, "reduction": task.reduction}
    if task.label_smoothing:
        options |= {"label_smoothing": task.label_smoothing, "label_smoothing_weight": "class"}
    if task.normalizer is not None:
        options["normalizer"] = task.normalizer
    return options


def _pdl_ext(scores: list[Tensor], task: Task, **more: bool) -> Tensor:
    (logits,) = scores
    # In place a leaf is refused, as PyTorch does.
    logits = logits * 1.0 if more and logits.is_leaf else logits
    return functional.pdl_loss(logits, task.targets, task.weight, **_options(task), **more)


def _pdl_ext_linear(scores: list[Tensor], task: Task) -> Tensor:
    hidden, classifier = scores
    return functional.linear_pdl_loss(
        hidden, classifier, task.targets, task.weight, max_chunk_bytes=1, **_options(task)
    )


def _of_pytorch(task: Task, dtype: torch.dtype) -> dict[str, object]:
    # It needs the weights in the logits' dtype.
    options = {
        "weight": None if task.weight is None else task.weight.to(dtype),
        "ignore_index": task.ignore_index,
        "label_smoothing": task.label_smoothing,
    }
    return options | {"reduction": task.reduction if task.normalizer is None else "sum"}


def _cross_entropy(scores: list[Tensor], task: Task) -> Tensor:
    (logits,) = scores
    loss = F.cross_entropy(logits, task.targets, **_of_pytorch(task, logits.dtype))
    return loss if task.normalizer is None else loss / task.normalizer


_compiled_cross_entropy = torch.compile(F.cross_entropy, dynamic=False)


def _compiled(scores: list[Tensor], task: Task) -> Tensor:
    (logits,) = scores
    loss = _compiled_cross_entropy(logits, task.targets, **_of_pytorch(task, logits.dtype))
    return loss if task.normalizer is None else loss / task.normalizer


def _linear_cross_entropy(scores: list[Tensor], task: Task) -> Tensor:
    hidden, classifier = scores
    options = torch.nn.LinearCrossEntropyOptions()
    given = _of_pytorch(task, hidden.dtype)
    loss = F.linear_cross_entropy(hidden, classifier, task.targets, options=options, **given)
    return loss if task.normalizer is None else loss / task.normalizer


def _trl(scores: list[Tensor], task: Task) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    if task.label_smoothing:
        raise NotOffered
    hidden, classifier = scores
    counted = task.targets != task.ignore_index
    # As its head does without Triton: all positions are scored.
    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden, classifier, None, task.targets.where(counted, 0), 1.0, 64, None, 1.0, ()
    )
    return _weighted(-log_probs.where(counted, 0.0), task)


def _weighted(losses: Tensor, task: Task) -> Tensor:
    """The losses of rows, weighted and reduced as the user of a way without weights does."""
    counted = task.targets != task.ignore_index
    weight = torch.ones_like(losses) if task.weight is None else task.weight[task.targets.where(counted, 0)]
    weight = weight.where(counted, 0.0)
    losses = losses * weight
    if task.normalizer is not None:
        return losses.sum() / task.normalizer
    if task.reduction == "mean":
        return losses.sum() / weight.sum().clamp(min=1e-12)
    return losses.sum() if task.reduction == "sum" else losses


def _of_logits_on_cuda() -> Iterator[Way]:
    if importlib.util.find_spec("liger_kernel") is not None:

        def liger(scores: list[Tensor], task: Task) -> Tensor:
            from liger_kernel.transformers import LigerCrossEntropyLoss

            loss = LigerCrossEntropyLoss(
                weight=task.weight,
                ignore_index=task.ignore_index,
                label_smoothing=task.label_smoothing,
                reduction=task.reduction if task.normalizer is None else "sum",
            )(scores[0] * 1.0, task.targets)
            return loss if task.normalizer is None else loss / task.normalizer

        yield Way("Liger-Kernel", True, liger)
    if importlib.util.find_spec("quack") is not None:

        def quack(scores: list[Tensor], task: Task) -> Tensor:
            from quack.cross_entropy import cross_entropy

            if task.label_smoothing:
                raise NotOffered
            losses = cross_entropy(scores[0], task.targets, reduction="none", ignore_index=task.ignore_index)
            return _weighted(losses, task)

        yield Way("quack", True, quack)
    if importlib.util.find_spec("flash_attn") is not None:

        def flash(scores: list[Tensor], task: Task) -> Tensor:
            from flash_attn.losses.cross_entropy import CrossEntropyLoss

            if task.label_smoothing and task.weight is not None:
                raise NotOffered
            losses = CrossEntropyLoss(
                ignore_index=task.ignore_index, reduction="none", label_smoothing=task.label_smoothing
            )(scores[0], task.targets)
            return _weighted(losses, task)

        yield Way("flash-attn", True, flash)
    if importlib.util.find_spec("transformer_engine") is not None:

        def transformer_engine(scores: list[Tensor], task: Task) -> Tensor:
            from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

            if task.label_smoothing and task.weight is not None:
                raise NotOffered
            losses = parallel_cross_entropy(
                scores[0].unsqueeze(0), task.targets.unsqueeze(0), task.label_smoothing, False, None, task.ignore_index
            )
            return _weighted(losses.reshape(-1), task)

        yield Way("Transformer Engine", True, transformer_engine)


def _of_hidden_states_on_cuda() -> Iterator[Way]:
    if importlib.util.find_spec("liger_kernel") is not None:

        def liger(scores: list[Tensor], task: Task) -> Tensor:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            hidden, classifier = scores
            loss = LigerFusedLinearCrossEntropyLoss(
                ce_weight=task.weight,
                ignore_index=task.ignore_index,
                label_smoothing=task.label_smoothing,
                reduction=task.reduction if task.normalizer is None else "sum",
            )(classifier, hidden, task.targets)
            return loss if task.normalizer is None else loss / task.normalizer

        yield Way("Liger-Kernel, fused linear", False, liger)
    if importlib.util.find_spec("cut_cross_entropy") is not None:

        def cut(scores: list[Tensor], task: Task) -> Tensor:
            from cut_cross_entropy import linear_cross_entropy

            if task.label_smoothing:
                raise NotOffered
            losses = linear_cross_entropy(*scores, task.targets, reduction="none", ignore_index=task.ignore_index)
            return _weighted(losses, task)

        yield Way("Cut Cross-Entropy", False, cut)


class _OfThisRank(torch.autograd.Function):
    """This rank's part of a dimension of a tensor that all ranks have."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int) -> Tensor:
        ctx.shape, ctx.dim = whole.shape, dim
        return whole.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _OfAllRanks.apply(gradient, ctx.shape, ctx.dim), None


class _OfAllRanks(torch.autograd.Function):
    """The tensor that has this rank's part, and those of the others."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, shape: torch.Size, dim: int) -> Tensor:
        ctx.dim = dim
        whole = torch.zeros(shape)
        whole.chunk(dist.get_world_size(), dim)[dist.get_rank()].copy_(part)
        dist.all_reduce(whole)
        return whole.to(part.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _OfThisRank.apply(gradient, ctx.dim), None, None


def _of_ranks() -> Iterator[Way]:
    """Those whose vocabulary two ranks share."""
    yield Way("pdl_ext, two ranks", True, _pdl_ext_of_ranks, ranks=2)
    yield Way("pdl_ext.linear, two ranks", False, _pdl_ext_linear_of_ranks, ranks=2)
    yield Way("PyTorch's loss_parallel, two ranks", True, _loss_parallel, ranks=2)
    if importlib.util.find_spec("megatron") is not None:
        yield Way("Megatron-LM, two ranks", True, _megatron, ranks=2)


def _pdl_ext_of_ranks(scores: list[Tensor], task: Task) -> Tensor:
    columns = _OfThisRank.apply(scores[0], -1)
    return functional.pdl_loss(columns, task.targets, task.weight, process_group=dist.group.WORLD, **_options(task))


def _pdl_ext_linear_of_ranks(scores: list[Tensor], task: Task) -> Tensor:
    hidden, classifier = scores
    rows = _OfThisRank.apply(classifier, 0)
    return functional.linear_pdl_loss(
        hidden, rows, task.targets, task.weight, process_group=dist.group.WORLD, **_options(task)
    )


def _loss_parallel(scores: list[Tensor], task: Task) -> Tensor:
    if task.label_smoothing:
        raise NotOffered
    (whole,) = scores
    columns = _OfThisRank.apply(whole, -1)
    logits = DTensor.from_local(columns, _mesh(), [Shard(-1)], shape=whole.shape, stride=whole.stride())
    loss = F.cross_entropy(logits, task.targets, **_of_pytorch(task, columns.dtype)).to_local()
    return loss if task.normalizer is None else loss / task.normalizer


# Backward needs it as well, so it stays entered.
_STACK = contextlib.ExitStack()


@functools.cache
def _mesh() -> DeviceMesh:
    _STACK.enter_context(loss_parallel())
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _megatron(scores: list[Tensor], task: Task) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if task.label_smoothing and task.weight is not None:
        raise NotOffered
    _initialize_megatron()
    (whole,) = scores
    vocab_size = whole.shape[1]
    # All ranks need the same number of columns.
    columns = _OfThisRank.apply(F.pad(whole, (0, vocab_size % 2), value=-torch.inf), -1)
    # It gives the share to all other tokens, and F.cross_entropy to all tokens.
    smoothing = task.label_smoothing * (vocab_size - 1) / vocab_size
    targets = task.targets.where(task.targets != task.ignore_index, 0)
    losses = vocab_parallel_cross_entropy(columns.unsqueeze(1), targets.unsqueeze(1), smoothing).squeeze(1)
    return _weighted(losses, task)


@functools.cache
def _initialize_megatron() -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
