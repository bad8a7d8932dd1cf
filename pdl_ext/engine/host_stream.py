"""Brings tokens from host memory to a CUDA device: a part is copied while the one before it is counted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["PART_BYTES", "parts_on_device"]

# Large enough to reach the bus's bandwidth, small enough for two pinned buffers of it.
PART_BYTES = 32 * 2**20


def parts_on_device(tokens: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Yields the tokens, a contiguous one-dimensional CPU tensor, in parts on `device`.

    What the caller does with a part has to be queued on the current stream before it asks for the next. Its memory is
    then used again. Copies run on a stream of their own, from two pinned buffers unless the tokens are pinned
    themselves.
    When the generator has ended, by itself, by an error or since it is dropped, no copy is under way.
    """
    size = PART_BYTES // tokens.element_size()
    copies, counting = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    is_pinned = tokens.is_pinned()
    pinned = [_pinned_like(tokens, size) for _ in range(0 if is_pinned else 2)]
    arrived = [torch.empty(size, dtype=tokens.dtype, device=device) for _ in range(2)]
    copied, counted = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
    # The buffers may be memory that this stream is still using.
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
        # However this ends, the tokens and the buffers may be another's at once. The device's allocator does not know
        # that this stream used them, and pinned memory's knows only of copies that were queued without an error.
        copies.synchronize()


def _pinned_like(tokens: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=tokens.dtype, pin_memory=True)
