"""Weights by the effective number of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pdl_ext._checks import check_number
from pdl_ext.weighting.base import Weighting

__all__ = ["ClassBalanced"]


@dataclass(frozen=True, repr=False)
class ClassBalanced(Weighting):
    """The reciprocal of the effective number of samples: w(t) = (1 - beta) / (1 - beta ** n(t)).

    A type that was never seen has the weight of one seen once. beta is at least 0 and below 1. At 0 all weights are
    equal, and towards 1 the weight becomes 1 / n(t). The other options are those of every Weighting.

    Raises TypeError or ValueError that names the option.
    Source: Cui et al. 2019 (arXiv 1901.05555), the class-balanced term.
    """

    beta: float = 0.999

    def __post_init__(self) -> None:
        expected = "a number from 0 to below 1"
        self._set("beta", check_number("beta", self.beta, 0, 1, expected))
        if self.beta == 1:
            raise ValueError(f"beta: got {self.beta!r}, expected {expected}")
        super().__post_init__()

    def raw(self, counts: Tensor) -> Tensor:
        log_beta = math.log(self.beta) if self.beta > 0 else -math.inf
        # expm1, since 1 - beta ** n loses digits where beta is close to 1.
        return (1 - self.beta) / -torch.expm1(counts.clamp(min=1).double() * log_beta)
