"""Loads the compiled ops, and gives them their fake kernels and their gradients."""

from __future__ import annotations

from collections.abc import Callable
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

__all__ = [
    "REDUCTIONS",
    "ROW_CE",
    "ROW_LOG_SUM",
    "ROW_MAX",
    "ROW_NLL",
    "ROW_TOKEN_WEIGHT",
    "_C",
    "ops",
    "weighted_loss",
]

ops = torch.ops.pdl_ext

# The numbers of csrc/row_loss.h's Reduction and csrc/loss_arguments.h's RowOutput.
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "token_mean": 3}
ROW_MAX, ROW_LOG_SUM, ROW_NLL, ROW_CE, ROW_TOKEN_WEIGHT = range(5)


def accumulator_dtype(logits: torch.dtype) -> torch.dtype:
    """float64 for float64 logits, else float32: the dtype of losses and row statistics."""
    return torch.float64 if logits == torch.float64 else torch.float32


@torch.library.register_fake("pdl_ext::loss_forward")
def _loss_outputs(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = logits.shape[0]
    dtype = accumulator_dtype(logits.dtype)
    return (
        logits.new_empty((n,) if reduction == REDUCTIONS["none"] else (), dtype=dtype),
        logits.new_empty((5, n), dtype=dtype),
        logits.new_empty((3,), dtype=dtype),
        logits.new_empty((n if predict else 0,), dtype=torch.int64),
    )


@torch.library.register_fake("pdl_ext::loss_and_gradient_")
def _(logits: Tensor, gradient: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _loss_outputs(logits, *rest)


@torch.library.register_fake("pdl_ext::loss_backward")
def _(grad_loss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("pdl_ext::reduce_rows")
def _(rows: Tensor, targets: Tensor, _weight: Any, _normalizer: Any, reduction: int, *_: Any) -> tuple[Tensor, Tensor]:
    return rows.new_empty(targets.shape if reduction == REDUCTIONS["none"] else ()), rows.new_empty((3,))


@torch.library.register_fake("pdl_ext::token_weights")
def _(counts: Tensor, *_: Any) -> Tensor:
    return counts.new_empty(counts.shape, dtype=torch.float32)


for _name in ("scale_", "loss_backward_", "count_tokens_"):
    torch.library.register_fake(f"pdl_ext::{_name}", lambda *_: None)


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


def _row_weight_gradient(grad_loss: Tensor, rows: Tensor, totals: Tensor) -> Tensor:
    # token_weight * (ce - mean, if the row weights are in the denominator) / denominator
    weighted, _per_row, correction = totals.unbind()
    return grad_loss * rows[ROW_TOKEN_WEIGHT] * (rows[ROW_CE] - correction) * weighted


def _as_rows(logits: Tensor) -> Tensor:
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _overlap(rows: Tensor) -> bool:
    return rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]


def _backward(
    ctx: Any, grad_loss: Tensor | None, gradients: Callable[..., tuple[Tensor | None, Tensor | None]]
) -> tuple[Tensor | None, ...]:
    """What backward of a Function returns whose inputs begin with logits and have the row weights as the fourth."""
    rest = (None,) * (len(ctx.needs_input_grad) - 4)
    if grad_loss is None:
        return None, None, None, None, *rest
    if not torch.is_grad_enabled():
        grad_logits, grad_row_weight = gradients(ctx, grad_loss, once=True)
        return grad_logits, None, None, grad_row_weight, *rest
    # create_graph=True
    depends_on = (grad_loss, *ctx.saved_tensors[:2])
    with torch.no_grad():
        computed = gradients(ctx, grad_loss, once=False)
    grad_logits, grad_row_weight = (
        None if gradient is None else _NoSecondDerivative.apply(gradient, *depends_on) for gradient in computed
    )
    return grad_logits, None, None, grad_row_weight, *rest


# torch.autograd.Function and not torch.library.register_autograd, and no output that nobody asked for: a step on tiny
# inputs takes a third of the time.
class Loss(torch.autograd.Function):
    """loss_forward of logits [..., V] and its gradient, by loss_backward or, with `inplace_backward`, over the logits.

    Returns the loss, and with `predict` also the rows' statistics and predictions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        token_weight: Tensor | None,
        row_weight: Tensor | None,
        logit_offset: Tensor | None,
        normalizer: Tensor | None,
        options: tuple[Any, ...],
        predict: bool,
        inplace_backward: bool,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        rows_of_logits = _as_rows(logits)
        loss, rows, totals, predicted = ops.loss_forward(
            rows_of_logits, targets, token_weight, row_weight, logit_offset, normalizer, *options, predict
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, row_weight, targets, logit_offset, rows, totals)
        ctx.options = options
        ctx.inplace_backward = inplace_backward
        if not predict:
            return loss
        ctx.mark_non_differentiable(rows, predicted)
        return loss, rows, predicted

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_loss, _loss_gradients)


def _loss_gradients(ctx: Any, grad_loss: Tensor, once: bool) -> tuple[Tensor | None, Tensor | None]:
    logits, row_weight, targets, logit_offset, rows, totals = ctx.saved_tensors
    grad_logits = grad_row_weight = None
    if ctx.needs_input_grad[3]:
        grad_row_weight = _row_weight_gradient(grad_loss, rows, totals)
    if ctx.needs_input_grad[0]:
        rows_of_logits = _as_rows(logits)
        arguments = (grad_loss, rows_of_logits, targets, rows, totals, row_weight, logit_offset, *ctx.options)
        # The whole vocabulary.
        arguments += (0, rows_of_logits.shape[1])
        if ctx.inplace_backward and once and not _overlap(rows_of_logits):
            ops.loss_backward_(*arguments)
            # Whoever saved the logits for another gradient must be told that they are overwritten.
            torch.autograd.graph.increment_version(rows_of_logits)
            grad_logits = rows_of_logits.detach()
        else:
            grad_logits = ops.loss_backward(*arguments)
        if logits.dim() != 2:
            grad_logits = grad_logits.view(logits.shape)
    return grad_logits, grad_row_weight


class LossOverLogits(torch.autograd.Function):
    """loss_and_gradient_ of a scalar reduction: forward leaves the gradient where the logits were (or in their copy, if
    they had to be copied), for an upstream gradient of 1; backward multiplies it by another one, read on the device.

    Returns what Loss does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        token_weight: Tensor | None,
        row_weight: Tensor | None,
        logit_offset: Tensor | None,
        normalizer: Tensor | None,
        options: tuple[Any, ...],
        predict: bool,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        rows_of_logits = _as_rows(logits)
        gradient = rows_of_logits.new_empty(logits.shape) if _overlap(rows_of_logits) else rows_of_logits
        loss, rows, totals, predicted = ops.loss_and_gradient_(
            rows_of_logits,
            _as_rows(gradient),
            targets,
            token_weight,
            row_weight,
            logit_offset,
            normalizer,
            *options,
            predict,
        )
        overwritten = gradient.data_ptr() == logits.data_ptr()
        if overwritten:
            torch.autograd.graph.increment_version(logits)
        ctx.set_materialize_grads(False)
        ctx.shape = logits.shape
        # Saved, so that PyTorch refuses a backward after the gradient was written to, and a second one.
        ctx.save_for_backward(logits if overwritten else gradient, row_weight, rows, totals)
        if not predict:
            return loss
        ctx.mark_non_differentiable(rows, predicted)
        return loss, rows, predicted

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_loss, _scaled_gradients)


def _scaled_gradients(ctx: Any, grad_loss: Tensor, once: bool) -> tuple[Tensor | None, Tensor | None]:
    gradient, _row_weight, rows, totals = ctx.saved_tensors
    grad_row_weight = _row_weight_gradient(grad_loss, rows, totals) if ctx.needs_input_grad[3] else None
    ops.scale_(_as_rows(gradient), grad_loss)
    torch.autograd.graph.increment_version(gradient)
    return gradient.detach().view(ctx.shape), grad_row_weight


def weighted_loss(
    tensors: tuple[Tensor | None, ...], options: tuple[Any, ...], predict: bool, inplace_backward: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss of logits [..., V], with its gradient where one is needed; with `predict` also rows and predictions.

    tensors: logits and the others of loss_forward's; options: its options.
    """
    logits, row_weight = tensors[0], tensors[3]
    assert logits is not None
    if not torch.is_grad_enabled() or not (
        logits.requires_grad or (row_weight is not None and row_weight.requires_grad)
    ):
        loss, rows, _totals, predicted = ops.loss_forward(_as_rows(logits), *tensors[1:], *options, predict)
        return loss, rows, predicted
    if inplace_backward and logits.requires_grad and logits.is_leaf:
        raise RuntimeError(
            "logits: got a leaf that requires grad, expected what a model computed: inplace_backward would overwrite it"
        )
    # A vector of upstream gradients is not known in forward; a float16 gradient may be 0 without the loss scale.
    at_once = (
        inplace_backward and logits.requires_grad and options[0] != REDUCTIONS["none"] and logits.dtype != torch.float16
    )
    if at_once:
        result = LossOverLogits.apply(*tensors, options, predict)
    else:
        result = Loss.apply(*tensors, options, predict, inplace_backward)
    return result if predict else (result, None, None)
