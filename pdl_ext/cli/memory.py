"""Whether an error says that memory is not enough."""

from __future__ import annotations

import torch

__all__ = ["is_out_of_memory"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is Python's, NumPy's or PyTorch's for memory that cannot be had."""
    # Of the CPU's memory PyTorch tells in the text alone.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
