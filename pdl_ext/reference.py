"""The definitions in plain PyTorch: what every kernel is tested against.

Slow, and differentiable as often as PyTorch is. In float64 these are the yardstick.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from pdl_ext.functional import RowStats
from pdl_ext.modulation import AntiFocal, Focal, Modulation
from pdl_ext.options import DEFAULTS, LossKeywords, check_keywords, spells_out_options
from pdl_ext.weighting import Adaptive, ClassBalanced, Face, PowerLaw, Uniform, Weighting

__all__ = ["count_tokens", "linear_pdl_loss", "pdl_loss", "token_weights"]


def _modulation(nll: Tensor, modulation: Modulation) -> Tensor:
    p = torch.exp(-nll)
    if isinstance(modulation, Focal):
        q = -torch.expm1(-nll.clamp(min=0))
        q = q.detach() if modulation.detach else q
        if modulation.gamma in (0, 1):
            return q**modulation.gamma
        # Of 0 the derivative may be infinite, and counts as 0.
        return torch.where(q == 0, 0.0, torch.where(q == 0, 1.0, q) ** modulation.gamma)
    if isinstance(modulation, AntiFocal):
        return (1 + modulation.scale * p.detach()) ** modulation.gamma
    return p.detach()


@spells_out_options
def pdl_loss(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    logit_offset: Tensor | None = None,
    return_stats: bool = False,
    **options: Unpack[LossKeywords],
) -> Tensor | tuple[Tensor, RowStats]:
    """The loss of `functional.pdl_loss`, with the same arguments and result, by its definition; no input is checked."""
    check_keywords("pdl_loss", options)
    asked = SimpleNamespace(**{**DEFAULTS, **options})
    if asked.shift:
        options["shift"] = False
        row_weight = None if row_weight is None else row_weight[..., 1:]
        loss_of_rows = pdl_loss(
            logits[..., :-1, :],
            targets[..., 1:],
            token_weight,
            row_weight=row_weight,
            normalizer=normalizer,
            logit_offset=logit_offset,
            return_stats=True,
            **options,
        )
        loss, stats = loss_of_rows
        if asked.reduction == "none":
            loss = F.pad(loss, (1, 0))
        nll, weight, lse, predicted = stats
        shifted = (F.pad(nll, (1, 0)), F.pad(weight, (1, 0)), F.pad(lse, (1, 0)), F.pad(predicted, (1, 0), value=-1))
        return (loss, RowStats(*shifted)) if return_stats else loss

    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    vocab_size = logits.shape[-1]
    z = asked.logit_scale * logits.to(dtype)
    if asked.softcap is not None:
        z = asked.softcap * torch.tanh(z / asked.softcap)
    if logit_offset is not None:
        z = z + logit_offset.to(dtype)

    counted = targets != asked.ignore_index
    safe = torch.where(counted, targets, 0).long()
    lse = torch.logsumexp(z, -1)
    nll = lse - z.gather(-1, safe.unsqueeze(-1)).squeeze(-1)
    ce = nll
    if asked.label_smoothing:
        uniform = (lse.unsqueeze(-1) - z).sum(-1) / vocab_size
        ce = (1 - asked.label_smoothing) * nll + asked.label_smoothing * uniform
    weight = torch.ones_like(nll) if token_weight is None else token_weight.to(dtype)[safe]
    if row_weight is not None:
        weight = weight * row_weight.to(dtype)

    zero = torch.zeros((), dtype=dtype, device=logits.device)
    weight = torch.where(counted, weight, zero)
    if asked.modulation is not None:
        m = _modulation(nll, asked.modulation)
        ce = m * torch.where((m == 0) & ce.isinf(), zero, ce)
    weighted = torch.where(counted, weight * torch.where(counted, ce, zero), zero)
    z_term = asked.z_loss * torch.where(counted, lse, zero) ** 2 if asked.z_loss else torch.zeros_like(weighted)
    rows = counted.sum().to(dtype)
    if asked.reduction == "none":
        loss = weighted + z_term
    else:
        one = torch.ones_like(rows)
        if asked.reduction == "sum":
            divisor, z_divisor = one, one
        elif normalizer is not None:
            divisor = z_divisor = torch.as_tensor(normalizer, dtype=dtype, device=logits.device)
        else:
            divisor, z_divisor = (weight.sum() if asked.reduction == "mean" else rows), rows
        loss = weighted.sum() / torch.where(divisor == 0, torch.inf, divisor)
        loss = loss + z_term.sum() / torch.where(z_divisor == 0, torch.inf, z_divisor)
    if not return_stats:
        return loss
    ignored_as = {name: torch.where(counted, value, zero).detach() for name, value in (("nll", nll), ("lse", lse))}
    predicted = torch.where(counted, z.argmax(-1), -1)
    return loss, RowStats(ignored_as["nll"], weight.detach(), ignored_as["lse"], predicted)


def linear_pdl_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, RowStats]:
    """The loss of `functional.linear_pdl_loss`: pdl_loss of the logits, with its options."""
    return pdl_loss(F.linear(hidden, weight, bias), targets, token_weight, **options)


def token_weights(counts: Tensor, weighting: Weighting) -> Tensor:
    """The weights of `functional.token_weights` by their definition: float64 [V] from int64 [V] counts."""
    n = counts.double()
    # As logarithms, since a power may be beyond float64 where its quotient by the mean is not.
    log_weight = _log_weight(n, weighting)
    if weighting.max_weight is not None:
        log_weight = log_weight.clamp(max=math.log(weighting.max_weight))
    free = torch.ones(counts.shape, dtype=torch.bool, device=counts.device)
    for token in weighting.fixed:
        free[token] = False
    if weighting.normalize != "none":
        share = n if weighting.normalize == "corpus" and n.sum() > 0 else torch.ones_like(n)
        share = share * free
        log_mean = torch.logsumexp(log_weight + share.log(), 0) - share.sum().log()
        if share.sum() > 0 and log_mean > -torch.inf:
            log_weight = log_weight - log_mean
    weight = log_weight.exp()
    # Before they are mixed: 0 * inf would be NaN.
    weight = weight.clamp(max=torch.finfo(torch.float64).max)
    weight = (1 - weighting.blend) + weighting.blend * weight
    weight = weight.clamp(max=torch.finfo(torch.float32).max)
    for token, fixed in weighting.fixed.items():
        weight[token] = fixed
    return weight


def _log_weight(n: Tensor, weighting: Weighting) -> Tensor:
    if isinstance(weighting, PowerLaw):
        frequency = n + weighting.smoothing
        if weighting.relative:
            denominator = frequency.sum()
            frequency = frequency / (denominator if denominator > 0 else 1.0)
        return -weighting.alpha * (frequency + weighting.epsilon).log() if weighting.alpha else torch.zeros_like(n)
    if isinstance(weighting, Adaptive):
        ordered = sorted((count for count in n.tolist() if count > 0), reverse=True)
        if not ordered:
            return torch.zeros_like(n)
        x = n / ordered[len(ordered) // 2]
        g = (-weighting.T * x).exp() * (1.0 if weighting.form == "exp" else x**2)
        return ((g / g[n > 0].max()).clamp(max=1.0) * (math.e - 1) + 1).log()
    if isinstance(weighting, ClassBalanced):
        return ((1 - weighting.beta) / (1 - weighting.beta ** n.clamp(min=1))).log()
    if isinstance(weighting, Face):
        return (1 - n / n.max()).log() if n.any() else torch.zeros_like(n)
    if isinstance(weighting, Uniform):
        return torch.zeros_like(n)
    return weighting.raw(n.long()).log()


def count_tokens(tokens: Tensor, vocab_size: int, *, ignore_index: int = -100) -> Tensor:
    """The counts of `functional.count_tokens` by `torch.bincount`: int64 [vocab_size]."""
    ids = tokens.reshape(-1).to(torch.int64)
    kept = ids[(ids >= 0) & (ids < vocab_size) & (ids != ignore_index)]
    return torch.bincount(kept, minlength=vocab_size)
