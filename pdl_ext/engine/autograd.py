"""The gradients of the compiled ops of the loss."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pdl_ext._checks import is_batch_of_gradients
from pdl_ext.engine import ops
from pdl_ext.engine.definition import defined_loss
from pdl_ext.engine.ops import Factors, LossInputs, SavedRows
from pdl_ext.engine.vocabulary import VocabularyShard, loss_forward
from pdl_ext.options import LossOptions

__all__ = ["LastUpstream", "divided_by_mean", "gradients_of", "row_weight_gradient", "weighted_loss"]

_NO_SECOND_DERIVATIVE = (
    "pdl_ext: the fused loss has no second derivative in place, in chunks, or of a shard: use functional.pdl_loss "
    "without inplace_backward and process_group, or pdl_ext.reference"
)
# The results of a Function, in its caller's form: the loss, and on request saved rows and predictions.
Results = tuple[Tensor, Tensor | None, Tensor | None]


class LastUpstream:
    """The most recent upstream gradient of a loss, on the device: the next gradient is computed for it.

    It is not state: a wrong guess costs time, and changes no bit of the result. Copies and pickles start with 1.
    """

    def __init__(self) -> None:
        # Never freed: another stream may be about to write to it.
        self._numbers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._waiting: weakref.ref[Tensor] | None = None

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The upstream gradient, 0-d, which backward writes to; 1 before the first backward."""
        number = self._numbers.get((device, dtype))
        if number is None:
            number = self._numbers[device, dtype] = torch.ones((), dtype=dtype, device=device)
        return number

    @property
    def is_waiting(self) -> bool:
        """Whether a gradient that forward computed still exists."""
        return self._waiting is not None and self._waiting() is not None

    def wait(self, gradient: Tensor) -> None:
        """Keeps a weak reference to a gradient that forward computed."""
        self._waiting = weakref.ref(gradient)

    def __reduce__(self) -> tuple[type[LastUpstream], tuple[()]]:
        return LastUpstream, ()


class NoSecondDerivative(torch.autograd.Function):
    """Returns a gradient that was computed without a graph; its own backward raises.

    The inputs that the gradient depends on become inputs of this Function.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(_NO_SECOND_DERIVATIVE)


def gradients_of(
    ctx: Any,
    differentiable: int,
    grad_loss: Tensor | None,
    compute: Callable[..., Iterable[Tensor | None]],
    compute_with_graph: Callable[..., Iterable[Tensor | None]] | None = None,
) -> tuple[Tensor | None, ...]:
    """The return value of backward of a Function: the gradients of its first `differentiable` inputs, then None.

    The Function has saved these inputs first.
    compute(ctx, saved, grad_loss, once) returns their gradients; once: nobody can ask for them again.
    compute_with_graph(ctx, saved, grad_loss) returns gradients that can be differentiated again.
    """
    rest = (None,) * (len(ctx.needs_input_grad) - differentiable)
    if grad_loss is None:
        return (*(None,) * differentiable, *rest)
    # Read only once: a checkpoint provides them only once.
    saved = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return (*compute(ctx, saved, grad_loss, True), *rest)
    # create_graph=True
    if compute_with_graph is not None:
        return (*compute_with_graph(ctx, saved, grad_loss), *rest)
    with torch.no_grad():
        computed = compute(ctx, saved, grad_loss, False)
    depends_on = (grad_loss, *(x for x in saved[:differentiable] if x is not None))
    return (*(None if g is None else NoSecondDerivative.apply(g, *depends_on) for g in computed), *rest)


def row_weight_gradient(grad_loss: Tensor, saved_rows: Tensor, factors: Tensor) -> Tensor:
    # (m ce - correction * token weight) / denominator. The correction is 0 if row weights are not in the denominator.
    rows, by = SavedRows.of(saved_rows), Factors.of(factors)
    modulated = torch.where(rows.modulation == 0, 0.0, rows.modulation * rows.ce)
    return grad_loss * (modulated - rows.token_weight * by.correction) * by.weighted


def divided_by_mean(grad_loss: Tensor, factors: Tensor) -> Tensor:
    """The upstream gradient for a gradient that was computed before the mean of a modulation was known."""
    return grad_loss / Factors.of(factors).modulation


def _as_rows(logits: Tensor) -> Tensor:
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _overlap(rows: Tensor) -> bool:
    return rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]


# The row weights are an input of their own, beside `inputs`: a Function computes no gradient for members of a tuple.
# Options are packed: the compiler of PyTorch 2.10 rebuilds a dataclass that is passed to a Function, from values that
# are not numbers yet.
#
# torch.autograd.Function instead of torch.library.register_autograd, and no output that was not requested: with tiny
# inputs a step then takes a third of the time.
class Loss(torch.autograd.Function):
    """loss_forward of logits [..., V] and its gradient, by loss_backward or, with `inplace_backward`, over the logits.

    Returns the loss, and with `stats` also the saved rows and predictions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        row_weight: Tensor | None,
        inputs: LossInputs,
        class_weight: Tensor | None,
        options: list[float],
        stats: bool,
        inplace_backward: bool,
        shard: VocabularyShard,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        loss, saved_rows, factors, predicted = loss_forward(_as_rows(logits), inputs, options, stats, shard)
        ctx.set_materialize_grads(False)
        saved = (logits, row_weight, inputs.targets, inputs.logit_offset, saved_rows, factors, class_weight)
        ctx.save_for_backward(*saved)
        ctx.options = options
        ctx.shard = shard
        ctx.inplace_backward = inplace_backward
        ctx.is_normalized = inputs.normalizer is not None
        if not stats:
            return loss
        ctx.mark_non_differentiable(saved_rows, predicted)
        return loss, saved_rows, predicted

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return gradients_of(ctx, 2, grad_loss, _loss_gradients, None if ctx.shard.group else _loss_gradients_with_graph)


def _loss_gradients_with_graph(
    ctx: Any, saved: tuple[Tensor, ...], grad_loss: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    logits, row_weight, targets, logit_offset, saved_rows, factors, class_weight, *_ = saved
    rows, by = SavedRows.of(saved_rows), Factors.of(factors)
    # The weight of a target out of range, which is possible on CUDA, is NaN.
    vocab_size, options = logits.shape[-1], LossOptions.unpacked(ctx.options)
    out_of_range = (targets != options.ignore_index) & ((targets < 0) | (targets >= vocab_size))
    loss = defined_loss(
        logits,
        torch.where(out_of_range, 0, targets),
        rows.token_weight.view(targets.shape),
        None if row_weight is None else row_weight.view(targets.shape),
        logit_offset,
        1 / by.rows if ctx.is_normalized else None,
        options,
        class_weight,
    ).loss
    leaves = [leaf for leaf, needed in zip((logits, row_weight), ctx.needs_input_grad, strict=False) if needed]
    gradients = iter(torch.autograd.grad(loss, leaves, grad_loss.reshape(loss.shape), create_graph=True))
    of_logits, of_row_weight = ctx.needs_input_grad[:2]
    return next(gradients) if of_logits else None, next(gradients) if of_row_weight else None


def _loss_gradients(
    ctx: Any, saved: tuple[Tensor, ...], grad_loss: Tensor, once: bool
) -> tuple[Tensor | None, Tensor | None]:
    logits, row_weight, targets, logit_offset, saved_rows, factors, class_weight = saved
    of_logits, of_row_weight = ctx.needs_input_grad[:2]
    grad_row_weight = row_weight_gradient(grad_loss, saved_rows, factors) if of_row_weight else None
    if not of_logits:
        return None, grad_row_weight
    rows_of_logits = _as_rows(logits)
    class_weight = ctx.shard.columns_of(class_weight)
    given = (grad_loss, rows_of_logits, targets, saved_rows, factors, class_weight, row_weight, logit_offset)
    how = (ctx.options, ctx.shard.first_id, ctx.shard.vocab_size)
    if ctx.inplace_backward and once and not _overlap(rows_of_logits):
        ops.compiled.loss_backward_(*given, *how)
        # Another Function that saved the logits then raises, since they are overwritten.
        torch.autograd.graph.increment_version(rows_of_logits)
        grad_logits = rows_of_logits.detach()
    else:
        grad_logits = ops.compiled.loss_backward(*given, *how)
    return grad_logits if logits.dim() == 2 else grad_logits.view(logits.shape), grad_row_weight


class LossAndGradient(torch.autograd.Function):
    """loss_and_gradient of logits [..., V] with a scalar reduction: forward also computes the gradient.

    That gradient is for the upstream gradient in `last`, or for 1. Backward returns it if the upstream gradient is the
    same, which the device checks. Otherwise backward computes it from the logits, with the same bits. Returns the same
    as Loss.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        row_weight: Tensor | None,
        inputs: LossInputs,
        class_weight: Tensor | None,
        options: list[float],
        stats: bool,
        last: LastUpstream | None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        expected = None if last is None else last.on(logits.device, ops.accumulator_dtype(logits.dtype))
        loss, saved_rows, factors, predicted, gradient = ops.compiled.loss_and_gradient(
            _as_rows(logits), *inputs, expected, options, stats
        )
        if last is not None:
            last.wait(gradient)
        ctx.set_materialize_grads(False)
        saved = (logits, row_weight, inputs.targets, inputs.logit_offset, saved_rows, factors, class_weight)
        # Saved for backward, so that a checkpoint does not keep it.
        ctx.save_for_backward(*saved, gradient)
        ctx.options = options
        ctx.expected = expected
        ctx.is_normalized = inputs.normalizer is not None
        ctx.is_unused = True
        if not stats:
            return loss
        ctx.mark_non_differentiable(saved_rows, predicted)
        return loss, saved_rows, predicted

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return gradients_of(ctx, 2, grad_loss, _gradients_at_once, _loss_gradients_with_graph)


def _gradients_at_once(
    ctx: Any, saved: tuple[Tensor, ...], grad_loss: Tensor, once: bool
) -> tuple[Tensor | None, Tensor | None]:
    logits, row_weight, targets, logit_offset, saved_rows, factors, class_weight, gradient = saved
    of_logits, of_row_weight = ctx.needs_input_grad[:2]
    grad_row_weight = row_weight_gradient(grad_loss, saved_rows, factors) if of_row_weight else None
    if not of_logits:
        return None, grad_row_weight
    rows = _as_rows(logits)
    given = (grad_loss, rows, targets, saved_rows, factors, class_weight, row_weight, logit_offset)
    # PyTorch batches no op that writes to its inputs.
    if ctx.is_unused and not is_batch_of_gradients(grad_loss):
        ctx.is_unused = False
        ops.compiled.correct_gradient_(gradient, ctx.expected, *given, ctx.options)
        # The caller may write to it, also if the graph is retained. It is not read here again, so its saved version
        # must not change.
        grad_logits = gradient.data
    else:
        grad_logits = ops.compiled.loss_backward(*given, ctx.options, 0, rows.shape[1])
    return grad_logits if logits.dim() == 2 else grad_logits.view(logits.shape), grad_row_weight


class LossOverLogits(torch.autograd.Function):
    """loss_and_gradient_ of a scalar reduction: forward writes the gradient over the logits.

    If the logits had to be copied, it is written over the copy. It is for an upstream gradient of 1; backward
    multiplies it by the actual one, which is read on the device.

    `unnormalized`: the options without the division by a mean, which backward does in that case; or None.
    Returns the same as Loss.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        row_weight: Tensor | None,
        inputs: LossInputs,
        options: list[float],
        unnormalized: list[float] | None,
        stats: bool,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        rows_of_logits = _as_rows(logits)
        gradient = rows_of_logits.new_empty(logits.shape) if _overlap(rows_of_logits) else rows_of_logits
        loss, saved_rows, factors, predicted = ops.compiled.loss_and_gradient_(
            rows_of_logits, _as_rows(gradient), *inputs, unnormalized or options, stats
        )
        if unnormalized is not None:
            given = (inputs.targets.view(-1), inputs.row_weight, inputs.normalizer)
            loss, factors = ops.compiled.reduce_rows(saved_rows, *given, options)
        ctx.is_divided_late = unnormalized is not None
        overwritten = gradient.data_ptr() == logits.data_ptr()
        if overwritten:
            torch.autograd.graph.increment_version(logits)
        ctx.set_materialize_grads(False)
        ctx.shape = logits.shape
        # Saved for backward: PyTorch then refuses a second backward, and one after the gradient was written to.
        ctx.save_for_backward(logits if overwritten else gradient, row_weight, saved_rows, factors)
        if not stats:
            return loss
        ctx.mark_non_differentiable(saved_rows, predicted)
        return loss, saved_rows, predicted

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return gradients_of(ctx, 2, grad_loss, _scaled_gradients)


def scaled_copy(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor. Not rounded in between: the factor of a bfloat16 gradient would be bfloat16."""
    return (gradient.to(factor.dtype) * factor).to(gradient.dtype)


def _scaled_gradients(
    ctx: Any, saved: tuple[Tensor, ...], grad_loss: Tensor, once: bool
) -> tuple[Tensor | None, Tensor | None]:
    gradient, _row_weight, saved_rows, factors = saved
    _of_logits, of_row_weight = ctx.needs_input_grad[:2]
    grad_row_weight = row_weight_gradient(grad_loss, saved_rows, factors) if of_row_weight else None
    factor = divided_by_mean(grad_loss, factors) if ctx.is_divided_late else grad_loss
    if is_batch_of_gradients(factor):
        return scaled_copy(gradient.detach(), factor).view(ctx.shape), grad_row_weight
    ops.compiled.scale_(_as_rows(gradient), factor)
    torch.autograd.graph.increment_version(gradient)
    return gradient.detach().view(ctx.shape), grad_row_weight


def _saved_tensors_have_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def weighted_loss(
    logits: Tensor,
    inputs: LossInputs,
    options: LossOptions,
    stats: bool,
    inplace_backward: bool,
    shard: VocabularyShard,
    at_once: bool = False,
    last: LastUpstream | None = None,
) -> Results:
    """The loss of logits [..., V], with its gradient if needed, and with `stats` saved rows and predictions.

    at_once: a backward is likely, for the upstream gradient of `last`, or for 1. While a gradient of `last` waits, the
    gradients of further losses are left to backward. Otherwise each of several losses at once would hold one.
    Under hooks of saved tensors none is left: a checkpoint has to save as many tensors when it runs again.
    """
    row_weight = inputs.row_weight
    if not torch.is_grad_enabled() or not (
        logits.requires_grad or (row_weight is not None and row_weight.requires_grad)
    ):
        loss, saved_rows, _factors, predicted = loss_forward(_as_rows(logits), inputs, options.packed, stats, shard)
        return (loss, saved_rows, predicted) if stats else (loss, None, None)
    # In forward a vector of upstream gradients is unknown; of float16's loss scale only the last value is known.
    is_known = options.reduction != "none" and logits.requires_grad and not shard.group
    is_scaled = logits.dtype == torch.float16
    unnormalized = options.unnormalized
    class_weight = inputs.token_weight if options.smooths_by_class else None
    if inplace_backward and is_known and not is_scaled:
        # The mean does not divide the z-loss: with a z-loss it has to be computed first.
        late = unnormalized is not options and options.z_loss == 0
        how = (options.packed, unnormalized.packed if late else None, stats)
        result = LossOverLogits.apply(logits, row_weight, inputs, *how)
    elif (
        at_once
        and is_known
        and unnormalized is options
        and not inplace_backward
        and not (is_scaled if last is None else last.is_waiting and not _saved_tensors_have_hooks())
    ):
        result = LossAndGradient.apply(logits, row_weight, inputs, class_weight, options.packed, stats, last)
    else:
        result = Loss.apply(logits, row_weight, inputs, class_weight, options.packed, stats, inplace_backward, shard)
    return result if stats else (result, None, None)
