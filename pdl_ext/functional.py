"""The loss, the token weights and the histogram as functions without state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pdl_ext._checks import (
    check_dense,
    check_ignore_index,
    check_vocab_size,
    is_traced,
    names_of,
    not_scriptable,
    refuse_transforms,
)
from pdl_ext.engine import ops
from pdl_ext.engine.call import LinearLossCall, LossCall, RowStats
from pdl_ext.options import LossKeywords, LossOptions, spells_out_options
from pdl_ext.weighting import NORMALIZE, PowerLaw

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RowStats", "count_tokens", "linear_pdl_loss", "pdl_loss", "token_weights"]

TOKEN_DTYPES = (torch.uint8, torch.uint16, torch.int32, torch.uint32, torch.int64)


@not_scriptable
@spells_out_options
def pdl_loss(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    logit_offset: Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
    process_group: dist.ProcessGroup | None = None,
    **options: Unpack[LossKeywords],
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
    call = LossCall(
        logits,
        targets,
        row_weight=row_weight,
        normalizer=normalizer,
        options=LossOptions.of("pdl_loss", options),
        return_stats=return_stats,
        process_group=process_group,
    )
    call.check_tables(token_weight, logit_offset)
    return call.loss(token_weight, logit_offset, inplace_backward)


@not_scriptable
@spells_out_options
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
    return_stats: bool = False,
    max_chunk_bytes: int | None = None,
    accumulate: str = "float32",
    process_group: dist.ProcessGroup | None = None,
    **options: Unpack[LossKeywords],
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
    call = LinearLossCall(
        hidden,
        weight,
        bias,
        targets,
        row_weight=row_weight,
        normalizer=normalizer,
        options=LossOptions.of("linear_pdl_loss", options),
        return_stats=return_stats,
        max_chunk_bytes=max_chunk_bytes,
        accumulate=accumulate,
        process_group=process_group,
    )
    call.check_tables(token_weight, logit_offset)
    return call.loss(token_weight, logit_offset)


@not_scriptable
def token_weights(counts: Tensor, weighting: PowerLaw) -> Tensor:
    """The weight of every vocabulary entry from its count.

    counts: int64 [V], none of them negative, of a sum below 2^63: ValueError on the CPU, NaN on CUDA. Returns
    float32 [V].
    Raises TypeError or ValueError that names the argument, also if `weighting.fixed` names a token outside
    the vocabulary.
    Source: arXiv 2505.16900, w(t) = 1 / (freq(t) + eps) ** alpha; smoothing and normalisation as in PowerLaw.
    """
    check_counts(counts)
    if not isinstance(weighting, PowerLaw):
        raise TypeError(f"weighting: got {type(weighting).__name__}, expected PowerLaw")
    blend = None
    if weighting.blend != 1.0:
        blend = torch.full((), weighting.blend, dtype=torch.float32, device=counts.device)
    return weights_with_fixed(counts, weighting, blend, fixed_table(weighting, counts))


def fixed_table(weighting: PowerLaw, counts: Tensor) -> Tensor | None:
    """float32 [V] with the fixed weights and NaN elsewhere, on the counts' device; None where nothing is fixed."""
    if not weighting.fixed:
        return None
    check_fixed(weighting, counts.shape[0])
    table = torch.full((counts.shape[0],), math.nan, dtype=torch.float32, device="cpu")
    ids = torch.tensor(list(weighting.fixed), dtype=torch.int64, device="cpu")
    table[ids] = torch.tensor(list(weighting.fixed.values()), dtype=torch.float32, device="cpu")
    return table.to(counts.device)


def check_fixed(weighting: PowerLaw, vocab_size: int) -> None:
    """Raises ValueError if `weighting.fixed` names a token outside the vocabulary."""
    if weighting.fixed and max(weighting.fixed) >= vocab_size:
        raise ValueError(
            f"fixed: got token id {max(weighting.fixed)}, expected ids below the vocabulary size {vocab_size}"
        )


def weights_with_fixed(counts: Tensor, weighting: PowerLaw, blend: Tensor | None, fixed: Tensor | None) -> Tensor:
    """token_weights for a caller that keeps the table of fixed weights, so that a step copies nothing to the device."""
    return ops.compiled.token_weights(
        counts.contiguous(),
        blend,
        fixed,
        weighting.alpha,
        weighting.epsilon,
        weighting.smoothing,
        weighting.relative,
        NORMALIZE[weighting.normalize],
        math.inf if weighting.max_weight is None else weighting.max_weight,
    )


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
    ignored, out_of_range, seen = torch.zeros(3, dtype=torch.int64, device=tokens.device)
    add_tokens(counts, ignored, out_of_range, seen, tokens, ignore_index=ignore_index)
    return counts


def add_tokens(
    counts: Tensor,
    ignored: Tensor,
    out_of_range: Tensor,
    seen: Tensor,
    tokens: Tensor,
    *,
    ignore_index: int,
    strict: bool = False,
    alone: bool = False,
) -> None:
    """Adds a histogram of `tokens` to `counts`, and what it rejects to `ignored` and `out_of_range`, and the
    number of all to `seen`, all int64.

    Calls from several threads add up, each whole. strict (CPU only) raises IndexError for an id out of range before
    anything is changed. alone (CPU only): no other thread uses these totals, and this one counts by itself, whatever
    number of threads PyTorch has.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens: got {type(tokens).__name__}, expected a tensor")
    check_dense("tokens", tokens)
    refuse_transforms(tokens)
    if tokens.dtype not in TOKEN_DTYPES:
        raise TypeError(f"tokens: got dtype {tokens.dtype}, expected one of {names_of(TOKEN_DTYPES)}")
    if tokens.device != counts.device:
        raise ValueError(f"tokens: got device {tokens.device}, expected {counts.device}, where the counts are")
    ops.compiled.count_tokens_(counts, ignored, out_of_range, seen, tokens.contiguous(), ignore_index, strict, alone)
    if not alone and not torch.compiler.is_compiling() and not counts.is_inference():
        # Which PyTorch does for its own ops.
        torch.autograd.graph.increment_version(counts)


def check_counts(counts: Tensor) -> None:
    """Raises TypeError or ValueError unless these are int64 [V] counts; on the CPU also for what no count can be."""
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts: got {type(counts).__name__}, expected an int64 tensor of shape [V]")
    check_dense("counts", counts)
    refuse_transforms(counts)
    if counts.dtype != torch.int64:
        raise TypeError(f"counts: got dtype {counts.dtype}, expected int64")
    if counts.dim() != 1 or counts.shape[0] == 0:
        raise ValueError(f"counts: got shape {list(counts.shape)}, expected [V] with V >= 1")
    # On CUDA that would wait for the device, and a tracer has no numbers.
    if counts.device.type == "cpu" and not is_traced():
        check_count_values("counts", counts)


def check_count_values(name: str, counts: Tensor) -> None:
    """Raises ValueError for a negative count, or a sum past 2^63. Waits for the device."""
    if bool((counts < 0).any()):
        raise ValueError(f"{name}: got a negative count, expected all >= 0")
    # By halves: the sum itself may be past it, and float64 is too coarse to tell.
    high, low = (int(half.sum()) for half in (counts >> 32, counts & 0xFFFFFFFF))
    if (high << 32) + low >= 2**63:
        raise ValueError(f"{name}: got counts whose sum is past 2^63, expected an int64 sum")
