"""What a loss is told beside its logits or hidden states, and the errors for what it cannot take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pdl_ext import _ops
from pdl_ext._checks import (
    MAX,
    check_choice,
    check_dense,
    check_flag,
    check_ignore_index,
    check_number,
    names_of,
    refuse_transforms,
)

__all__ = [
    "LOGITS_DTYPES",
    "TARGET_DTYPES",
    "LossOptions",
    "bad_target",
    "check_linear_inputs",
    "check_loss_inputs",
    "check_table",
]

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TARGET_DTYPES = (torch.int64, torch.int32)


class LossOptions(NamedTuple):
    """What a loss is told beside its tensors; see pdl_loss."""

    reduction: str
    ignore_index: int
    shift: bool
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float

    @classmethod
    def checked(
        cls,
        reduction: str,
        ignore_index: int,
        shift: bool,
        label_smoothing: float,
        z_loss: float,
        softcap: float | None,
        logit_scale: float,
    ) -> LossOptions:
        """Raises TypeError or ValueError that names the first option of a wrong type or outside its range."""
        check_choice("reduction", reduction, _ops.REDUCTIONS)
        ignore_index = check_ignore_index(ignore_index)
        check_flag("shift", shift)
        label_smoothing = check_number("label_smoothing", label_smoothing, 0, 1, "a number in [0, 1]")
        z_loss = check_number("z_loss", z_loss, 0, MAX, "a finite number >= 0")
        if softcap is not None:
            softcap = check_number("softcap", softcap, 0, MAX, "None or a finite number > 0", open_low=True)
        logit_scale = check_number("logit_scale", logit_scale, -MAX, MAX, "a finite number other than 0")
        if logit_scale == 0:
            raise ValueError(f"logit_scale: got {logit_scale!r}, expected a finite number other than 0")
        return cls(reduction, ignore_index, shift, label_smoothing, z_loss, softcap, logit_scale)

    def of_op(self) -> tuple[int, int, float, float, float, float]:
        """The options as the compiled ops take them."""
        softcap = 0.0 if self.softcap is None else self.softcap
        reduction = _ops.REDUCTIONS[self.reduction]
        return reduction, self.ignore_index, self.label_smoothing, self.z_loss, self.logit_scale, softcap


def check_loss_inputs(
    logits: Tensor,
    targets: Tensor,
    row_weight: Tensor | None,
    normalizer: float | Tensor | None,
    options: LossOptions,
) -> None:
    """Raises TypeError or ValueError that names the first input that the loss of logits cannot take."""
    _check_scores("logits", logits)
    _check_targets_dtype(targets)
    if logits.dim() == 0 or not 1 <= logits.shape[-1] <= 2**30:
        raise ValueError(f"logits: got shape {list(logits.shape)}, expected [..., V] with V >= 1 and at most 2^30")
    if logits.shape[:-1] != targets.shape:
        raise _targets_do_not_fit("logits", logits, targets, "the vocabulary")
    _check_rest("the logits are", logits, targets, row_weight, normalizer, options)


def check_linear_inputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor | None,
    normalizer: float | Tensor | None,
    options: LossOptions,
) -> None:
    """Raises TypeError or ValueError that names the first input that the linear loss cannot take."""
    _check_scores("hidden", hidden)
    _check_scores("weight", weight)
    _check_targets_dtype(targets)
    if weight.dim() != 2 or not 1 <= weight.shape[0] <= 2**30 or weight.shape[1] == 0:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [V, H] with H >= 1 and 1 <= V <= 2^30")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden: got shape {list(hidden.shape)}, expected [..., {weight.shape[1]}]: weight is {list(weight.shape)}"
        )
    if hidden.shape[:-1] != targets.shape:
        raise _targets_do_not_fit("hidden", hidden, targets, "the hidden size")
    if bias is not None:
        _check_scores("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: got shape {list(bias.shape)}, expected [{weight.shape[0]}], the classifier's rows")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {hidden.device}, where hidden is")
        # Which casts no float64.
        cast = torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (tensor.dtype, hidden.dtype)
        if tensor.dtype != hidden.dtype and not cast:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {hidden.dtype}, that of hidden")
    _check_rest("hidden is", hidden, targets, row_weight, normalizer, options)
    _refuse_tangents(weight, bias)
    refuse_transforms(weight, bias)


def _check_scores(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
    if type(tensor) is not Tensor and hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name}: got a DTensor, expected a plain tensor. With FSDP2 call the loss in the model's forward, where "
            "the classifier is gathered. Of one that is a fully_shard unit of its own give lm_head.weight after "
            'lm_head.unshard(), or full_tensor(grad_placements=[Partial("avg")]), since the gradient of a mere '
            "full_tensor() is wrong. With tensor parallelism give to_local() of what is cut over the vocabulary, and "
            "its process_group"
        )
    check_dense(name, tensor)
    if tensor.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected one of {names_of(LOGITS_DTYPES)}")


def _check_targets_dtype(targets: Tensor) -> None:
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: got {type(targets).__name__}, expected a tensor")
    check_dense("targets", targets)
    if targets.dtype not in TARGET_DTYPES:
        raise TypeError(f"targets: got dtype {targets.dtype}, expected one of {names_of(TARGET_DTYPES)}")


def _targets_do_not_fit(name: str, scores: Tensor, targets: Tensor, last: str) -> ValueError:
    return ValueError(
        f"targets: got shape {list(targets.shape)}, expected {list(scores.shape[:-1])}: that of {name} "
        f"{list(scores.shape)} without {last}"
    )


def _check_rest(
    there: str,
    scores: Tensor,
    targets: Tensor,
    row_weight: Tensor | None,
    normalizer: float | Tensor | None,
    options: LossOptions,
) -> None:
    if scores.device != targets.device:
        raise ValueError(f"targets: got device {targets.device}, expected {scores.device}, where {there}")
    if options.shift and targets.dim() == 0:
        raise ValueError("shift: got True with targets of shape [], expected a sequence dimension")
    if row_weight is not None:
        _check_row_weight(row_weight, targets)
    _refuse_tangents(scores, row_weight)
    refuse_transforms(scores, targets, row_weight, normalizer if isinstance(normalizer, Tensor) else None)
    if normalizer is not None:
        _check_normalizer(normalizer, targets, options.reduction)


def _refuse_tangents(*tensors: Tensor | None) -> None:
    # PyTorch would drop the tangent of an op without a forward-mode formula, and return a derivative of zero.
    if getattr(forward_ad, "_current_level", -1) >= 0:
        for tensor in tensors:
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(
                    "pdl_ext: the fused loss has no forward-mode derivative; pdl_ext.reference.pdl_loss has one"
                )


def check_table(name: str, table: Tensor | None, vocab_size: int, device: torch.device) -> None:
    """Raises TypeError or ValueError unless table is None or a float32 [V] that takes no gradient."""
    if table is None:
        return
    if not isinstance(table, Tensor):
        raise TypeError(f"{name}: got {type(table).__name__}, expected a tensor or None")
    check_dense(name, table)
    refuse_transforms(table)
    if table.dtype != torch.float32:
        raise TypeError(f"{name}: got dtype {table.dtype}, expected float32 whatever the logits' dtype is")
    if table.shape != (vocab_size,):
        raise ValueError(f"{name}: got shape {list(table.shape)}, expected [{vocab_size}], the logits' vocabulary")
    if table.device != device:
        raise ValueError(f"{name}: got device {table.device}, expected {device}, where the logits are")
    if table.requires_grad:
        raise ValueError(
            f"{name}: got a tensor that requires grad, expected one that does not: only row_weight takes one"
        )


def bad_target(targets: Tensor, vocab_size: int, ignore_index: int, shift: bool) -> IndexError:
    """The error for the first target out of range, by its place in the targets that the caller passed."""
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))
    if shift:
        bad[..., 0] = False
    place = tuple(bad.nonzero()[0].tolist())
    return IndexError(
        f"targets: got {int(targets[place])} at position {list(place)}, expected 0 <= id < {vocab_size} "
        f"or ignore_index ({ignore_index})"
    )


def _check_row_weight(row_weight: Tensor, targets: Tensor) -> None:
    if not isinstance(row_weight, Tensor):
        raise TypeError(f"row_weight: got {type(row_weight).__name__}, expected a tensor or None")
    check_dense("row_weight", row_weight)
    if not row_weight.is_floating_point():
        raise TypeError(f"row_weight: got dtype {row_weight.dtype}, expected a floating one")
    if row_weight.shape != targets.shape:
        raise ValueError(
            f"row_weight: got shape {list(row_weight.shape)}, expected that of targets, {list(targets.shape)}"
        )
    if row_weight.device != targets.device:
        raise ValueError(
            f"row_weight: got device {row_weight.device}, expected {targets.device}, where the targets are"
        )


def _check_normalizer(normalizer: float | Tensor, targets: Tensor, reduction: str) -> None:
    if reduction in ("none", "sum"):
        raise ValueError(f'normalizer: got one with reduction={reduction!r}, expected reduction "mean" or "token_mean"')
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0 or normalizer.device != targets.device or normalizer.requires_grad:
            raise ValueError(
                f"normalizer: got shape {list(normalizer.shape)} on {normalizer.device}"
                f"{', requiring grad' if normalizer.requires_grad else ''}, expected a 0-d tensor on {targets.device} "
                "that does not require grad"
            )
    elif not isinstance(normalizer, (torch.SymInt, torch.SymFloat)):
        check_number("normalizer", normalizer, 0, MAX, "a finite number >= 0 or a 0-d tensor")
