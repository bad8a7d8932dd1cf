"""Weights that are a power of the frequency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pdl_ext._checks import check_choice, check_flag, check_number
from pdl_ext.counts import check_counts
from pdl_ext.engine import ops
from pdl_ext.weighting.base import check_blend, checked_fixed, fixed_table

if TYPE_CHECKING:
    from pdl_ext.frequency import TokenFrequency

__all__ = ["PowerLaw", "weights_of_counts", "weights_with_fixed"]

# Where the power of a frequency is still exact to a part in a billion, and far beyond any use.
MAX_ALPHA = 10_000.0
# Frequencies between which no quotient is beyond float64.
SMALLEST, LARGEST = 1e-100, 1e18
NORMALIZE = {"none": 0, "corpus": 1, "types": 2}  # csrc/token_weights.h's Normalize


@dataclass(frozen=True)
class PowerLaw:
    """The weight of a token as a power of its frequency: w(t) = (f(t) + epsilon) ** -alpha.

    f(t) is the smoothed relative frequency (n(t) + smoothing) / (N + smoothing * V), or n(t) + smoothing with
    `relative=False`. The weight is then limited to `max_weight`, divided by its mean (`normalize`: over the tokens of
    the corpus, over the vocabulary's "types", or "none"), and blended with 1: 1 + blend * (w - 1). `fixed` maps token
    ids to final weights; those tokens take no part in the mean. Weights that float32 cannot hold are its largest
    number, or 0.

    Raises TypeError or ValueError that names the option.
    Source: arXiv 2505.16900, the definition of w(t); smoothing and normalisation are this library's.
    """

    alpha: float = 1.0
    epsilon: float = 1e-7
    smoothing: float = 1.0
    relative: bool = True
    normalize: str = "corpus"
    max_weight: float | None = None
    blend: float = 1.0
    fixed: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._set("alpha", check_number("alpha", self.alpha, 0, MAX_ALPHA, f"a number in [0, {MAX_ALPHA:g}]"))
        for name in ("epsilon", "smoothing"):
            expected = f"0 or a number in [{SMALLEST:g}, {LARGEST:g}]"
            value = check_number(name, getattr(self, name), 0, LARGEST, expected)
            if 0 < value < SMALLEST:
                raise ValueError(f"{name}: got {value!r}, expected {expected}")
            self._set(name, value)
        if self.alpha > 0 and self.epsilon == 0 and self.smoothing == 0:
            raise ValueError(
                "epsilon: got 0 with smoothing 0, expected one of them > 0: a token never counted would weigh infinity"
            )
        check_flag("relative", self.relative)
        check_choice("normalize", self.normalize, NORMALIZE)
        if self.max_weight is not None:
            limit = check_number("max_weight", self.max_weight, 0, math.inf, "a number > 0", open_low=True)
            self._set("max_weight", limit)
        self._set("blend", check_blend(self.blend))
        self._set("fixed", checked_fixed(self.fixed))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return hash(
            (self.alpha, self.epsilon, self.smoothing, self.relative, self.normalize, self.max_weight, self.blend)
        )

    @classmethod
    def reference(cls) -> PowerLaw:
        """The settings of the paper's authors: raw counts, epsilon 1e-7, alpha 1, nothing smoothed or normalised."""
        return cls(alpha=1.0, epsilon=1e-7, smoothing=0.0, relative=False, normalize="none")

    def weights(self, frequency: TokenFrequency) -> Tensor:
        """The weight of every vocabulary entry.

        Returns float32 [V] on the device of the frequency's counts.
        Raises ValueError if `fixed` names a token outside the vocabulary.
        """
        return weights_of_counts(frequency.counts, self)


def weights_of_counts(counts: Tensor, weighting: PowerLaw) -> Tensor:
    """The weights [V] of counts. Raises TypeError or ValueError that names the argument."""
    check_counts(counts)
    blend = None
    if weighting.blend != 1.0:
        blend = torch.full((), weighting.blend, dtype=torch.float32, device=counts.device)
    return weights_with_fixed(counts, weighting, blend, fixed_table(weighting.fixed, counts))


def weights_with_fixed(counts: Tensor, weighting: PowerLaw, blend: Tensor | None, fixed: Tensor | None) -> Tensor:
    """weights_of_counts for a caller that keeps the blend and the table of fixed weights on the counts' device."""
    return ops.compiled.token_weights(
        counts.contiguous(),
        blend,
        fixed,
        weighting.alpha,
        weighting.epsilon,
        weighting.smoothing,
        weighting.relative,
        NORMALIZE[weighting.normalize],
        math.inf if weighting.max_weight is None else weighting.max_weight,
    )
