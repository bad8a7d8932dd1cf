"""Counts the labels of a training loop before training begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pdl_ext._checks import check_flag
from pdl_ext.frequency import TokenFrequency

__all__ = ["count_labels"]


def count_labels(batches: Any, vocab_size: int, *, shift: bool, key: str | int = "labels") -> TokenFrequency:
    """How often each label occurs in the batches of a training loop, which are iterated once.

    Args:
        batches: an iterable of mappings or tuples, such as a DataLoader, or a Trainer, whose training DataLoader is
            used. So masks, packing, truncation and chat templates are those of the training. An iterator is used up.
        vocab_size: V, the size of the logits' last dimension.
        shift: whether position t predicts label t + 1, so that the first label is not counted. True for causal language
            models, False for encoder-decoders.
        key: the key of the labels in each batch, or their position if batches are tuples. Labels are integers [..., T]
            on any device, or lists of rows of any length.

    Labels equal to -100 are ignored. On several ranks each counts its own batches: call `all_reduce` on the result.

    Raises TypeError or ValueError that names the argument, IndexError for a label outside the vocabulary.
    """
    check_flag("shift", shift)
    if isinstance(key, bool) or not isinstance(key, (str, int)):
        raise TypeError(f"key: got {key!r}, expected the name of the labels, or their position in a tuple")
    if hasattr(batches, "get_train_dataloader"):
        batches = batches.get_train_dataloader()
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: got {type(batches).__name__}, expected an iterable of batches, or a Trainer")
    frequency = TokenFrequency(vocab_size)
    for batch in batches:
        for labels in filter(Tensor.numel, _rows(_entry(batch, key))):
            if shift and labels.dim() == 0:
                raise ValueError(f"batches: got {key!r} of shape [], expected [..., T] with shift=True")
            # A loader may already have moved batches to the model's device.
            labels = labels.to(frequency.counts.device)
            frequency.update(labels[..., 1:] if shift else labels, strict=True)
    return frequency


def _entry(batch: Any, key: str | int) -> Any:
    if isinstance(key, int):
        if not isinstance(batch, (tuple, list)):
            raise TypeError(f"batches: got a batch that is a {type(batch).__name__}, expected tuples for key={key}")
        if not -len(batch) <= key < len(batch):
            raise ValueError(f"key: got {key}, expected a position in a batch of {len(batch)} entries")
        return batch[key]
    if not hasattr(batch, "keys"):
        instead = " (a position as key is for tuples)" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(
            f"batches: got a batch that is a {type(batch).__name__}, expected mappings with {key!r}{instead}"
        )
    if key not in batch.keys():  # noqa: SIM118  transformers' batches are mappings that iterate otherwise
        raise ValueError(f"key: got {key!r}, expected one of a batch's keys {sorted(batch.keys())}")
    return batch[key]


def _rows(labels: Any) -> Iterator[Tensor]:
    """The labels as one tensor, or as one tensor per row if they are lists of different lengths."""
    if isinstance(labels, Sequence) and len(lengths := set(map(_length, labels))) > 1 and None not in lengths:
        yield from map(torch.as_tensor, labels)
    else:
        yield torch.as_tensor(labels)


def _length(row: Any) -> int | None:
    has_axes = hasattr(row, "__len__") and getattr(row, "ndim", 1) > 0
    return len(row) if has_axes else None
