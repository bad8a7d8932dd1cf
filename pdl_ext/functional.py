"""The loss, the token weights and the histogram as functions without state."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack

from pdl_ext._checks import check_exponent, check_ignore_index, check_vocab_size, not_scriptable
from pdl_ext.counts import CountTable, check_counts, log_probabilities
from pdl_ext.engine.call import LinearLossCall, LossCall, RowStats
from pdl_ext.frequency import TokenFrequency
from pdl_ext.options import LossKeywords, LossOptions, spells_out_options
from pdl_ext.weighting import Weighting
from pdl_ext.weighting.base import check_weighting, weights_of_counts

__all__ = ["RowStats", "count_tokens", "decoding_offset", "linear_pdl_loss", "pdl_loss", "token_weights"]

# The module name in pickles, and in the list of classes that are safe to load.
RowStats.__module__ = __name__


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

    If the logits require grad and the reduction is a scalar, this call also computes their gradient, in the same pass.
    That gradient is for an upstream gradient of 1. For another one, backward computes it from the logits in one more
    pass, with the same bits. Use no_grad for a loss that nobody differentiates: it would cost a gradient's time, and
    its memory while the loss exists. Of several losses that exist at once, each holds a gradient; of those of one
    PDLLoss only the first does. Five cases leave the gradient to backward: float16, whose loss scale comes later,
    "none", a normalized modulation, `process_group` and torch.compile.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64. The last dimension may be a slice of a padded one. A
            DTensor whose one-dimensional mesh shards the vocabulary is treated as with `process_group`.
        targets: [...] token ids, int64 or int32. Rows whose target is `ignore_index` are left out.
        token_weight: float32 [V], or None for ones. It gets no gradient.
        row_weight: [...] extra factor of each row, any floating dtype. It gets a gradient.
        normalizer: replaces the denominator of "mean" and "token_mean": a number >= 0 or a 0-d tensor. Examples are the
            number of items in an accumulated batch, or a sum of weights over ranks. With 0 the loss is 0.
        logit_offset: float32 [V], added to the logits last (logit adjustment, or -inf to mask). It gets no gradient.
        reduction: "mean" (divided by the sum of weights), "token_mean" (by the number of rows), "sum" or "none".
        shift: the row at position t predicts targets[..., t + 1], as in causal language models, without a copy of the
            logits. Every tensor with one element per row is aligned with `targets`.
        label_smoothing: share of the target distribution that is spread evenly over the vocabulary, from 0 to 1.
        label_smoothing_weight: the factor of that share. "target": the target's token weight; "none": 1; "class": each
            class's own weight, as F.cross_entropy does. Row weights and modulations multiply the whole.
        z_loss: factor of lse ** 2, added to each row unweighted; "mean" and "token_mean" divide it by the number of
            rows, or by `normalizer`.
        modulation: one of `pdl_ext.modulation`, or None: a factor of each row's cross-entropy, computed from its nll or
            its entropy. It is not part of a denominator, and does not multiply the z-loss.
        softcap, logit_scale: z = softcap * tanh(logit_scale * x / softcap) + logit_offset.
        inplace_backward: the gradient overwrites the logits, which saves their size in memory. This call does so if
            they require grad and the reduction is a scalar. float16 waits for backward, since its loss scale has to
            come first. Do not read the logits afterwards. Another gradient that needs them raises, and so does a second
            backward, or a checkpoint around the loss alone. A leaf and a view of a leaf are refused. An upstream
            gradient other than 1 costs one more pass and one more rounding: prefer `normalizer` to dividing the loss. A
            normalized modulation costs the same. Ignored under torch.compile, where the compiler plans memory.
        return_stats: also return RowStats.
        process_group: the logits are this rank's columns of the vocabulary, one or more, in the order of the ranks. V,
            targets, tables and results refer to the whole vocabulary and are the same on every rank. Targets that
            differ between ranks raise ValueError. On CUDA the host waits for this check only in the first call with a
            given number of columns and size of the tables. Make that call before a CUDA graph is captured. In later
            calls, targets or columns that differ make the loss and its gradients NaN. An error that only one rank finds
            leaves the others waiting for it.

    Returns a 0-d tensor, or [...] for "none" (0 at ignored rows), in float32 (float64 for float64 logits). With
    `return_stats` it returns a pair. If every row is left out, the loss is 0 and its gradients are 0.
    Raises TypeError or ValueError that names the argument. A target outside the vocabulary raises IndexError on the
    CPU; on CUDA that row's loss and gradient are NaN. Raises RuntimeError for `inplace_backward` with a leaf or a view
    of one, and inside a transform of torch.func. Second derivatives and forward mode are those of the definition in
    plain PyTorch. They raise RuntimeError with `process_group`, and for a gradient that `inplace_backward` has already
    computed.
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
        vocab_size=_size_of(token_weight, logit_offset),
        inplace_backward=inplace_backward,
        at_once=True,
        last=None,
    )
    call.check_tables(token_weight, logit_offset)
    return call.loss(token_weight, logit_offset)


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
    """pdl_loss of the logits hidden @ weight.T + bias, which are computed one chunk of rows at a time.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64. Under autocast the products are in autocast's dtype.
        weight: [V, H], the classifier, in the dtype of hidden. A DTensor whose one-dimensional mesh shards the
            vocabulary is treated as with `process_group`; hidden may be a DTensor of the same mesh.
        bias: [V] or None, in the dtype of hidden; a DTensor as for weight.
        max_chunk_bytes: the largest chunk of logits; a chunk has at least 128 rows, though. None: 512 MB on CUDA and 64
            MB on the CPU.
        accumulate: the dtype in which the classifier's gradient is summed over chunks. "float32": float32; on the CPU
            two chunks are added in the classifier's own dtype. "weight": always the classifier's own. That saves memory
            or time with a 16-bit dtype, and loses small terms when there are many chunks.
        process_group: as in pdl_loss, with the same max_chunk_bytes on every rank. `weight` and `bias` hold this rank's
            shard of the vocabulary. `hidden` is the same on every rank, and its gradient is summed over the ranks.
        The others: as in pdl_loss.

    Returns the same as pdl_loss. With a scalar reduction this call computes the gradients, and only those that are
    needed. float16, reduction "none", and a normalized modulation with a z-loss compute the logits again in backward.
    Raises TypeError or ValueError that names the argument; IndexError as pdl_loss does, before anything is computed.
    Source: that of pdl_loss; the products and their gradients are those of torch.nn.functional.linear.
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
        vocab_size=_size_of(token_weight, logit_offset),
    )
    call.check_tables(token_weight, logit_offset)
    return call.loss(token_weight, logit_offset)


@not_scriptable
def token_weights(counts: Tensor, weighting: Weighting) -> Tensor:
    """The weight of every vocabulary entry from its count.

    counts: int64 [V], all >= 0, with a sum below 2^63. Others raise ValueError on the CPU, and give NaN on CUDA.
    Returns float32 [V].
    Raises TypeError or ValueError that names the argument, also if `weighting.fixed` names a token outside the
    vocabulary.
    Source: arXiv 2505.16900, w(t) = 1 / (freq(t) + eps) ** alpha; the classes of other weightings name theirs.
    """
    check_weighting(weighting)
    return weights_of_counts(counts, weighting)


@not_scriptable
def decoding_offset(frequency: TokenFrequency | Tensor, alpha: float) -> Tensor:
    """The offset of the logits that favours rare tokens in generation: -alpha log f, f = (n + 1) / (N + V).

    frequency: a TokenFrequency or int64 [V] counts. Returns float32 [V] on their device. Training with cross-entropy
    and decoding with this offset has the same optimum as a loss that weighs by f ** -alpha.
    Raises TypeError or ValueError that names the argument.
    Source: Menon et al. 2021 (arXiv 2007.07314), post-hoc logit adjustment.
    """
    alpha = check_exponent("alpha", alpha)
    counts = frequency.counts if isinstance(frequency, TokenFrequency) else frequency
    check_counts(counts)
    return -alpha * log_probabilities(counts)


@not_scriptable
def count_tokens(tokens: Tensor, vocab_size: int, *, ignore_index: int = -100) -> Tensor:
    """How often each token id occurs.

    tokens: any shape, uint8, uint16, int32, uint32 or int64, read in that dtype. Ids equal to `ignore_index` and ids
    outside the vocabulary are left out (TokenFrequency keeps their number). Returns int64 [vocab_size] on the tokens'
    device.
    Raises TypeError or ValueError that names the argument.
    """
    vocab_size = check_vocab_size(vocab_size)
    ignore_index = check_ignore_index(ignore_index)
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens: got {type(tokens).__name__}, expected a tensor")
    table = CountTable.zeros(vocab_size, tokens.device)
    table.add(tokens, ignore_index=ignore_index)
    return table.counts


def _size_of(*tables: Tensor | None) -> int | None:
    """The vocabulary's size by the first table that has one dimension. The tables are checked later."""
    for table in tables:
        if isinstance(table, Tensor) and table.dim() == 1:
            return table.shape[0]
    return None
