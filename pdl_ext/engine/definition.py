"""The loss in plain PyTorch, by its definition: slow, and differentiable as often, and in either mode, as PyTorch is.

`pdl_ext.reference` is this with the arguments of `functional`; the fused loss takes it for second derivatives and for
forward mode.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pdl_ext.modulation import AntiFocal, Focal, Modulation
from pdl_ext.options import LossOptions

__all__ = ["Defined", "defined_loss"]


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
) -> Defined:
    """The loss of logits [..., V] and targets [...].

    token_weight: the weight of each row's target, [...]; normalizer: what "mean" and "token_mean" divide both terms by.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    counted = targets != options.ignore_index
    # Of what is not finite in an ignored row the gradient would be NaN.
    z = options.logit_scale * torch.where(counted.unsqueeze(-1), logits, 0.0).to(dtype)
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    if logit_offset is not None:
        z = z + logit_offset.to(dtype)

    safe = torch.where(counted, targets, 0).long()
    lse = torch.logsumexp(z, -1)
    nll = lse - z.gather(-1, safe.unsqueeze(-1)).squeeze(-1)
    ce = nll
    if options.label_smoothing:
        uniform = (lse.unsqueeze(-1) - z).sum(-1) / z.shape[-1]
        ce = (1 - options.label_smoothing) * nll + options.label_smoothing * uniform
    zero = torch.zeros((), dtype=dtype, device=logits.device)
    if options.modulation is not None:
        m = _factor(nll, options.modulation)
        ce = m * torch.where((m == 0) & ce.isinf(), zero, ce)
    weight = torch.ones_like(nll) if token_weight is None else token_weight.to(dtype)
    if row_weight is not None:
        weight = weight * row_weight.to(dtype)

    weight = torch.where(counted, weight, zero)
    weighted = torch.where(counted, weight * torch.where(counted, ce, zero), zero)
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


def _factor(nll: Tensor, modulation: Modulation) -> Tensor:
    p = torch.exp(-nll)
    if isinstance(modulation, Focal):
        # The derivative at infinity is 0, and not infinity times 0.
        masked = nll.isinf()
        q = torch.where(masked, 1.0, -torch.expm1(-torch.where(masked, 0.0, nll).clamp(min=0)))
        q = q.detach() if modulation.detach else q
        if modulation.gamma in (0, 1):
            return q**modulation.gamma
        # Of 0 the derivative may be infinite, and counts as 0.
        return torch.where(q == 0, 0.0, torch.where(q == 0, 1.0, q) ** modulation.gamma)
    if isinstance(modulation, AntiFocal):
        return (1 + modulation.scale * p.detach()) ** modulation.gamma
    return p.detach()
