"""The loss by its definition in plain PyTorch: slow, and differentiable as often and in either mode as PyTorch is.

`pdl_ext.reference` is this with the arguments of `functional`. The fused loss uses it for second derivatives and for
forward mode.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pdl_ext.modulation import Modulation
from pdl_ext.options import LossOptions

__all__ = ["Defined", "defined_loss", "entropy_of"]


class Defined(NamedTuple):
    """A loss, its rows, shaped like the targets, and the transformed logits z; only `weight` is 0 at ignored rows."""

    loss: Tensor
    nll: Tensor
    weight: Tensor
    lse: Tensor
    z: Tensor


def defined_loss(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    row_weight: Tensor | None,
    logit_offset: Tensor | None,
    normalizer: Tensor | None,
    options: LossOptions,
    class_weight: Tensor | None,
) -> Defined:
    """The loss of logits [..., V] and targets [...].

    token_weight: [...], the weight of each row's target. normalizer: the denominator of both terms with "mean" and
    "token_mean". class_weight: [V], for label smoothing by class.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    counted = targets != options.ignore_index
    # With a number that is not finite in an ignored row the gradient would be NaN.
    z = options.logit_scale * torch.where(counted.unsqueeze(-1), logits, 0.0).to(dtype)
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    if logit_offset is not None:
        z = z + logit_offset.to(dtype)

    safe = torch.where(counted, targets, 0).long()
    lse = torch.logsumexp(z, -1)
    nll = lse - z.gather(-1, safe.unsqueeze(-1)).squeeze(-1)
    zero = torch.zeros((), dtype=dtype, device=logits.device)
    one = torch.ones_like(nll)
    weight = one if token_weight is None else token_weight.to(dtype)
    of_row = one if row_weight is None else row_weight.to(dtype)
    ce, of_ce = nll, weight * of_row
    if options.label_smoothing:
        of_classes = lse.unsqueeze(-1) - z
        if class_weight is not None:
            of_classes = torch.where(class_weight == 0, zero, class_weight.to(dtype) * of_classes)
        smoothed = of_classes.sum(-1) / z.shape[-1]
        if options.label_smoothing_weight != "target":
            ce, of_ce = weight * nll, of_row
        ce = (1 - options.label_smoothing) * ce + options.label_smoothing * smoothed
    if options.modulation is not None:
        m = _factor(nll, lse, z, counted, options.modulation)
        ce = m * torch.where((m == 0) & ce.isinf(), zero, ce)

    weight = torch.where(counted, weight * of_row, zero)
    weighted = torch.where(counted, of_ce * torch.where(counted, ce, zero), zero)
    z_term = options.z_loss * torch.where(counted, lse, zero) ** 2 if options.z_loss else torch.zeros_like(weighted)
    if options.reduction == "none":
        loss = weighted + z_term
    else:
        rows = counted.sum().to(dtype)
        if options.reduction == "sum":
            divisor = z_divisor = torch.ones_like(rows)
        elif normalizer is not None:
            divisor = z_divisor = normalizer.to(dtype)
        else:
            divisor, z_divisor = (weight.sum() if options.reduction == "mean" else rows), rows
        loss = weighted.sum() / torch.where(divisor == 0, torch.inf, divisor)
        loss = loss + z_term.sum() / torch.where(z_divisor == 0, torch.inf, z_divisor)
    return Defined(loss, nll, weight, lse, z)


def entropy_of(z: Tensor, lse: Tensor) -> Tensor:
    """The entropy of softmax(z) in nats, [...]; it gets no gradient."""
    log_p = (z - lse.unsqueeze(-1)).detach()
    p = log_p.exp()
    return -torch.where(p == 0, 0.0, p * log_p).sum(-1)


def _factor(nll: Tensor, lse: Tensor, z: Tensor, counted: Tensor, modulation: Modulation) -> Tensor:
    # The entropy is computed only for a modulation that uses it.
    entropy = entropy_of(z, lse) if modulation.of_entropy else torch.zeros_like(nll)
    m = modulation.factor(nll, entropy, z.shape[-1])
    if not modulation.is_normalized:
        return m
    rows = counted.sum()
    mean = torch.where(counted, m, 0.0).sum() / rows
    return m / torch.where(rows == 0, 1.0, mean)
