"""The loss, the token weights and the histogram as functions without state."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from pdl_ext import _ops
from pdl_ext._checks import check_choice, check_flag, check_integer, check_number
from pdl_ext.weighting import MAX, NORMALIZE, PowerLaw

__all__ = ["RowStats", "count_tokens", "pdl_loss", "token_weights"]

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TARGET_DTYPES = (torch.int64, torch.int32)
TOKEN_DTYPES = (torch.uint8, torch.uint16, torch.int32, torch.uint32, torch.int64)


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


class LossOptions(NamedTuple):
    """What a loss is told beside its tensors; see pdl_loss."""

    reduction: str
    ignore_index: int
    shift: bool
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float

    def check(self) -> None:
        """Raises TypeError or ValueError that names the first option of a wrong type or outside its range."""
        check_choice("reduction", self.reduction, _ops.REDUCTIONS)
        check_ignore_index(self.ignore_index)
        check_flag("shift", self.shift)
        check_number("label_smoothing", self.label_smoothing, 0, 1, "a number in [0, 1]")
        check_number("z_loss", self.z_loss, 0, MAX, "a finite number >= 0")
        if self.softcap is not None:
            check_number("softcap", self.softcap, 0, MAX, "None or a finite number > 0", open_low=True)
        check_number("logit_scale", self.logit_scale, -MAX, MAX, "a finite number other than 0")
        if self.logit_scale == 0:
            raise ValueError(f"logit_scale: got {self.logit_scale!r}, expected a finite number other than 0")

    def of_op(self) -> tuple[int, int, float, float, float, float]:
        """The options as the compiled ops take them."""
        softcap = 0.0 if self.softcap is None else self.softcap
        reduction = _ops.REDUCTIONS[self.reduction]
        return reduction, self.ignore_index, self.label_smoothing, self.z_loss, self.logit_scale, softcap


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
) -> Tensor | tuple[Tensor, RowStats]:
    """Cross-entropy of each row times its token weight, fused with its gradient.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64. The last dimension may be a slice of a padded one.
        targets: [...] token ids, int64 or int32; rows whose target is `ignore_index` count for nothing.
        token_weight: float32 [V], or None for ones. It takes no gradient.
        row_weight: [...] extra factor of each row, any floating dtype; it takes a gradient.
        normalizer: replaces the denominator of "mean" and "token_mean": a number > 0 or a 0-d tensor, such as the
            number of items in an accumulated batch, or a sum of weights reduced over ranks.
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
            them raises, and so does a second backward, or a checkpoint around the loss alone; a leaf is refused. An
            upstream gradient other than 1 costs one more pass, and one more rounding: prefer `normalizer` to dividing
            the loss. Ignored under torch.compile, where the compiler plans memory.
        return_stats: also return RowStats.

    Returns a 0-d tensor, or [...] for "none" (0 at ignored rows), in float32 (float64 for float64 logits); with
    `return_stats` a pair. If nothing is left to count, 0 with zero gradients.
    Raises TypeError or ValueError that names the argument; on the CPU IndexError for a target outside [0, V). On CUDA
    such a row's loss and gradient are NaN. RuntimeError for `inplace_backward` with a leaf.
    Source: arXiv 2505.16900, the loss L = -sum w(y) log p(y).
    """
    options = LossOptions(reduction, ignore_index, shift, label_smoothing, z_loss, softcap, logit_scale)
    check_loss_inputs(logits, targets, row_weight, normalizer, options)
    _check_table("token_weight", token_weight, logits)
    _check_table("logit_offset", logit_offset, logits)
    if token_weight is not None:
        token_weight = token_weight.contiguous()
    if logit_offset is not None:
        logit_offset = logit_offset.contiguous()
    return loss_of_checked(
        logits, targets, token_weight, row_weight, normalizer, logit_offset, options, inplace_backward, return_stats
    )


def loss_of_checked(
    logits: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    row_weight: Tensor | None,
    normalizer: float | Tensor | None,
    logit_offset: Tensor | None,
    options: LossOptions,
    inplace_backward: bool,
    return_stats: bool,
) -> Tensor | tuple[Tensor, RowStats]:
    """pdl_loss of what check_loss_inputs has passed, with contiguous tables."""
    dtype = _ops.accumulator_dtype(logits.dtype)
    if row_weight is not None:
        row_weight = row_weight.to(dtype)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(dtype).expand(2).contiguous()
    elif normalizer is not None:
        normalizer = torch.full((2,), normalizer, dtype=dtype, device=logits.device)
    shift = options.shift and targets.shape[-1] > 0
    given_targets = targets
    if shift:
        targets = F.pad(targets[..., 1:], (0, 1), value=options.ignore_index)
        row_weight = None if row_weight is None else F.pad(row_weight[..., 1:], (0, 1))
    tensors = (
        logits,
        targets.reshape(-1).contiguous(),
        token_weight,
        None if row_weight is None else row_weight.reshape(-1).contiguous(),
        logit_offset,
        normalizer,
    )
    in_place = inplace_backward and not torch.compiler.is_compiling()
    try:
        loss, rows, predicted = _ops.weighted_loss(tensors, options.of_op(), return_stats, in_place)
    except IndexError:
        raise bad_target(given_targets, logits.shape[-1], options.ignore_index, shift) from None
    if options.reduction == "none":
        loss = _per_row(loss, targets.shape, shift)
    if rows is None or predicted is None or not return_stats:
        return loss
    weight = rows[_ops.ROW_TOKEN_WEIGHT]
    if row_weight is not None:
        # An ignored row counts for nothing, whatever its row weight is: 0 * inf would be NaN.
        counted = targets.reshape(-1) != options.ignore_index
        weight = torch.where(counted, weight * row_weight.detach().reshape(-1), 0.0)
    stats = RowStats(
        nll=_per_row(rows[_ops.ROW_NLL], targets.shape, shift),
        weight=_per_row(weight, targets.shape, shift),
        lse=_per_row(rows[_ops.ROW_MAX] + rows[_ops.ROW_LOG_SUM], targets.shape, shift),
        predicted=_per_row(predicted, targets.shape, shift, fill=-1),
    )
    return loss, stats


def _per_row(values: Tensor, shape: torch.Size, shift: bool, fill: float = 0.0) -> Tensor:
    # What has one element a row, shaped like the targets and lined up with them.
    values = values.reshape(shape)
    return F.pad(values[..., :-1], (1, 0), value=fill) if shift else values


def token_weights(counts: Tensor, weighting: PowerLaw) -> Tensor:
    """The weight of every vocabulary entry from its count.

    counts: int64 [V], none of them negative. Returns float32 [V].
    Raises TypeError or ValueError that names the argument, also if `weighting.fixed` names a token outside
    the vocabulary.
    Source: arXiv 2505.16900, w(t) = 1 / (freq(t) + eps) ** alpha; smoothing and normalisation as in PowerLaw.
    """
    _check_counts(counts)
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
    vocab_size = counts.shape[0]
    if max(weighting.fixed) >= vocab_size:
        raise ValueError(
            f"fixed: got token id {max(weighting.fixed)}, expected ids below the vocabulary size {vocab_size}"
        )
    table = torch.full((vocab_size,), math.nan)
    for token, weight in weighting.fixed.items():
        table[token] = weight
    return table.to(counts.device)


def weights_with_fixed(counts: Tensor, weighting: PowerLaw, blend: Tensor | None, fixed: Tensor | None) -> Tensor:
    """token_weights for a caller that keeps the table of fixed weights, so that a step copies nothing to the device."""
    return _ops.ops.token_weights(
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


def count_tokens(tokens: Tensor, vocab_size: int, *, ignore_index: int = -100) -> Tensor:
    """How often each token id occurs.

    tokens: any shape, uint8, uint16, int32, uint32 or int64, read in that dtype. Ids equal to `ignore_index` or outside
    [0, vocab_size) are left out (TokenFrequency keeps their number). Returns int64 [vocab_size] on the tokens' device.
    Raises TypeError or ValueError that names the argument.
    """
    check_vocab_size(vocab_size)
    check_ignore_index(ignore_index)
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens: got {type(tokens).__name__}, expected a tensor")
    counts = torch.zeros(vocab_size, dtype=torch.int64, device=tokens.device)
    rejected = torch.zeros(2, dtype=torch.int64, device=tokens.device)
    add_tokens(counts, rejected[0], rejected[1], tokens, ignore_index=ignore_index)
    return counts


def add_tokens(
    counts: Tensor, ignored: Tensor, out_of_range: Tensor, tokens: Tensor, *, ignore_index: int, strict: bool = False
) -> None:
    """Adds a histogram of `tokens` to `counts`, and what it rejects to `ignored` and `out_of_range`, all int64.

    strict (CPU only) raises IndexError for an id out of range before anything is changed.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens: got {type(tokens).__name__}, expected a tensor")
    if tokens.dtype not in TOKEN_DTYPES:
        raise TypeError(f"tokens: got dtype {tokens.dtype}, expected one of {_names(TOKEN_DTYPES)}")
    if tokens.device != counts.device:
        raise ValueError(f"tokens: got device {tokens.device}, expected {counts.device}, where the counts are")
    _ops.ops.count_tokens_(counts, ignored, out_of_range, tokens.contiguous(), ignore_index, strict)


def check_vocab_size(vocab_size: int) -> None:
    """Raises ValueError unless vocab_size is an int in [1, 2^31)."""
    check_integer("vocab_size", vocab_size, 1, 2**31 - 1, "an int in [1, 2^31)")


def check_ignore_index(ignore_index: int) -> None:
    """Raises ValueError unless ignore_index is an int that fits into int32."""
    check_integer("ignore_index", ignore_index, -(2**31), 2**31 - 1, "an int in [-2^31, 2^31)")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_loss_inputs(
    logits: Tensor,
    targets: Tensor,
    row_weight: Tensor | None,
    normalizer: float | Tensor | None,
    options: LossOptions,
) -> None:
    """Raises TypeError or ValueError that names the first option or input that the loss cannot take."""
    options.check()
    for name, tensor in (("logits", logits), ("targets", targets)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"logits: got dtype {logits.dtype}, expected one of {_names(LOGITS_DTYPES)}")
    if targets.dtype not in TARGET_DTYPES:
        raise TypeError(f"targets: got dtype {targets.dtype}, expected one of {_names(TARGET_DTYPES)}")
    if logits.dim() == 0 or not 1 <= logits.shape[-1] <= 2**30:
        raise ValueError(f"logits: got shape {list(logits.shape)}, expected [..., V] with V >= 1 and at most 2^30")
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets: got shape {list(targets.shape)}, expected {list(logits.shape[:-1])}: that of logits "
            f"{list(logits.shape)} without the vocabulary"
        )
    if logits.device != targets.device:
        raise ValueError(f"targets: got device {targets.device}, expected {logits.device}, where the logits are")
    if options.shift and targets.dim() == 0:
        raise ValueError("shift: got True with targets of shape [], expected a sequence dimension")
    if row_weight is not None:
        _check_row_weight(row_weight, targets)
    _refuse_tangents(logits, row_weight)
    if normalizer is not None:
        _check_normalizer(normalizer, targets, options.reduction)


def _refuse_tangents(logits: Tensor, row_weight: Tensor | None) -> None:
    # PyTorch would drop the tangent of an op without a forward-mode formula, and return a derivative of zero.
    if getattr(forward_ad, "_current_level", -1) >= 0:
        for tensor in (logits, row_weight):
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(
                    "pdl_ext: the fused loss has no forward-mode derivative; pdl_ext.reference.pdl_loss has one"
                )


def _check_table(name: str, table: Tensor | None, logits: Tensor) -> None:
    if table is None:
        return
    if not isinstance(table, Tensor):
        raise TypeError(f"{name}: got {type(table).__name__}, expected a tensor or None")
    if table.dtype != torch.float32:
        raise TypeError(f"{name}: got dtype {table.dtype}, expected float32 whatever the logits' dtype is")
    if table.shape != logits.shape[-1:]:
        raise ValueError(
            f"{name}: got shape {list(table.shape)}, expected [{logits.shape[-1]}], the logits' vocabulary"
        )
    if table.device != logits.device:
        raise ValueError(f"{name}: got device {table.device}, expected {logits.device}, where the logits are")
    if table.requires_grad:
        raise ValueError(
            f"{name}: got a tensor that requires grad, expected one that does not: only row_weight takes one"
        )


def bad_target(targets: Tensor, vocab_size: int, ignore_index: int, shift: bool) -> IndexError:
    """The error for the first target out of range, by its place in the targets that the caller passed."""
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))
    if shift:
        bad[..., 0] = False
    place = tuple(bad.nonzero()[0].tolist())
    return IndexError(
        f"targets: got {int(targets[place])} at position {list(place)}, expected 0 <= id < {vocab_size} "
        f"or ignore_index ({ignore_index})"
    )


def _check_row_weight(row_weight: Tensor, targets: Tensor) -> None:
    if not isinstance(row_weight, Tensor):
        raise TypeError(f"row_weight: got {type(row_weight).__name__}, expected a tensor or None")
    if not row_weight.is_floating_point():
        raise TypeError(f"row_weight: got dtype {row_weight.dtype}, expected a floating one")
    if row_weight.shape != targets.shape:
        raise ValueError(
            f"row_weight: got shape {list(row_weight.shape)}, expected that of targets, {list(targets.shape)}"
        )
    if row_weight.device != targets.device:
        raise ValueError(
            f"row_weight: got device {row_weight.device}, expected {targets.device}, where the targets are"
        )


def _check_normalizer(normalizer: float | Tensor, targets: Tensor, reduction: str) -> None:
    if reduction in ("none", "sum"):
        raise ValueError(f'normalizer: got one with reduction={reduction!r}, expected reduction "mean" or "token_mean"')
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0 or normalizer.device != targets.device or normalizer.requires_grad:
            raise ValueError(
                f"normalizer: got shape {list(normalizer.shape)} on {normalizer.device}"
                f"{', requiring grad' if normalizer.requires_grad else ''}, expected a 0-d tensor on {targets.device} "
                "that does not require grad"
            )
    elif isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
        raise TypeError(f"normalizer: got {type(normalizer).__name__}, expected a number or a 0-d tensor")
    elif not 0 < normalizer < math.inf:
        raise ValueError(f"normalizer: got {normalizer!r}, expected a finite number > 0")


def _check_counts(counts: Tensor) -> None:
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts: got {type(counts).__name__}, expected a tensor")
    if counts.dtype != torch.int64:
        raise TypeError(f"counts: got dtype {counts.dtype}, expected int64")
    if counts.dim() != 1 or counts.shape[0] == 0:
        raise ValueError(f"counts: got shape {list(counts.shape)}, expected [V] with V >= 1")
