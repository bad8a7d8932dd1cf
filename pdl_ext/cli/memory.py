"""Whether an error says that memory is not enough."""

from __future__ import annotations

import sys

__all__ = ["is_out_of_memory"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is Python's, NumPy's or PyTorch's for memory that cannot be had."""
    # Whoever did without PyTorch is not made to wait for it.
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    # Of the CPU's memory PyTorch tells in the text alone.
    return "can't allocate memory" in str(error)
