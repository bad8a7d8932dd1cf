"""Training of the upper layers on kept hidden states, which can be resumed."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import pdl_ext
from evidence.arms import effective_share
from evidence.hidden import Halves, HiddenStates
from pdl_ext.cli.demo.train import schedule_of

CHECKPOINT_EVERY = 25


class OutOfTime(Exception):
    """The budget is used; everything computed is kept, and the same command resumes it."""


@dataclass
class Progress:
    """The measurements of each step.

    They are the loss, the norm of the gradient before clipping, and the effective share of the batch's targets.
    """

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    effective_shares: list[float] = field(default_factory=list)
    seconds: float = 0.0


def train(
    halves: Halves,
    loss: pdl_ext.PDLLoss,
    hidden: HiddenStates,
    batches: Sequence[Sequence[int]],
    *,
    learning_rate: float,
    pad_id: int,
    checkpoint: Path,
    go_on: Callable[[], bool] = lambda: True,
) -> Progress:
    """One AdamW step a batch of indices into `hidden`; the rate and the clipping are the demo's.

    `checkpoint` is written every CHECKPOINT_EVERY steps and when `go_on` returns false, and read if it exists.
    Raises OutOfTime.
    """
    optimizer = torch.optim.AdamW(halves.weights().values(), lr=learning_rate, weight_decay=0.0)
    schedule = schedule_of(optimizer, len(batches))
    progress = Progress()
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=halves.device)
        halves.restore(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        progress = Progress(**state["progress"])

    def save() -> None:
        partial = checkpoint.with_name(f".{checkpoint.name}.partial")
        torch.save(
            {
                "weights": halves.weights(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "progress": dataclasses.asdict(progress),
            },
            partial,
        )
        os.replace(partial, checkpoint)

    loss.train()
    for step in range(len(progress.losses), len(batches)):
        if not go_on():
            save()
            raise OutOfTime
        start = time.perf_counter()
        value, effective = _loss_of(halves, loss, hidden.batch(batches[step], pad_id, halves.device))
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(halves.weights().values(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        progress.losses.append(value.item())
        progress.gradient_norms.append(norm.item())
        progress.effective_shares.append(effective.item())
        progress.seconds += time.perf_counter() - start
        if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < len(batches):
            save()
    return progress


def _loss_of(halves: Halves, loss: pdl_ext.PDLLoss, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    rows, targets = halves.rows(*batch)
    value, stats = loss.linear(rows, halves.classifier, targets, return_stats=True)
    weight = stats.weight
    if loss.modulation is not None:
        weight = weight * loss.modulation.factor(stats.nll, stats.entropy, len(halves.classifier))
    return value, effective_share(weight, torch.full_like(weight, 1 / len(weight)))
