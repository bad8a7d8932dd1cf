"""Logits that are sharded along the vocabulary over the ranks of a process group (vocabulary or tensor parallel)."""

from __future__ import annotations

import dataclasses
import weakref
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pdl_ext.engine import ops
from pdl_ext.engine.dtensor import GATHERED_BY_FSDP
from pdl_ext.engine.ops import LossInputs, SavedRows, accumulator_dtype, loss_outputs
from pdl_ext.options import LossOptions

__all__ = ["VocabularyShard", "loss_forward", "sum_over_ranks"]


class VocabularyShard(NamedTuple):
    """This rank's columns of a vocabulary that is sharded over a group: `width` of them, from first_id on.

    largest_width: the largest width of any rank; group: its name, "" if this rank has the whole vocabulary.
    """

    first_id: int
    width: int
    vocab_size: int
    largest_width: int
    group: str

    @classmethod
    def for_rank(
        cls,
        width: int,
        targets: Tensor,
        group: dist.ProcessGroup | None,
        ignore_index: int,
        vocab_size: int | None = None,
        hidden: Tensor | None = None,
    ) -> tuple[VocabularyShard, Tensor]:
        """The shard of a rank that has `width` columns, and its targets. Shards follow the order of ranks in the group.

        targets: of all rows, the same on every rank. hidden: likewise, for a classifier that FSDP2 may have sharded.
        vocab_size: the sum over all ranks, if known.
        Raises TypeError if `group` is not a process group, ValueError for a vocabulary above 2^30. Raises ValueError,
        too, if targets or hidden states differ from those of another rank. Every rank raises the same.
        On CUDA the host reads the ranks' data in a first call only. In later calls a difference, also in widths, is
        reported by setting every target out of range. Raises RuntimeError for a first call during the capture of a CUDA
        graph.
        """
        if group is None:
            return cls(0, width, width, width, ""), targets
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"process_group: got {type(group).__name__}, expected a ProcessGroup or None")
        given = (width, targets, group, ignore_index, vocab_size, hidden)
        if torch.compiler.is_compiling():
            from pdl_ext._outside_graphs import call_outside

            return call_outside(_exchange, *given)
        return _exchange(*given)

    def columns_of(self, table: Tensor | None) -> Tensor | None:
        """This rank's columns of a table over the whole vocabulary."""
        if table is None or not self.group:
            return table
        return table[self.first_id : self.first_id + self.width]


# The first numbers of a rank's message: its width, the number of its targets and their fingerprint.
_NUMBERS = 3
# How many numbers of the hidden states are compared, and by which share of their norm they may differ. Ranks may round
# differently; rows of other data differ by more than their norm.
_SAMPLED, _SAME = 64, 0.1


class _Known(NamedTuple):
    """A rank's knowledge of earlier calls: its shard, and the widths of all ranks on the device."""

    shard: VocabularyShard
    widths: Tensor


# The key is the group itself, since a new group may have the name of an old one.
_known: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, int | None, torch.device], _Known]]
_known = weakref.WeakKeyDictionary()


def _is_host(device: torch.device) -> bool:
    """Whether a tensor there can be read without waiting."""
    return device.type == "cpu"


def _exchange(
    width: int,
    targets: Tensor,
    group: dist.ProcessGroup,
    ignore_index: int,
    vocab_size: int | None,
    hidden: Tensor | None,
) -> tuple[VocabularyShard, Tensor]:
    rank, ranks, device = dist.get_rank(group), dist.get_world_size(group), targets.device
    of_group, key = _known.setdefault(group, {}), (width, vocab_size, device)
    known = of_group.get(key)
    if known is None and not _is_host(device) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"process_group: got a first call with {width} columns under the capture of a CUDA graph, expected one "
            "before it. In this call the ranks exchange their widths"
        )
    # Every rank takes part, whatever it knows: a rank that knows less would wait. Integers below 2^53 are exact in
    # float64.
    sampled = 0 if hidden is None else _SAMPLED
    table = torch.zeros((ranks, _NUMBERS + ranks + sampled), dtype=torch.float64, device=device)
    row = table[rank]
    row[0], row[1], row[2] = width, targets.numel(), _fingerprint(targets)
    if known is not None:
        row[_NUMBERS : _NUMBERS + ranks] = known.widths
    if hidden is not None:
        sample = _sample(hidden)
        row[_NUMBERS + ranks :][: sample.numel()] = sample
    dist.all_reduce(table, group=group)
    if known is None:
        table = table.cpu()
    widths, of_targets, gone_by, samples = table.split([1, _NUMBERS - 1, ranks, sampled], dim=1)
    other_targets = (of_targets != of_targets[0]).any()
    differ = other_targets | ((gone_by != 0) & (gone_by != widths.t())).any()
    if hidden is not None:
        other_hidden = ((samples - samples[0]).norm(dim=1) > _SAME * samples.norm(dim=1)).any()
        differ |= other_hidden
    if known is None:
        gone_by_of_others = [of_rank for of_rank in gone_by.long().tolist() if any(of_rank)]
        if not gone_by_of_others and differ:
            # No rank continues: all have read the same.
            raise _not_the_same("targets" if other_targets else "hidden", hidden is not None)
        numbers = widths[:, 0].long().tolist()
        total, before = sum(numbers), sum(numbers[:rank])
        if total > 2**30:
            raise ValueError(f"process_group: got a vocabulary of {total} over its ranks, expected at most 2^30")
        # Ranks that do not read compute their chunks from the widths that they know.
        largest = max(gone_by_of_others[0] if gone_by_of_others else numbers)
        shard = VocabularyShard(before, width, total, largest, group.group_name)
        if not differ:
            if not _is_host(device):
                with torch.inference_mode(False):
                    known = _Known(shard, torch.tensor(numbers, dtype=torch.float64, device=device))
                # A loss that learns online knows the vocabulary's size from its second call on.
                of_group[key] = of_group[width, total, device] = known
            return shard, targets
    else:
        shard = known.shard
    # An error would leave ranks that do not read waiting for this one. A row with a bad target is NaN instead.
    return shard, targets.masked_fill(differ.to(device), -1 if ignore_index != -1 else -2)


def _sample(hidden: Tensor) -> Tensor:
    flat = hidden.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].double()


def _fingerprint(targets: Tensor) -> Tensor:
    """A number below 2^52; two different sets of targets have the same one only by chance."""
    ids = targets.reshape(-1).long()
    # Each pair of position and id is mixed before the sum, as by the finaliser of a hash.
    mixed = ids * 0x1E3779B97F4A7C15 + torch.arange(ids.numel(), device=ids.device) * 0x3F58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 31)) * 0x14D049BB133111EB
    mixed = (mixed ^ (mixed >> 29)) * 0x3F51AFD7ED558CCD
    return (mixed ^ (mixed >> 32)).sum() & (2**52 - 1)


def _not_the_same(name: str, of_dtensor: bool) -> ValueError:
    told = f"{name}: got others than another rank has, expected the same on every rank of"
    if of_dtensor:
        # A classifier looks the same whether tensor parallelism or FSDP2 has sharded it.
        return ValueError(f"{told} a DTensor's mesh, as in tensor parallelism. {GATHERED_BY_FSDP}")
    return ValueError(f"{told} the vocabulary's process group: it shards columns, not rows")


def _group_of(name: str) -> dist.ProcessGroup:
    # Ops cannot take process groups. PyTorch's own collectives in graphs also refer to them by name.
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def sum_over_ranks(tensor: Tensor, group: str) -> Tensor:
    """The sum of a tensor over a group, accumulated in float32 or wider; the tensor itself without a group."""
    if not group:
        return tensor
    total = tensor.to(accumulator_dtype(tensor.dtype), copy=True)
    dist.all_reduce(total, group=_group_of(group))
    return total.to(tensor.dtype)


# An op, so that torch.compile calls it instead of tracing the collectives.
@torch.library.custom_op("pdl_ext::loss_forward_of_shard", mutates_args=())
def loss_forward_of_shard(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    row_weight: Tensor | None,
    logit_offset: Tensor | None,
    normalizer: Tensor | None,
    options: list[float],
    stats: bool,
    first_id: int,
    vocab_size: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    asked = LossOptions.unpacked(options)
    ranks = _group_of(group)
    width = logits.shape[1]
    targets = targets.reshape(-1)
    counted = targets != asked.ignore_index
    valid = counted & (targets >= 0) & (targets < vocab_size)
    mine = valid & (targets >= first_id) & (targets < first_id + width)
    # With a smoothing of 1, ce is the mean over the shard of lse - z, each times the weight of its class.
    smoothed = 1.0 if asked.label_smoothing else 0.0
    of_class = asked.smooths_by_class
    local = dataclasses.replace(
        asked,
        reduction="none",
        ignore_index=-100,
        label_smoothing=smoothed,
        label_smoothing_weight="class" if of_class else "target",
        z_loss=0.0,
        modulation=None,
    )
    of_entropy = stats or (asked.modulation is not None and asked.modulation.of_entropy)
    # A row whose target is on another rank gets any target here: only results that do not depend on it are used.
    stand_in = torch.where(mine, targets - first_id, torch.where(counted, 0, local.ignore_index))
    columns = token_weight[first_id : first_id + width] if of_class and token_weight is not None else None
    inputs = LossInputs(stand_in, token_weight=columns, logit_offset=logit_offset)
    _, found, _, predicted = ops.compiled.loss_forward(logits, *inputs, local.packed, of_entropy)
    of_shard = SavedRows.of(found)

    largest = torch.where(counted, of_shard.max, -torch.inf)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=ranks)
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    # Everything is relative to the largest logit, or a large common offset would cancel digits.
    above = of_shard.max - shift
    # No logit of the shard is above -inf.
    nothing = of_shard.max == -torch.inf
    target = torch.where(nothing, -torch.inf, above + (of_shard.log_sum - of_shard.nll))
    sum_of_exp = torch.exp(above) * of_shard.sum
    terms = {"sum_of_exp": sum_of_exp, "z_target": torch.where(mine, target, 0.0)}
    if asked.label_smoothing:
        of_classes = of_shard.smoothing_weight if of_class else torch.ones_like(above)
        mean = of_shard.ce - of_classes * (of_shard.log_sum + above)
        mean = torch.where(nothing & (of_classes != 0), torch.inf, mean)
        terms["smoothed"] = torch.where(counted, width / vocab_size * mean, 0.0)
        terms["class_weight"] = torch.where(counted, width / vocab_size * of_classes, 0.0)
    if of_entropy:
        # The sum of exp(z - shift) (z - shift).
        scaled = sum_of_exp * (above + of_shard.log_sum - of_shard.entropy)
        terms["scaled"] = torch.where(nothing | ~counted, 0.0, scaled)
    sums = torch.stack(list(terms.values()))
    dist.all_reduce(sums, group=ranks)
    total = dict(zip(terms, sums.unbind(), strict=True))

    log_sum = torch.log(total["sum_of_exp"])
    nll = log_sum - total["z_target"]
    ones = torch.ones_like(nll)
    weight = LossInputs(targets, token_weight).weights_of_rows(valid).to(nll.dtype)
    class_weight = total.get("class_weight", ones)
    rows = SavedRows(
        largest,
        total["sum_of_exp"],
        log_sum,
        nll,
        ce=class_weight * log_sum + total["smoothed"] if "smoothed" in total else nll,
        token_weight=weight,
        modulation=ones,
        entropy=(log_sum - total["scaled"] / total["sum_of_exp"]).clamp(min=0) if of_entropy else torch.zeros_like(nll),
        smoothing_weight=class_weight,
    )
    saved_rows = torch.stack(rows)
    ops.compiled.complete_rows_(saved_rows, options, vocab_size)
    saved_rows = torch.where(valid, saved_rows, torch.where(counted, torch.nan, 0.0))
    loss, factors = ops.compiled.reduce_rows(saved_rows, targets, row_weight, normalizer, options)
    if stats:
        # The first of equal logits, as on one rank.
        here = valid & (of_shard.max == largest) & (predicted >= 0)
        predicted = torch.where(here, predicted + first_id, vocab_size)
        dist.all_reduce(predicted, dist.ReduceOp.MIN, group=ranks)
        predicted = torch.where(predicted == vocab_size, -1, predicted)
    return loss, saved_rows, factors, predicted


@loss_forward_of_shard.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    row_weight: Tensor | None,
    logit_offset: Tensor | None,
    normalizer: Tensor | None,
    options: list[float],
    stats: bool,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return loss_outputs(logits, options, stats)


def loss_forward(
    logits: Tensor, inputs: LossInputs, options: list[float], stats: bool, shard: VocabularyShard
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op loss_forward. For a shard of the logits every rank gets the same results, by two small all-reduces.

    inputs: with the shard's logit_offset.
    """
    if not shard.group:
        return ops.compiled.loss_forward(logits, *inputs, options, stats)
    return torch.ops.pdl_ext.loss_forward_of_shard(
        logits, *inputs, options, stats, shard.first_id, shard.vocab_size, shard.group
    )
