"""The definitions in plain PyTorch, against which every kernel is tested.

They are slow, and differentiable as often as PyTorch is. In float64 they are the standard of accuracy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from pdl_ext.engine.definition import defined_loss, entropy_of
from pdl_ext.functional import RowStats
from pdl_ext.options import LossKeywords, LossOptions, spells_out_options
from pdl_ext.weighting import Adaptive, ClassBalanced, Face, PowerLaw, Uniform, Weighting

__all__ = ["count_tokens", "linear_pdl_loss", "pdl_loss", "token_weights"]


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
    """The loss of `functional.pdl_loss` by its definition, with the same arguments and result; no tensor is checked.

    Differentiable as often as PyTorch is, and by torch.func's transforms.
    """
    asked = LossOptions.of("pdl_loss", options)
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
        shifted = RowStats(*(F.pad(value, (1, 0)) for value in stats))
        shifted = shifted._replace(predicted=F.pad(stats.predicted, (1, 0), value=-1))
        return (loss, shifted) if return_stats else loss

    counted = targets != asked.ignore_index
    class_weight = token_weight if asked.smooths_by_class else None
    if token_weight is not None:
        token_weight = token_weight[torch.where(counted, targets, 0).long()]
    if normalizer is not None:
        normalizer = torch.as_tensor(normalizer, dtype=torch.float64, device=logits.device)
    loss, nll, weight, lse, z = defined_loss(
        logits, targets, token_weight, row_weight, logit_offset, normalizer, asked, class_weight
    )
    if not return_stats:
        return loss
    zero = torch.zeros_like(nll)
    nll, lse, entropy = (torch.where(counted, value, zero).detach() for value in (nll, lse, entropy_of(z, lse)))
    return loss, RowStats(nll, weight.detach(), lse, torch.where(counted, z.argmax(-1), -1), entropy)


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
    # As logarithms: a power may exceed float64 although its quotient by the mean does not.
    log_weight = _log_weight(n, weighting)
    if weighting.max_weight is not None:
        log_weight = log_weight.clamp(max=math.log(weighting.max_weight))
    free = torch.ones(counts.shape, dtype=torch.bool, device=counts.device)
    for token in weighting.fixed:
        free[token] = False
    if weighting.normalize != "none":
        share = n if weighting.normalize == "corpus" and n.sum() > 0 else torch.ones_like(n)
        share = share * free
        log_mean = torch.logsumexp(torch.where(share > 0, log_weight, 0.0) + share.log(), 0) - share.sum().log()
        if share.sum() > 0 and log_mean > -torch.inf:
            log_weight = log_weight - log_mean
    weight = log_weight.exp()
    # Before the blend: 0 * inf would be NaN.
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
