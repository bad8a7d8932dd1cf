"""Loads the compiled ops, and gives them their fake kernels and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from pdl_ext import _C
except ImportError as error:
    raise ImportError(
        "pdl_ext's compiled module cannot be imported. In a source folder, build it first: run `pip install -e .` "
        "there, or leave the folder to use an installed pdl_ext. "
        f"({error})"
    ) from error

__all__ = ["REDUCTIONS", "ROW_CE", "ROW_LOG_SUM", "ROW_MAX", "ROW_NLL", "ROW_TOKEN_WEIGHT", "_C", "ops"]

ops = torch.ops.pdl_ext

# The numbers of csrc/row_loss.h's Reduction and csrc/loss_arguments.h's RowOutput.
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "token_mean": 3}
ROW_MAX, ROW_LOG_SUM, ROW_NLL, ROW_CE, ROW_TOKEN_WEIGHT = range(5)


def accumulator_dtype(logits: torch.dtype) -> torch.dtype:
    """float64 for float64 logits, else float32: the dtype of losses and row statistics."""
    return torch.float64 if logits == torch.float64 else torch.float32


@torch.library.register_fake("pdl_ext::loss_forward")
def _(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    row_weight: Tensor | None,
    logit_offset: Tensor | None,
    normalizer: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float,
    predict: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = logits.shape[0]
    dtype = accumulator_dtype(logits.dtype)
    return (
        logits.new_empty((n,) if reduction == REDUCTIONS["none"] else (), dtype=dtype),
        logits.new_empty((5, n), dtype=dtype),
        logits.new_empty((3,), dtype=dtype),
        logits.new_empty((n if predict else 0,), dtype=torch.int64),
    )


@torch.library.register_fake("pdl_ext::loss_backward")
def _(grad_loss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("pdl_ext::loss_backward_")
def _(*_: Any) -> None:
    return None


@torch.library.register_fake("pdl_ext::token_weights")
def _(counts: Tensor, *_: Any) -> Tensor:
    return counts.new_empty(counts.shape, dtype=torch.float32)


@torch.library.register_fake("pdl_ext::count_tokens_")
def _(*_: Any) -> None:
    return None


def _save_for_loss_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, _token_weight, row_weight, logit_offset, _normalizer, *options, _predict, inplace_backward = inputs
    _loss, rows, totals, predicted = output
    ctx.mark_non_differentiable(rows, totals, predicted)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, row_weight, logit_offset, rows, totals)
    ctx.options = options
    ctx.inplace_backward = inplace_backward


_NO_SECOND_DERIVATIVE = (
    "pdl_ext: the fused loss has no second derivative; pdl_ext.reference.pdl_loss is differentiable twice"
)


class _NoSecondDerivative(torch.autograd.Function):
    """Returns a gradient that was computed without a graph, tied to what it depends on by a backward that raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(_NO_SECOND_DERIVATIVE)


def _loss_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    logits, targets, row_weight, logit_offset, rows, totals = ctx.saved_tensors
    grad_logits = grad_row_weight = None
    if grad_loss is not None and ctx.needs_input_grad[3]:
        # d loss / d row_weight = token_weight * (ce - mean, if the row weights are in the denominator) / denominator.
        weighted, _per_row, correction = totals.unbind()
        with torch.no_grad():
            grad_row_weight = grad_loss * rows[ROW_TOKEN_WEIGHT] * (rows[ROW_CE] - correction) * weighted
        if torch.is_grad_enabled():  # create_graph=True
            grad_row_weight = _NoSecondDerivative.apply(grad_row_weight, grad_loss, logits, row_weight)
    if grad_loss is not None and ctx.needs_input_grad[0]:
        arguments = (grad_loss, logits, targets, rows, totals, row_weight, logit_offset, *ctx.options)
        if ctx.inplace_backward and not torch.is_grad_enabled():  # with create_graph=True, loss_backward refuses
            ops.loss_backward_(*arguments)
            # The op wrote where the logits were: whoever saved them for another gradient must be told.
            torch.autograd.graph.increment_version(logits)
            grad_logits = logits.detach()
        else:
            grad_logits = ops.loss_backward(*arguments)
    return (grad_logits, None, None, grad_row_weight) + (None,) * 10


def _refuse_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(_NO_SECOND_DERIVATIVE)


torch.library.register_autograd("pdl_ext::loss_forward", _loss_backward, setup_context=_save_for_loss_backward)
torch.library.register_autograd("pdl_ext::loss_backward", _refuse_double_backward)
