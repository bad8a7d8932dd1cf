"""The arms of the comparison: losses to train with, and ways to decode without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pdl_ext
from pdl_ext import modulation, weighting
from pdl_ext.functional import token_weights
from pdl_ext.weighting import PowerLaw, Weighting

CE, PDL, SHUFFLED, ZERO_SHOT = "ce", "pdl-0.5", "shuffled-0.5", "zero-shot"
PRIMARY_SEEDS, OTHER_SEEDS = range(5), range(3)


@dataclass(frozen=True, repr=False)
class Shuffled(Weighting):
    """The power law's weights without information on frequency: each type has the weight of a random token.

    A permutation of the types would not work: most types are rare, so nearly all tokens would have the same weight.
    With the weight of a random token, the weights of tokens are distributed as the power law's are. Tables differ in
    the weights of the frequent types. Of `DRAWS` tables the one with the nearest effective share of tokens is used.
    """

    DRAWS = 200

    alpha: float = 0.5
    seed: int = 0

    def raw(self, counts: Tensor) -> Tensor:
        weights = token_weights(counts, PowerLaw(alpha=self.alpha)).double().cpu()
        share = counts.double().cpu() / counts.sum().cpu()
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.multinomial(share, self.DRAWS * len(counts), replacement=True, generator=generator)
        tables = weights[drawn].view(self.DRAWS, -1)
        distance = (effective_share(tables, share) - effective_share(weights, share)).abs()
        return tables[distance.argmin()].to(counts.device)


def effective_share(weights: Tensor, share: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2) over tokens: the share of them that, equally weighted, has the same variance.

    weights [..., V]; share [V], the share of the tokens that each type has.
    """
    return (weights * share).sum(-1) ** 2 / (weights**2 * share).sum(-1)


@dataclass(frozen=True)
class Arm:
    """A loss, made from the counts of the training targets and the seed. It uses the learning rate of arm `rate_of`."""

    name: str
    title: str
    loss: Callable[[pdl_ext.TokenFrequency, int], pdl_ext.PDLLoss] | None
    rate_of: str = PDL
    seeds: Sequence[int] = OTHER_SEEDS


def _pdl(alpha: float) -> Callable[[pdl_ext.TokenFrequency, int], pdl_ext.PDLLoss]:
    return lambda frequency, seed: pdl_ext.PDLLoss(frequency, alpha=alpha)


def _of(**options: Any) -> Callable[[pdl_ext.TokenFrequency, int], pdl_ext.PDLLoss]:
    return lambda frequency, seed: pdl_ext.PDLLoss(frequency, **options)


ARMS = {
    arm.name: arm
    for arm in (
        Arm(ZERO_SHOT, "not finetuned", None, seeds=(0,)),
        Arm(CE, "cross-entropy", _of(weighting=weighting.Uniform()), rate_of=CE, seeds=PRIMARY_SEEDS),
        Arm(PDL, "PDL, alpha 0.5", _pdl(0.5), seeds=PRIMARY_SEEDS),
        Arm(
            SHUFFLED,
            "PDL's weights shuffled over types",
            lambda frequency, seed: pdl_ext.PDLLoss(frequency, weighting=Shuffled(alpha=0.5, seed=seed)),
            seeds=PRIMARY_SEEDS,
        ),
        Arm("pdl-0.25", "PDL, alpha 0.25", _pdl(0.25)),
        Arm("pdl-1", "PDL, alpha 1", _pdl(1.0)),
        Arm("adaptive-exp", "Adaptive, exponential", _of(weighting=weighting.Adaptive("exp"))),
        Arm("mile", "MiLe", _of(weighting=weighting.Uniform(), modulation=modulation.MiLe())),
        Arm("dft", "DFT", _of(weighting=weighting.Uniform(), modulation=modulation.DFT())),
    )
}


@dataclass(frozen=True)
class Decoding:
    """How texts are generated: greedily, from logits with `offset` times -log f added, or by sampling."""

    name: str
    offset: float = 0.0
    temperature: float = 0.0


def _offset(tau: float) -> Decoding:
    return Decoding(f"offset{tau:+g}", offset=tau)


GREEDY = Decoding("greedy")
_TEMPERATURES = tuple(Decoding(f"temperature{value:g}", temperature=value) for value in (0.2, 0.4, 0.6, 0.8, 1.0))
# Both curves have the same sums of trained and added exponent, 0 to 1.
CURVES = {
    CE: (*map(_offset, (0.125, 0.25, 0.5, 0.75, 1.0)), *_TEMPERATURES),
    PDL: (*map(_offset, (-0.5, -0.25, 0.125, 0.25, 0.5)), *_TEMPERATURES),
}
DECODINGS = {decoding.name: decoding for decoding in (GREEDY, *CURVES[CE], *CURVES[PDL])}
