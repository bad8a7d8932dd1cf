"""Weights that fall linearly with the frequency."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdl_ext.weighting.base import Weighting

__all__ = ["Face"]


@dataclass(frozen=True, repr=False)
class Face(Weighting):
    """Frequency-aware cross-entropy: w(t) = 1 - f(t) / max f, so that the most frequent type has weight 0.

    In an online loss f is the running frequency of the targets. Without counts all weights are 1. The options are those
    of every Weighting; the published weights are those of `normalize="types"`.

    Raises TypeError or ValueError that names the option.
    Source: Jiang et al. 2019 (arXiv 1902.09191), FACE with the ground truth's frequency.
    """

    def raw(self, counts: Tensor) -> Tensor:
        most = counts.max()
        return torch.where(most > 0, (most - counts).double() / most.clamp(min=1), 1.0)
