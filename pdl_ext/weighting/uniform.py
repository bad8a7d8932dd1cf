"""The weighting of plain cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pdl_ext.weighting.base import Weighting

__all__ = ["Uniform"]


@dataclass(frozen=True, repr=False)
class Uniform(Weighting):
    """Every token has weight 1: plain cross-entropy without counts. The options are those of every Weighting."""

    needs_counts: ClassVar[bool] = False

    def raw(self, counts: Tensor) -> Tensor:
        return torch.ones_like(counts, dtype=torch.float64)

    def is_one(self) -> bool:
        limited = self.normalize == "none" and self.max_weight is not None and self.max_weight < 1
        # By its length: PyTorch's compiler guards on that of a dict, but not on its truth value.
        return len(self.fixed) == 0 and not limited
