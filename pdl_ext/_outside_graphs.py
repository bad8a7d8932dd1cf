"""What a loss does beside compiled graphs, which hold no counter, no error and no collective now and then.

A module of its own, since `torch.compiler` imports the compiler for it: 72 MiB and a second, which counting a corpus
and most losses do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pdl_ext.frequency import TokenFrequency
    from pdl_ext.loss import PDLLoss

__all__ = ["check_when_traced", "sync_if_due"]


@torch.compiler.disable
def sync_if_due(loss: PDLLoss, frequency: TokenFrequency) -> None:
    """Counts a call of the loss, and syncs its frequency at every sync_every-th."""
    with frequency._exclusion.lock:
        loss._calls_since_sync += 1
        if loss._calls_since_sync == loss.sync_every:
            loss._calls_since_sync = 0
            frequency.sync()


@torch.compiler.assume_constant_result
def check_when_traced(loss: PDLLoss, of_shard: bool) -> bool:
    """Checks the state of a loss while a graph is traced that has no room for it; the result means nothing."""
    if loss.frequency is not None:
        loss._check_counts(loss.frequency)
    if type(loss._blend) is Tensor:
        # Which restores it where it was lost.
        loss._weights.blend_of(loss._blend)
    if loss.online and loss.training and loss.sync_every is None and not of_shard:
        loss._tell_of_ranks(None)
    return True
