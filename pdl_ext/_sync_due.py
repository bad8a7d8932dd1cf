"""The sync of an online loss, kept out of compiled graphs, which hold neither a counter nor a collective now and then.

A module of its own, since `torch.compiler.disable` imports the compiler: 72 MiB and a second, which counting a corpus
and most losses do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pdl_ext.frequency import TokenFrequency
    from pdl_ext.loss import PDLLoss

__all__ = ["sync_if_due"]


@torch.compiler.disable
def sync_if_due(loss: PDLLoss, frequency: TokenFrequency) -> None:
    """Counts a call of the loss, and syncs its frequency at every sync_every-th."""
    with frequency._exclusion.lock:
        loss._calls_since_sync += 1
        if loss._calls_since_sync == loss.sync_every:
            loss._calls_since_sync = 0
            frequency.sync()
