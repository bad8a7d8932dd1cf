"""Weights that are a power of the frequency."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from pdl_ext._checks import check_flag, check_number
from pdl_ext.engine import ops
from pdl_ext.weighting.base import NORMALIZE, Weighting

__all__ = ["PowerLaw"]

# The power of a frequency is exact to a part in a billion up to here, which is far beyond practical use.
MAX_ALPHA = 10_000.0
# Quotients of frequencies within these bounds fit into float64.
SMALLEST, LARGEST = 1e-100, 1e18


@dataclass(frozen=True, repr=False)
class PowerLaw(Weighting):
    """The weight of a token as a power of its frequency: w(t) = (f(t) + epsilon) ** -alpha.

    f(t) is the smoothed relative frequency (n(t) + smoothing) / (N + smoothing * V), or n(t) + smoothing with
    `relative=False`. The other options are those of every Weighting.

    Raises TypeError or ValueError that names the option.
    Source: arXiv 2505.16900, the definition of w(t); smoothing and normalisation are this library's.
    """

    alpha: float = 1.0
    epsilon: float = 1e-7
    smoothing: float = 1.0
    relative: bool = True

    def __post_init__(self) -> None:
        self._set("alpha", check_number("alpha", self.alpha, 0, MAX_ALPHA, f"a number from 0 to {MAX_ALPHA:g}"))
        for name in ("epsilon", "smoothing"):
            expected = f"0 or a number from {SMALLEST:g} to {LARGEST:g}"
            value = check_number(name, getattr(self, name), 0, LARGEST, expected)
            if 0 < value < SMALLEST:
                raise ValueError(f"{name}: got {value!r}, expected {expected}")
            self._set(name, value)
        if self.alpha > 0 and self.epsilon == 0 and self.smoothing == 0:
            raise ValueError(
                "epsilon: got 0 with smoothing 0, expected one of them > 0: the weight of an unseen token is infinite"
            )
        check_flag("relative", self.relative)
        super().__post_init__()

    @classmethod
    def reference(cls) -> PowerLaw:
        """The settings of the paper's authors: raw counts, epsilon 1e-7, alpha 1, nothing smoothed or normalised."""
        return cls(alpha=1.0, epsilon=1e-7, smoothing=0.0, relative=False, normalize="none")

    def raw(self, counts: Tensor) -> Tensor:
        frequency = counts.double() + self.smoothing
        if self.relative:
            frequency = frequency / frequency.sum().clamp(min=SMALLEST)
        return (frequency + self.epsilon) ** -self.alpha

    def table(self, counts: Tensor, blend: Tensor | None, fixed: Tensor | None) -> Tensor:
        # Fused, and safe where a power exceeds float64 but its quotient by the mean does not.
        return ops.compiled.token_weights(
            counts.contiguous(),
            blend,
            fixed,
            self.alpha,
            self.epsilon,
            self.smoothing,
            self.relative,
            NORMALIZE[self.normalize],
            math.inf if self.max_weight is None else self.max_weight,
        )
