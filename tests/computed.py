"""The memory of a leaf as a model's output, which may be written to: for tensors too large to copy."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["computed"]


class _Computed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, leaf):
        return leaf.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def computed(leaf: Tensor) -> Tensor:
    """The leaf's memory as a tensor that is not a leaf; its gradient is the leaf's."""
    return _Computed.apply(leaf)
