"""Logits that are cut along the vocabulary over the ranks of a process group (vocabulary, or tensor, parallel)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pdl_ext import _ops

__all__ = ["VocabularySlice", "loss_forward", "sum_over_ranks"]


class VocabularySlice(NamedTuple):
    """This rank's columns [first_id, first_id + width) of a vocabulary cut over a group; "" where it has them all."""

    first_id: int
    width: int
    vocab_size: int
    largest_width: int
    group: str

    @classmethod
    def of_rank(cls, width: int, device: torch.device, group: dist.ProcessGroup | None) -> VocabularySlice:
        """The slice of a rank that has `width` columns; ranks follow each other in the order of the group.

        Raises TypeError for what is no process group, ValueError for a vocabulary above 2^30.
        """
        if group is None:
            return cls(0, width, width, width, "")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"process_group: got {type(group).__name__}, expected a ProcessGroup or None")
        widths = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
        widths[dist.get_rank(group)] = width
        dist.all_reduce(widths, group=group)
        of_ranks: list[int] = widths.tolist()
        vocab_size, before = sum(of_ranks), sum(of_ranks[: dist.get_rank(group)])
        if vocab_size > 2**30:
            raise ValueError(f"process_group: got a vocabulary of {vocab_size} over its ranks, expected at most 2^30")
        return cls(before, width, vocab_size, max(of_ranks), group.group_name)

    def of_table(self, table: Tensor | None) -> Tensor | None:
        """This rank's part of a table over the whole vocabulary."""
        if table is None or not self.group:
            return table
        return table[self.first_id : self.first_id + self.width]


def _group_of(name: str) -> dist.ProcessGroup:
    # Ops take no process groups, and PyTorch's own collectives in graphs know them by name, too.
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def sum_over_ranks(tensor: Tensor, group: str) -> Tensor:
    """The sum of a tensor over a group, accumulated in float32 or wider; the tensor itself without a group."""
    if not group:
        return tensor
    total = tensor.to(_ops.accumulator_dtype(tensor.dtype), copy=True)
    dist.all_reduce(total, group=_group_of(group))
    return total.to(tensor.dtype)


# An op, so that torch.compile calls it and does not trace the collectives.
@torch.library.custom_op("pdl_ext::loss_forward_of_slice", mutates_args=())
def loss_forward_of_slice(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    row_weight: Tensor | None,
    logit_offset: Tensor | None,
    normalizer: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float,
    predict: bool,
    first_id: int,
    vocab_size: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ranks = _group_of(group)
    width = logits.shape[1]
    targets = targets.reshape(-1)
    counted = targets != ignore_index
    valid = counted & (targets >= 0) & (targets < vocab_size)
    mine = valid & (targets >= first_id) & (targets < first_id + width)
    # Any target will do for a row whose own is elsewhere: only what does not depend on it is used.
    stand_in = torch.where(mine, targets - first_id, torch.where(counted, 0, -100))
    # With a smoothing of 1, ce is the mean over the slice of lse - z.
    options = (_ops.REDUCTIONS["none"], -100, 1.0 if label_smoothing else 0.0, 0.0, logit_scale, softcap)
    _, rows, _, predicted = _ops.ops.loss_forward(logits, stand_in, None, None, logit_offset, None, *options, predict)
    local_max, local_log_sum, local_nll, local_uniform = rows[:4]

    largest = torch.where(counted, local_max, -torch.inf)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=ranks)
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    # Everything is taken relative to the largest logit, or a large common offset would cancel digits.
    above = local_max - shift
    # Nothing in the slice is above -inf.
    nothing = local_max == -torch.inf
    target = torch.where(nothing, -torch.inf, above + (local_log_sum - local_nll))
    parts = [torch.exp(above + local_log_sum), torch.where(mine, target, 0.0)]
    if label_smoothing:
        mean = torch.where(nothing, torch.inf, local_uniform - local_log_sum - above)
        parts.append(torch.where(counted, width / vocab_size * mean, 0.0))
    sums = torch.stack(parts)
    dist.all_reduce(sums, group=ranks)

    # As in csrc/row_loss.h.
    log_sum = torch.log(sums[0])
    nll = log_sum - sums[1]
    ce = nll if not label_smoothing else (1 - label_smoothing) * nll + label_smoothing * (log_sum + sums[2])
    weight = (
        torch.ones_like(nll) if token_weight is None else token_weight[torch.where(valid, targets, 0)].to(nll.dtype)
    )
    merged = torch.stack([largest, log_sum, nll, ce, weight])
    merged = torch.where(valid, merged, torch.where(counted, torch.nan, 0.0))
    loss, totals = _ops.ops.reduce_rows(merged, targets, row_weight, normalizer, reduction, ignore_index, z_loss)
    if predict:
        # The first of equals, as on one rank.
        here = valid & (local_max == largest) & (predicted >= 0)
        predicted = torch.where(here, predicted + first_id, vocab_size)
        dist.all_reduce(predicted, dist.ReduceOp.MIN, group=ranks)
        predicted = torch.where(predicted == vocab_size, -1, predicted)
    return loss, merged, totals, predicted


@loss_forward_of_slice.register_fake
def _(logits: Tensor, targets: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _ops.loss_outputs(logits, targets, *rest[:-3])


def loss_forward(
    logits: Tensor,
    targets: Tensor,
    others: tuple[Tensor | None, ...],
    arguments: tuple[object, ...],
    part: VocabularySlice,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss_forward; of a slice of the logits, the same results on every rank, by two small all-reduces.

    others: token_weight, row_weight, logit_offset (the slice's), normalizer; arguments: the op's options and predict.
    """
    if not part.group:
        return _ops.ops.loss_forward(logits, targets, *others, *arguments)
    return torch.ops.pdl_ext.loss_forward_of_slice(
        logits, targets, *others, *arguments, part.first_id, part.vocab_size, part.group
    )
