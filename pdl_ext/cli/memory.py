"""Recognises errors of insufficient memory."""

from __future__ import annotations

import sys

__all__ = ["is_out_of_memory"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy or PyTorch reports insufficient memory."""
    # A command that did not import PyTorch does not import it for this.
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    # For the CPU's memory PyTorch says so only in the text.
    return "can't allocate memory" in str(error)
