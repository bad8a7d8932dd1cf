"""One finetuning run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from pdl_ext import PDLLoss
from pdl_ext.cli.demo.data import IGNORE_INDEX, Encoded, collate
from pdl_ext.cli.demo.model import CausalLM

# The two ways to the PDL loss, as the report names them.
FUSED, UNFUSED = "fused", "unfused"
# The loss of a model for token ids [B, T] and targets [B, T], not shifted. No attention mask: padding comes last, where
# causal attention of the real tokens never looks.
ModelLoss: TypeAlias = Callable[[CausalLM, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Training:
    """What a run cost: the loss of every step, and seconds and tokens of all steps but the first, which warms up."""

    losses: list[float]
    seconds: float
    tokens: int
    target_tokens: int


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of a causal language model as it is usually written; logits [B, T, V], targets [B, T]."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )


def from_logits(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> ModelLoss:
    """The loss by way of all logits; ``loss_fn`` takes them, [B, T, V], and targets [B, T]."""

    def loss(model: CausalLM, ids: Tensor, targets: Tensor) -> Tensor:
        return loss_fn(model(input_ids=ids, use_cache=False).logits, targets)

    return loss


def from_hidden_states(loss_fn: PDLLoss) -> ModelLoss:
    """The same loss by ``PDLLoss.linear``: the logits [B, T, V] are never held."""

    def loss(model: CausalLM, ids: Tensor, targets: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        value = loss_fn.linear(hidden, model.get_output_embeddings().weight, targets)
        assert isinstance(value, Tensor)
        return value

    return loss


def finetune(
    model: CausalLM,
    batches: Sequence[Sequence[Encoded]],
    loss_fn: ModelLoss,
    *,
    learning_rate: float,
    pad_id: int,
    name: str,
) -> Training:
    """Finetune all weights of ``model`` in place, one AdamW step a batch.

    The learning rate rises over the first tenth of the steps and falls linearly to a tenth of its peak. Gradients are
    clipped to a norm of 1.
    """
    steps = len(batches)
    warmup = max(1, steps // 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 1.0) * (1.0 - 0.9 * max(0, step - warmup) / max(1, steps - warmup)),
    )
    losses: list[float] = []
    tokens = target_tokens = 0
    model.train()
    start = time.perf_counter()
    with tqdm(batches, desc=f"finetune, {name}", unit="step") as bar:
        for examples in bar:
            ids, labels = (tensor.to(model.device) for tensor in collate(examples, pad_id))
            loss = loss_fn(model, ids, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())  # waits for the device, so the clock below is right on CUDA as well
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if len(losses) == 1 and steps > 1:
                start = time.perf_counter()
            else:
                tokens += sum(len(example.ids) for example in examples)
                target_tokens += sum(example.target_count for example in examples)
    model.eval()
    return Training(losses, time.perf_counter() - start, tokens, target_tokens)
