"""Copies tokens from host memory to a CUDA device: each part is copied while the one before it is counted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["PART_BYTES", "parts_on_device"]

# Large enough for the bandwidth of the bus, small enough for two pinned buffers.
PART_BYTES = 32 * 2**20


def parts_on_device(tokens: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Yields the tokens, a contiguous one-dimensional CPU tensor, in parts on `device`.

    The caller must queue its work on a part on the current stream before it requests the next one. The memory of the
    part is then reused. Copies run on a stream of their own, from two pinned buffers unless the tokens are pinned
    themselves.
    No copy is in progress after the generator ends, whether normally, by an error or because it is dropped.
    """
    size = PART_BYTES // tokens.element_size()
    copies, counting = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    is_pinned = tokens.is_pinned()
    pinned = [_pinned_like(tokens, size) for _ in range(0 if is_pinned else 2)]
    arrived = [torch.empty(size, dtype=tokens.dtype, device=device) for _ in range(2)]
    copied, counted = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
    # The current stream may still be using the memory of the buffers.
    copies.wait_stream(counting)
    try:
        for number, part in enumerate(tokens.split(size)):
            slot = number % 2
            if not is_pinned:
                if number >= 2:
                    copied[slot].synchronize()
                part = pinned[slot][: part.numel()].copy_(part)
            on_device = arrived[slot][: part.numel()]
            with torch.cuda.stream(copies):
                if number >= 2:
                    copies.wait_event(counted[slot])
                on_device.copy_(part, non_blocking=True)
                copied[slot].record(copies)
            counting.wait_event(copied[slot])
            yield on_device
            counted[slot].record(counting)
    finally:
        # In any case the tokens and the buffers may be reused immediately. The device's allocator does not know that
        # this stream used them. The allocator of pinned memory knows only of copies that were queued without an error.
        copies.synchronize()


def _pinned_like(tokens: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=tokens.dtype, pin_memory=True)
