"""The loss, the token weights and the histogram as functions without state."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pdl_ext import _ops
from pdl_ext._autograd import weighted_loss
from pdl_ext._checks import (
    check_choice,
    check_ignore_index,
    check_integer,
    check_vocab_size,
    not_scriptable,
)
from pdl_ext._linear import ACCUMULATE, Settings, linear_weighted_loss
from pdl_ext._loss_inputs import LossOptions, bad_target, check_linear_inputs, check_loss_inputs, check_table
from pdl_ext._vocabulary import VocabularySlice
from pdl_ext.counts import CountTable
from pdl_ext.weighting import PowerLaw
from pdl_ext.weighting.power_law import weights_of_counts

__all__ = ["RowStats", "count_tokens", "linear_pdl_loss", "pdl_loss", "token_weights"]


class RowStats(NamedTuple):
    """What the loss knows of each row, detached and shaped like the targets; 0 at ignored rows.

    nll: unweighted negative log-likelihood in nats; weight: token weight times row weight; lse: log-sum-exp of the
    transformed logits; predicted: int64 index of the largest one, -1 at ignored rows and where
    none is above -inf. With shift=True they line up
    with `targets`, like row_weight and reduction "none". float32, or float64 for float64 logits.
    """

    nll: Tensor
    weight: Tensor
    lse: Tensor
    predicted: Tensor


@not_scriptable
def pdl_loss(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    logit_offset: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    shift: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace_backward: bool = False,
    return_stats: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """Cross-entropy of each row times its token weight, fused with its gradient.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64. The last dimension may be a slice of a padded one.
        targets: [...] token ids, int64 or int32; rows whose target is `ignore_index` count for nothing.
        token_weight: float32 [V], or None for ones. It takes no gradient.
        row_weight: [...] extra factor of each row, any floating dtype; it takes a gradient.
        normalizer: replaces the denominator of "mean" and "token_mean": a number >= 0 or a 0-d tensor, such as the
            number of items in an accumulated batch, or a sum of weights reduced over ranks. With 0 the loss is 0.
        logit_offset: float32 [V], added to the logits last (logit adjustment, or -inf to mask). No gradient.
        reduction: "mean" (divided by the sum of weights), "token_mean" (by the number of rows), "sum" or "none".
        shift: the row at position t predicts targets[..., t + 1], as in causal language models, without a copy of
            the logits. Whatever has one element a row lines up with `targets`.
        label_smoothing: share of the target distribution spread evenly over the vocabulary, in [0, 1].
        z_loss: factor of lse ** 2, added to each row unweighted; "mean" and "token_mean" divide it by the number of
            rows, or by `normalizer`.
        softcap, logit_scale: z = softcap * tanh(logit_scale * x / softcap) + logit_offset.
        inplace_backward: the gradient overwrites the logits, which saves their size in memory and a third of the
            traffic: already in this call, if they require grad and the reduction is a scalar (float16 waits for
            backward, since the loss scale has to come first). Do not read them afterwards; another gradient that needs
            them raises, and so does a second backward, or a checkpoint around the loss alone; a leaf and a view of one
            are refused. An upstream gradient other than 1 costs one more pass, and one more rounding: prefer
            `normalizer` to dividing the loss. Ignored under torch.compile, where the compiler plans memory.
        return_stats: also return RowStats.
        process_group: the logits are this rank's columns of the vocabulary, in the order of the ranks, one or more;
            V, targets, tables and results are those of the whole vocabulary, the same on every rank. How many columns
            each has is exchanged at every call, which waits for the device. An error that only one rank finds leaves
            the others waiting for it.

    Returns a 0-d tensor, or [...] for "none" (0 at ignored rows), in float32 (float64 for float64 logits); with
    `return_stats` a pair. If nothing is left to count, 0 with zero gradients.
    Raises TypeError or ValueError that names the argument; on the CPU IndexError for a target outside [0, V). On CUDA
    such a row's loss and gradient are NaN. RuntimeError for `inplace_backward` with a leaf or a view of one, and inside
    a transform of torch.func.
    Source: arXiv 2505.16900, the loss L = -sum w(y) log p(y).
    """
    options = LossOptions.checked(reduction, ignore_index, shift, label_smoothing, z_loss, softcap, logit_scale)
    check_loss_inputs(logits, targets, row_weight, normalizer, options)
    part = VocabularySlice.of_rank(logits.shape[-1], logits.device, process_group)
    check_table("token_weight", token_weight, part.vocab_size, logits.device)
    check_table("logit_offset", logit_offset, part.vocab_size, logits.device)
    return loss_of_checked(
        logits,
        targets,
        token_weight,
        row_weight,
        normalizer,
        logit_offset,
        options,
        part,
        inplace_backward,
        return_stats,
    )


@not_scriptable
def linear_pdl_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    logit_offset: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    shift: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_stats: bool = False,
    max_chunk_bytes: int | None = None,
    accumulate: str = "float32",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """pdl_loss of the logits hidden @ weight.T + bias, of which no more than a slab is ever held.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64; under autocast the products are in its dtype.
        weight: [V, H], the classifier, and bias: [V] or None, in the dtype of hidden.
        max_chunk_bytes: the largest slab of logits, but for at least 128 rows; 512 MB on CUDA and 64 MB on the CPU if
            None.
        accumulate: how the classifier's gradient is summed over slabs: "float32" (on the CPU from three slabs on: two
            are added in its own dtype), or "weight", always in its own dtype, which saves memory or time where that is
            a 16-bit one, and loses what small slabs would have added.
        process_group: as in pdl_loss, with the same max_chunk_bytes on every rank; weight and bias hold this rank's
            part of the vocabulary, hidden is the same on every rank, and its gradient is summed over the ranks.
        The others: as in pdl_loss.

    Returns what pdl_loss does. With a scalar reduction the gradients are computed in this call, and only those that are
    needed; float16 and reduction "none" compute the logits again in backward.
    Raises TypeError or ValueError that names the argument; IndexError as pdl_loss does, before anything is computed.
    Source: as pdl_loss; the products and their gradients are those of torch.nn.functional.linear.
    """
    options = LossOptions.checked(reduction, ignore_index, shift, label_smoothing, z_loss, softcap, logit_scale)
    check_linear_inputs(hidden, weight, bias, targets, row_weight, normalizer, options)
    part = VocabularySlice.of_rank(weight.shape[0], hidden.device, process_group)
    check_table("token_weight", token_weight, part.vocab_size, hidden.device)
    check_table("logit_offset", logit_offset, part.vocab_size, hidden.device)
    return linear_loss_of_checked(
        hidden,
        weight,
        bias,
        targets,
        token_weight,
        row_weight,
        normalizer,
        logit_offset,
        options,
        part,
        linear_settings(hidden, max_chunk_bytes, accumulate),
        return_stats,
    )


def loss_of_checked(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    row_weight: Tensor | None,
    normalizer: float | Tensor | None,
    logit_offset: Tensor | None,
    options: LossOptions,
    part: VocabularySlice,
    inplace_backward: bool,
    return_stats: bool,
) -> Tensor | tuple[Tensor, RowStats]:
    """pdl_loss of what check_loss_inputs and check_table have passed."""
    rows = _Rows.of(targets, row_weight, normalizer, options, _ops.accumulator_dtype(logits.dtype))
    if part.group:
        _check_ids(targets, part.vocab_size, options)
    tensors = (
        logits,
        rows.targets,
        _contiguous(token_weight),
        rows.row_weight,
        part.of_table(_contiguous(logit_offset)),
        rows.normalizer,
    )
    in_place = inplace_backward and not torch.compiler.is_compiling()
    try:
        loss, outputs, predicted = weighted_loss(tensors, options.of_op(), return_stats, in_place, part)
    except IndexError:
        raise bad_target(targets, part.vocab_size, options.ignore_index, options.shift) from None
    return rows.result(loss, outputs, predicted, options)


def linear_settings(hidden: Tensor, max_chunk_bytes: int | None, accumulate: str) -> Settings:
    """How to compute the products. Raises ValueError that names the argument."""
    if max_chunk_bytes is not None:
        max_chunk_bytes = check_integer("max_chunk_bytes", max_chunk_bytes, 1, 2**63 - 1, "None or an int > 0")
    check_choice("accumulate", accumulate, ACCUMULATE)
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    # A compiled graph may be captured, which knows no wait for a count.
    return Settings(dtype, max_chunk_bytes, accumulate == "float32", not torch.compiler.is_compiling())


def linear_loss_of_checked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weight: Tensor | None,
    row_weight: Tensor | None,
    normalizer: float | Tensor | None,
    logit_offset: Tensor | None,
    options: LossOptions,
    part: VocabularySlice,
    settings: Settings,
    return_stats: bool,
) -> Tensor | tuple[Tensor, RowStats]:
    """linear_pdl_loss of what check_linear_inputs and check_table have passed."""
    rows = _Rows.of(targets, row_weight, normalizer, options, _ops.accumulator_dtype(settings.dtype))
    # Before the first product, and not when a slab comes to it.
    _check_ids(targets, part.vocab_size, options)
    loss, outputs, predicted = linear_weighted_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        rows.row_weight,
        (
            rows.targets.reshape(-1),
            _contiguous(token_weight),
            part.of_table(_contiguous(logit_offset)),
            rows.normalizer,
        ),
        options.of_op(),
        return_stats,
        settings,
        part,
    )
    return rows.result(loss, outputs, predicted, options)


def _contiguous(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()


def _check_ids(targets: Tensor, vocab_size: int, options: LossOptions) -> None:
    # On CUDA the rows become NaN instead, and the host waits for nothing.
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    learned = targets[..., 1:] if options.shift else targets
    if bool(((learned != options.ignore_index) & ((learned < 0) | (learned >= vocab_size))).any()):
        raise bad_target(targets, vocab_size, options.ignore_index, options.shift)


class _Rows(NamedTuple):
    """What has one element a row, as the ops take it, and how the results are shaped."""

    targets: Tensor
    row_weight: Tensor | None
    normalizer: Tensor | None
    shape: torch.Size
    shift: bool

    @classmethod
    def of(
        cls,
        targets: Tensor,
        row_weight: Tensor | None,
        normalizer: float | Tensor | None,
        options: LossOptions,
        dtype: torch.dtype,
    ) -> _Rows:
        if row_weight is not None:
            row_weight = row_weight.to(dtype)
        if isinstance(normalizer, Tensor):
            normalizer = normalizer.to(dtype).expand(2).contiguous()
        elif normalizer is not None:
            number = normalizer if isinstance(normalizer, (torch.SymInt, torch.SymFloat)) else float(normalizer)
            # What float32 cannot hold is infinite then, as a tensor's value would be.
            normalizer = torch.full((2,), number, dtype=torch.float64, device=targets.device).to(dtype)
        shift = options.shift and targets.shape[-1] > 0
        if shift:
            targets = F.pad(targets[..., 1:], (0, 1), value=options.ignore_index)
            row_weight = None if row_weight is None else F.pad(row_weight[..., 1:], (0, 1))
        if row_weight is not None:
            row_weight = row_weight.reshape(-1).contiguous()
        return cls(targets.contiguous(), row_weight, normalizer, targets.shape, shift)

    def result(
        self, loss: Tensor, outputs: Tensor | None, predicted: Tensor | None, options: LossOptions
    ) -> Tensor | tuple[Tensor, RowStats]:
        """The loss, with RowStats where the ops' outputs a row are given."""
        if options.reduction == "none":
            loss = self._like_targets(loss)
        if outputs is None or predicted is None:
            return loss
        weight = outputs[_ops.ROW_TOKEN_WEIGHT]
        if self.row_weight is not None:
            # An ignored row counts for nothing, whatever its row weight is: 0 * inf would be NaN.
            counted = self.targets.reshape(-1) != options.ignore_index
            weight = torch.where(counted, weight * self.row_weight.detach(), 0.0)
        stats = RowStats(
            nll=self._like_targets(outputs[_ops.ROW_NLL]),
            weight=self._like_targets(weight),
            lse=self._like_targets(outputs[_ops.ROW_MAX] + outputs[_ops.ROW_LOG_SUM]),
            predicted=self._like_targets(predicted, fill=-1),
        )
        return loss, stats

    def _like_targets(self, values: Tensor, fill: float = 0.0) -> Tensor:
        values = values.reshape(self.shape)
        return F.pad(values[..., :-1], (1, 0), value=fill) if self.shift else values


@not_scriptable
def token_weights(counts: Tensor, weighting: PowerLaw) -> Tensor:
    """The weight of every vocabulary entry from its count.

    counts: int64 [V], none of them negative, of a sum below 2^63: ValueError on the CPU, NaN on CUDA. Returns
    float32 [V].
    Raises TypeError or ValueError that names the argument, also if `weighting.fixed` names a token outside
    the vocabulary.
    Source: arXiv 2505.16900, w(t) = 1 / (freq(t) + eps) ** alpha; smoothing and normalisation as in PowerLaw.
    """
    if not isinstance(weighting, PowerLaw):
        raise TypeError(f"weighting: got {type(weighting).__name__}, expected PowerLaw")
    return weights_of_counts(counts, weighting)


@not_scriptable
def count_tokens(tokens: Tensor, vocab_size: int, *, ignore_index: int = -100) -> Tensor:
    """How often each token id occurs.

    tokens: any shape, uint8, uint16, int32, uint32 or int64, read in that dtype. Ids equal to `ignore_index` or outside
    [0, vocab_size) are left out (TokenFrequency keeps their number). Returns int64 [vocab_size] on the tokens' device.
    Raises TypeError or ValueError that names the argument.
    """
    vocab_size = check_vocab_size(vocab_size)
    ignore_index = check_ignore_index(ignore_index)
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens: got {type(tokens).__name__}, expected a tensor")
    counts = torch.zeros(vocab_size, dtype=torch.int64, device=tokens.device)
    others = torch.zeros(3, dtype=torch.int64, device=tokens.device)
    CountTable(counts, *others.unbind()).add(tokens, ignore_index=ignore_index)
    return counts
