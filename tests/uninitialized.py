"""Fills new memory with NaN, in the process of tests that imports this, and in its ranks.

This reveals reads of memory that was never written, in PyTorch's tensors and in any C++ allocation.
"""

from __future__ import annotations

import contextlib
import ctypes

import torch

__all__ = ["fill", "is_filled"]

# M_PERTURB of glibc's malloc.h: malloc fills new memory with the complement of the low byte, so that every bit is 1.
_PERTURB, _TO_ONES = -6, 0x100


def fill() -> None:
    # Without glibc only PyTorch's own allocations are filled.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_PERTURB, _TO_ONES)
    # On a card some of PyTorch's own kernels have no deterministic version, which is not needed here.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())


def is_filled() -> bool:
    """Whether new memory is NaN: PyTorch's, and with glibc C++'s."""
    libc = ctypes.CDLL(None)
    of_pytorch = bool(torch.empty(7).isnan().all())
    if not hasattr(libc, "mallopt"):
        return of_pytorch
    memory, size = ctypes.c_void_p(), 2**16
    if libc.posix_memalign(ctypes.byref(memory), ctypes.c_size_t(64), ctypes.c_size_t(size)):
        raise MemoryError
    found = ctypes.string_at(memory, size)
    libc.free(memory)
    return of_pytorch and found == b"\xff" * size


fill()
