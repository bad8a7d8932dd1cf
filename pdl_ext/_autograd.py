"""The gradients of the compiled ops of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pdl_ext import _ops
from pdl_ext._vocabulary import VocabularySlice, loss_forward

__all__ = ["NoSecondDerivative", "row_weight_gradient", "weighted_loss"]

_NO_SECOND_DERIVATIVE = (
    "pdl_ext: the fused loss has no second derivative; pdl_ext.reference.pdl_loss is differentiable twice"
)


class NoSecondDerivative(torch.autograd.Function):
    """Returns a gradient that was computed without a graph, tied to what it depends on by a backward that raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(_NO_SECOND_DERIVATIVE)


def row_weight_gradient(grad_loss: Tensor, rows: Tensor, totals: Tensor) -> Tensor:
    # token_weight * (ce - mean, if the row weights are in the denominator) / denominator
    weighted, _per_row, correction = totals.unbind()
    return grad_loss * rows[_ops.ROW_TOKEN_WEIGHT] * (rows[_ops.ROW_CE] - correction) * weighted


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
    # Read once: a checkpoint gives them once.
    saved = ctx.saved_tensors
    if not torch.is_grad_enabled():
        grad_logits, grad_row_weight = gradients(ctx, saved, grad_loss, once=True)
        return grad_logits, None, None, grad_row_weight, *rest
    # create_graph=True
    depends_on = (grad_loss, *saved[:2])
    with torch.no_grad():
        computed = gradients(ctx, saved, grad_loss, once=False)
    grad_logits, grad_row_weight = (
        None if gradient is None else NoSecondDerivative.apply(gradient, *depends_on) for gradient in computed
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
        part: VocabularySlice,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        others = (token_weight, row_weight, logit_offset, normalizer)
        loss, rows, totals, predicted = loss_forward(_as_rows(logits), targets, others, (*options, predict), part)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, row_weight, targets, logit_offset, rows, totals)
        ctx.options = options
        ctx.part = part
        ctx.inplace_backward = inplace_backward
        if not predict:
            return loss
        ctx.mark_non_differentiable(rows, predicted)
        return loss, rows, predicted

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_loss, _loss_gradients)


def _loss_gradients(
    ctx: Any, saved: tuple[Tensor, ...], grad_loss: Tensor, once: bool
) -> tuple[Tensor | None, Tensor | None]:
    logits, row_weight, targets, logit_offset, rows, totals = saved
    grad_logits = grad_row_weight = None
    if ctx.needs_input_grad[3]:
        grad_row_weight = row_weight_gradient(grad_loss, rows, totals)
    if ctx.needs_input_grad[0]:
        rows_of_logits = _as_rows(logits)
        arguments = (grad_loss, rows_of_logits, targets, rows, totals, row_weight, logit_offset, *ctx.options)
        arguments += (ctx.part.first_id, ctx.part.vocab_size)
        if ctx.inplace_backward and once and not _overlap(rows_of_logits):
            _ops.ops.loss_backward_(*arguments)
            # Whoever saved the logits for another gradient must be told that they are overwritten.
            torch.autograd.graph.increment_version(rows_of_logits)
            grad_logits = rows_of_logits.detach()
        else:
            grad_logits = _ops.ops.loss_backward(*arguments)
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
        loss, rows, totals, predicted = _ops.ops.loss_and_gradient_(
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


def _scaled_gradients(
    ctx: Any, saved: tuple[Tensor, ...], grad_loss: Tensor, once: bool
) -> tuple[Tensor | None, Tensor | None]:
    gradient, _row_weight, rows, totals = saved
    grad_row_weight = row_weight_gradient(grad_loss, rows, totals) if ctx.needs_input_grad[3] else None
    _ops.ops.scale_(_as_rows(gradient), grad_loss)
    torch.autograd.graph.increment_version(gradient)
    return gradient.detach().view(ctx.shape), grad_row_weight


def _refuse_leaf(logits: Tensor) -> None:
    # As PyTorch refuses to write to either: a parameter would be overwritten by its gradient.
    base = logits._base
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        got = "a leaf" if logits.is_leaf else "a view of a leaf"
        raise RuntimeError(
            f"logits: got {got} that requires grad, expected what a model computed: inplace_backward would overwrite it"
        )


def weighted_loss(
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    predict: bool,
    inplace_backward: bool,
    part: VocabularySlice,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss of logits [..., V], with its gradient where one is needed; with `predict` also rows and predictions.

    tensors: logits and the others of the op loss_forward; options: its options.
    """
    logits, row_weight = tensors[0], tensors[3]
    assert logits is not None
    if not torch.is_grad_enabled() or not (
        logits.requires_grad or (row_weight is not None and row_weight.requires_grad)
    ):
        _, targets, *others = tensors
        assert targets is not None
        loss, rows, _totals, predicted = loss_forward(
            _as_rows(logits), targets, tuple(others), (*options, predict), part
        )
        return (loss, rows, predicted) if predict else (loss, None, None)
    if inplace_backward and logits.requires_grad:
        _refuse_leaf(logits)
    # A vector of upstream gradients is not known in forward; a float16 gradient may be 0 without the loss scale.
    at_once = (
        inplace_backward
        and not part.group
        and logits.requires_grad
        and options[0] != _ops.REDUCTIONS["none"]
        and logits.dtype != torch.float16
    )
    if at_once:
        result = LossOverLogits.apply(*tensors, options, predict)
    else:
        result = Loss.apply(*tensors, options, predict, inplace_backward, part)
    return result if predict else (result, None, None)
