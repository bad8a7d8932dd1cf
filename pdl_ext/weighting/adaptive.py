"""Token-level adaptive weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pdl_ext._checks import MAX, check_choice, check_number
from pdl_ext.weighting.base import Weighting

__all__ = ["Adaptive"]


@dataclass(frozen=True, repr=False)
class Adaptive(Weighting):
    """Weights between 1 and e: a decreasing or a peaked function of the count over the median count.

    With x = n(t) / m, g is exp(-T x) for the form "exp" and x^2 exp(-T x) for "chi2". Then w = (g / max g) (e - 1) + 1.
    m is the count at place k // 2 of the k types seen, in descending order. The maximum is over the types seen; the
    weight of an unseen type is at most e. Without counts all weights are 1. The other options are those of every
    Weighting; the published weights are those of `normalize="none"`.

    Raises TypeError or ValueError that names the option.
    Source: Gu et al. 2020 (arXiv 2010.04380), the exponential and the chi-square form.
    """

    form: str = "exp"
    T: float = 1.75

    def __post_init__(self) -> None:
        check_choice("form", self.form, ("exp", "chi2"))
        self._set("T", check_number("T", self.T, 0, MAX, "a finite number > 0", open_low=True))
        super().__post_init__()

    def raw(self, counts: Tensor) -> Tensor:
        seen = counts > 0
        middle = (seen.sum() // 2).clamp(max=counts.shape[0] - 1)
        median = counts.sort(descending=True).values.gather(0, middle.unsqueeze(0))
        x = counts.double() / median.clamp(min=1)
        log_g = -self.T * x
        if self.form == "chi2":
            log_g = log_g + 2 * x.log()
        # As logarithms: with a large T every g may underflow to 0.
        largest = torch.where(seen, log_g, -math.inf).max()
        weight = (log_g - largest).clamp(max=0.0).exp() * (math.e - 1) + 1
        return torch.where(seen.any(), weight, 1.0)
