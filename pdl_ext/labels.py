"""What a training loop will learn, counted before it begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pdl_ext._checks import check_flag
from pdl_ext.frequency import TokenFrequency

__all__ = ["count_labels"]


def count_labels(batches: Any, vocab_size: int, *, shift: bool, key: str = "labels") -> TokenFrequency:
    """How often each label occurs in the batches of a training loop, each of which is taken once.

    Args:
        batches: an iterable of mappings, as a DataLoader, or a Trainer, whose training DataLoader is taken. So masks,
            packing, truncation and chat templates are those of the training. An iterator is used up.
        vocab_size: V, the last size of the logits.
        shift: whether position t predicts label t + 1, so that a first label counts for nothing: True for causal
            language models, False for encoder-decoders.
        key: of the labels in each batch, integers [..., T].

    Labels equal to -100 are ignored. On several ranks each counts its own batches: call `all_reduce` on the result.

    Raises TypeError or ValueError that names the argument, IndexError for a label outside [0, V).
    """
    check_flag("shift", shift)
    if hasattr(batches, "get_train_dataloader"):
        batches = batches.get_train_dataloader()
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: got {type(batches).__name__}, expected an iterable of batches, or a Trainer")
    frequency = TokenFrequency(vocab_size)
    for batch in batches:
        if not hasattr(batch, "keys"):
            raise TypeError(f"batches: got a batch that is a {type(batch).__name__}, expected mappings with {key!r}")
        if key not in batch.keys():  # noqa: SIM118  transformers' batches are mappings that iterate otherwise
            raise ValueError(f"key: got {key!r}, expected one of a batch's keys {sorted(batch.keys())}")
        labels = torch.as_tensor(batch[key])
        if shift and labels.dim() == 0:
            raise ValueError(f"batches: got {key!r} of shape [], expected [..., T] with shift=True")
        frequency.update(labels[..., 1:] if shift else labels, strict=True)
    return frequency
