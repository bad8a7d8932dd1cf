"""One finetuning run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdl_ext.cli.demo.data import Encoded, collate
from pdl_ext.cli.demo.model import CausalLM
from pdl_ext.cli.progress import steps

# The two ways to compute the PDL loss, by their names in the report.
FUSED, UNFUSED = "fused", "unfused"


@dataclass(frozen=True)
class Training:
    """The record of a run: the loss of every step, and seconds and tokens of all steps but the first, for warm-up."""

    losses: list[float]
    seconds: float
    tokens: int
    target_tokens: int


def loss_of(model: CausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """The model's own loss for token ids [B, T] and labels [B, T]: cross-entropy, or its PDLLoss.

    There is no attention mask: padding comes last, and causal attention of the real tokens ignores it.
    """
    loss: Tensor = model(input_ids=ids, labels=labels, use_cache=False).loss
    return loss


def schedule_of(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises over the first tenth of the steps and falls linearly to a tenth of its peak."""
    warmup = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 1.0) * (1.0 - 0.9 * max(0, step - warmup) / max(1, steps - warmup)),
    )


def finetune(
    model: CausalLM,
    batches: Sequence[Sequence[Encoded]],
    *,
    learning_rate: float,
    pad_id: int,
    name: str,
) -> Training:
    """Finetune all weights of ``model`` in place by its own loss, one AdamW step a batch.

    The learning rate is that of ``schedule_of``. Gradients are clipped to a norm of 1.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = schedule_of(optimizer, len(batches))
    losses: list[float] = []
    tokens = target_tokens = 0
    model.train()
    start = time.perf_counter()
    with steps(batches, f"finetune, {name}", "step") as bar:
        for examples in bar:
            ids, labels = (tensor.to(model.device) for tensor in collate(examples, pad_id))
            loss = loss_of(model, ids, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())  # waits for the device, so the clock below is right on CUDA as well
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if len(losses) == 1 and len(batches) > 1:
                start = time.perf_counter()
            else:
                tokens += sum(len(example.ids) for example in examples)
                target_tokens += sum(example.target_count for example in examples)
    model.eval()
    return Training(losses, time.perf_counter() - start, tokens, target_tokens)
