"""One call of a loss: checks its inputs, converts them for the ops, and the results back for the caller."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from pdl_ext._checks import (
    MAX,
    check_choice,
    check_dense,
    check_integer,
    check_number,
    is_dtensor,
    is_traced,
    names_of,
    refuse_transforms,
)
from pdl_ext.engine.autograd import LastUpstream, Results, weighted_loss
from pdl_ext.engine.definition import defined_loss
from pdl_ext.engine.dtensor import replicated, vocabulary_part
from pdl_ext.engine.linear import ACCUMULATE, Settings, linear_weighted_loss
from pdl_ext.engine.ops import LossInputs, SavedRows, accumulator_dtype
from pdl_ext.engine.vocabulary import VocabularyShard, sum_over_ranks
from pdl_ext.options import LossOptions

__all__ = ["LinearLossCall", "LossCall", "RowStats"]

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TARGET_DTYPES = (torch.int64, torch.int32)


class RowStats(NamedTuple):
    """Statistics of each row, detached and shaped like the targets; 0 at ignored rows.

    With shift=True they are aligned with `targets`, like row_weight and reduction "none". float32, or float64 for
    float64 logits.

    Attributes:
        nll: unweighted negative log-likelihood in nats.
        weight: token weight times row weight.
        lse: log-sum-exp of the transformed logits.
        predicted: int64 index of the largest transformed logit; -1 at ignored rows and where none is above -inf.
        entropy: entropy of the softmax of the transformed logits, in nats.
    """

    nll: Tensor
    weight: Tensor
    lse: Tensor
    predicted: Tensor
    entropy: Tensor


class _Call:
    """The common part of both calls: everything except the logits or hidden states.

    shard: the columns of the vocabulary on this rank.
    """

    def __init__(
        self,
        targets: Tensor,
        row_weight: Tensor | None,
        normalizer: float | Tensor | None,
        options: LossOptions,
        return_stats: bool,
        shard: VocabularyShard,
    ) -> None:
        self.targets = targets
        self.row_weight = row_weight
        # The weight of each row, which replaces the table.
        self.token_weight_of_rows: Tensor | None = None
        self.normalizer = normalizer
        self.options = options
        self.return_stats = return_stats
        self.shard = shard

    def bad_target(self) -> IndexError:
        """The error for the first target out of range, with its position in the caller's targets."""
        ignore_index, vocab_size = self.options.ignore_index, self.shard.vocab_size
        bad = self._out_of_range(self.targets)
        if self.options.shift:
            bad[..., 0] = False
        place = tuple(bad.nonzero()[0].tolist())
        return IndexError(
            f"targets: got {int(self.targets[place])} at position {list(place)}, expected 0 <= id < {vocab_size} "
            f"or ignore_index ({ignore_index})"
        )

    def learned_targets(self) -> Tensor:
        """The targets that a row predicts."""
        return self.targets[..., 1:] if self.options.shift else self.targets

    def check_tables(self, token_weight: Tensor | None, logit_offset: Tensor | None) -> None:
        """Raises TypeError or ValueError unless each is None or a float32 [V] that does not require grad."""
        for name, table in (("token_weight", token_weight), ("logit_offset", logit_offset)):
            if table is not None:
                _check_table(name, table, self.shard.vocab_size, self.targets.device)

    def drop_weights(self, token_weight: Tensor, weight_drop: float) -> None:
        """Takes token weights from a table [V], and replaces each by 1 with probability `weight_drop`."""
        drawn = torch.rand(self.targets.shape, dtype=torch.float32, device=self.targets.device)
        if self.shard.group:
            # The ranks of a sharded vocabulary have the same rows, but generators of their own.
            drawn = sum_over_ranks(drawn if self.shard.first_id == 0 else torch.zeros_like(drawn), self.shard.group)
        # The weight of an ignored row or a target out of range is never used.
        weight = token_weight[self.targets.long().clamp(0, self.shard.vocab_size - 1)]
        self.token_weight_of_rows = torch.where(drawn < weight_drop, 1.0, weight)

    def _out_of_range(self, targets: Tensor) -> Tensor:
        wrong = (targets < 0) | (targets >= self.shard.vocab_size)
        return (targets != self.options.ignore_index) & wrong

    def _check_ids(self) -> None:
        # On CUDA such rows become NaN instead, so that the host need not wait.
        if self.targets.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if bool(self._out_of_range(self.learned_targets()).any()):
            raise self.bad_target()

    @property
    def _shifts(self) -> bool:
        return self.options.shift and self.targets.shape[-1] > 0

    def _choose_options(self, token_weight: Tensor | None) -> None:
        # Without a table every class has weight 1, like the target.
        if self.options.smooths_by_class and token_weight is None:
            self.options = dataclasses.replace(self.options, label_smoothing_weight="target")

    def _inputs(self, token_weight: Tensor | None, logit_offset: Tensor | None, dtype: torch.dtype) -> LossInputs:
        """The inputs of the ops, for an accumulator's dtype; tables are already checked."""
        targets, row_weight, normalizer = self.targets, self.row_weight, self.normalizer
        of_rows = self.token_weight_of_rows
        if row_weight is not None:
            row_weight = row_weight.to(dtype)
        if isinstance(normalizer, Tensor):
            normalizer = normalizer.to(dtype).expand(2).contiguous()
        elif normalizer is not None:
            number = normalizer if isinstance(normalizer, (torch.SymInt, torch.SymFloat)) else float(normalizer)
            # A number outside the range of float32 becomes infinite, as a tensor's value would.
            normalizer = torch.full((2,), number, dtype=torch.float64, device=targets.device).to(dtype)
        if self._shifts:
            targets = F.pad(targets[..., 1:], (0, 1), value=self.options.ignore_index)
            row_weight, of_rows = (None if x is None else F.pad(x[..., 1:], (0, 1)) for x in (row_weight, of_rows))
        if of_rows is not None:
            token_weight = of_rows.reshape(-1, 1)
        return LossInputs(
            targets=targets.contiguous(),
            token_weight=None if token_weight is None else token_weight.contiguous(),
            row_weight=None if row_weight is None else row_weight.reshape(-1).contiguous(),
            logit_offset=None if logit_offset is None else self.shard.columns_of(logit_offset.contiguous()),
            normalizer=normalizer,
        )

    def _results(self, results: Results, inputs: LossInputs) -> Tensor | tuple[Tensor, RowStats]:
        """The loss, with RowStats if requested."""
        loss, saved_rows, predicted = results
        if self.options.reduction == "none":
            loss = self._like_targets(loss)
        if saved_rows is None or predicted is None:
            return loss
        rows = SavedRows.of(saved_rows)
        weight = rows.token_weight
        if inputs.row_weight is not None:
            # An ignored row has weight 0 whatever its row weight: 0 * inf would be NaN.
            counted = inputs.targets.reshape(-1) != self.options.ignore_index
            weight = torch.where(counted, weight * inputs.row_weight.detach(), 0.0)
        stats = RowStats(
            nll=self._like_targets(rows.nll),
            weight=self._like_targets(weight),
            lse=self._like_targets(rows.max + rows.log_sum),
            predicted=self._like_targets(predicted, fill=-1),
            entropy=self._like_targets(rows.entropy),
        )
        return loss, stats

    def _like_targets(self, values: Tensor, fill: float = 0.0) -> Tensor:
        values = values.reshape(self.targets.shape)
        return F.pad(values[..., :-1], (1, 0), value=fill) if self._shifts else values


class LossCall(_Call):
    """A loss of logits [..., V].

    at_once, last: as in `weighted_loss`.
    vocab_size: that of the tables that follow, or None.
    Raises TypeError or ValueError that names the first invalid input. Raises RuntimeError for `inplace_backward` with a
    leaf or a view of one.
    """

    def __init__(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        row_weight: Tensor | None,
        normalizer: float | Tensor | None,
        options: LossOptions,
        return_stats: bool,
        process_group: dist.ProcessGroup | None,
        vocab_size: int | None,
        inplace_backward: bool,
        at_once: bool,
        last: LastUpstream | None,
    ) -> None:
        if is_dtensor(logits):
            vocab_size = logits.shape[-1]
            targets = replicated("targets", targets, logits)
            logits, process_group = vocabulary_part("logits", logits, logits.dim() - 1, process_group)
        _check_scores("logits", logits)
        _check_targets_dtype(targets)
        if logits.dim() == 0 or not 1 <= logits.shape[-1] <= 2**30:
            raise ValueError(f"logits: got shape {list(logits.shape)}, expected [..., V] with V >= 1 and at most 2^30")
        if logits.shape[:-1] != targets.shape:
            raise _targets_do_not_fit("logits", logits, targets, "the vocabulary")
        _check_rest("the logits are", logits, targets, row_weight, normalizer, options)
        # Computed by the definition, which PyTorch can differentiate in forward mode.
        self.has_tangent = _has_tangent(logits, row_weight, normalizer)
        if self.has_tangent and (process_group is not None or is_traced()):
            raise _no_forward_mode()
        self.in_place = inplace_backward and not torch.compiler.is_compiling()
        if self.in_place and logits.requires_grad and torch.is_grad_enabled():
            _refuse_leaf(logits)
        shard, targets = VocabularyShard.for_rank(
            logits.shape[-1], targets, process_group, options.ignore_index, vocab_size
        )
        super().__init__(targets, row_weight, normalizer, options, return_stats, shard)
        self.logits = logits
        self.process_group = process_group
        # A functional graph would copy the gradient before it is corrected.
        self.at_once = at_once and not is_traced()
        self.last = last

    def loss(self, token_weight: Tensor | None, logit_offset: Tensor | None) -> Tensor | tuple[Tensor, RowStats]:
        """The result of pdl_loss; tables are already checked. Raises IndexError for a target outside the vocabulary."""
        self._choose_options(token_weight)
        inputs = self._inputs(token_weight, logit_offset, accumulator_dtype(self.logits.dtype))
        if self.shard.group:
            self._check_ids()
        if self.has_tangent:
            return self._loss_with_tangent(inputs)
        try:
            how = (self.options, self.return_stats, self.in_place, self.shard, self.at_once, self.last)
            results = weighted_loss(self.logits, inputs, *how)
        except IndexError:
            raise self.bad_target() from None
        return self._results(results, inputs)

    def _loss_with_tangent(self, inputs: LossInputs) -> Tensor | tuple[Tensor, RowStats]:
        self._check_ids()
        out_of_range = self._out_of_range(inputs.targets)
        targets = torch.where(out_of_range, 0, inputs.targets)
        of_rows = inputs.weights_of_rows((inputs.targets != self.options.ignore_index) & ~out_of_range)
        weight = torch.where(out_of_range, torch.nan, of_rows.view(targets.shape))
        class_weight = inputs.token_weight if self.options.smooths_by_class else None
        row_weight = None if inputs.row_weight is None else inputs.row_weight.view(targets.shape)
        normalizer = None if inputs.normalizer is None else inputs.normalizer[0]
        loss = defined_loss(
            self.logits, targets, weight, row_weight, inputs.logit_offset, normalizer, self.options, class_weight
        ).loss
        saved_rows = predicted = None
        if self.return_stats:
            with torch.no_grad():
                primal = forward_ad.unpack_dual(self.logits).primal
                stripped = inputs._replace(row_weight=None)
                _, saved_rows, predicted = weighted_loss(primal, stripped, self.options, True, False, self.shard)
        return self._results((loss, saved_rows, predicted), inputs)


class LinearLossCall(_Call):
    """A loss of hidden states [..., H] under a classifier [V, H].

    vocab_size: as in LossCall.
    Raises TypeError or ValueError that names the first invalid input.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        *,
        row_weight: Tensor | None,
        normalizer: float | Tensor | None,
        options: LossOptions,
        return_stats: bool,
        max_chunk_bytes: int | None,
        accumulate: str,
        process_group: dist.ProcessGroup | None,
        vocab_size: int | None,
    ) -> None:
        is_cut = is_dtensor(weight)
        if is_cut:
            vocab_size = weight.shape[0]
            hidden, targets = replicated("hidden", hidden, weight), replicated("targets", targets, weight)
            if is_dtensor(bias):
                bias, _ = vocabulary_part("bias", bias, 0, process_group)
            weight, process_group = vocabulary_part("weight", weight, 0, process_group)
        _check_scores("hidden", hidden)
        _check_scores("weight", weight)
        _check_targets_dtype(targets)
        if weight.dim() != 2 or not 1 <= weight.shape[0] <= 2**30 or weight.shape[1] == 0:
            raise ValueError(f"weight: got shape {list(weight.shape)}, expected [V, H] with H >= 1 and 1 <= V <= 2^30")
        if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"hidden: got shape {list(hidden.shape)}, expected [..., {weight.shape[1]}]: weight is "
                f"{list(weight.shape)}"
            )
        if hidden.shape[:-1] != targets.shape:
            raise _targets_do_not_fit("hidden", hidden, targets, "the hidden size")
        if bias is not None:
            _check_scores("bias", bias)
            if bias.shape != weight.shape[:1]:
                rows = "this rank's rows of the classifier, or a DTensor" if is_cut else "the classifier's rows"
                raise ValueError(f"bias: got shape {list(bias.shape)}, expected [{weight.shape[0]}], {rows}")
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is None:
                continue
            if tensor.device != hidden.device:
                raise ValueError(f"{name}: got device {tensor.device}, expected {hidden.device}, where hidden is")
            # Autocast leaves float64 alone.
            cast = torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (tensor.dtype, hidden.dtype)
            if tensor.dtype != hidden.dtype and not cast:
                raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {hidden.dtype}, that of hidden")
        _check_rest("hidden is", hidden, targets, row_weight, normalizer, options)
        if _has_tangent(hidden, weight, bias, row_weight, normalizer):
            raise _no_forward_mode()
        refuse_transforms(weight, bias)
        if max_chunk_bytes is not None:
            max_chunk_bytes = check_integer("max_chunk_bytes", max_chunk_bytes, 1, 2**63 - 1, "None or an int > 0")
        check_choice("accumulate", accumulate, ACCUMULATE)
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        # A compiled graph may be captured as a CUDA graph, in which the host cannot wait for a count.
        drop_ignored = not torch.compiler.is_compiling()
        self.settings = Settings(dtype, max_chunk_bytes, accumulate == "float32", drop_ignored)
        shard, targets = VocabularyShard.for_rank(
            weight.shape[0], targets, process_group, options.ignore_index, vocab_size, hidden if is_cut else None
        )
        super().__init__(targets, row_weight, normalizer, options, return_stats, shard)
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.process_group = process_group

    def loss(self, token_weight: Tensor | None, logit_offset: Tensor | None) -> Tensor | tuple[Tensor, RowStats]:
        """The result of linear_pdl_loss; tables are already checked. Raises IndexError as LossCall does."""
        self._choose_options(token_weight)
        inputs = self._inputs(token_weight, logit_offset, accumulator_dtype(self.settings.dtype))
        # Before the first product, not when the chunk with the bad target is reached.
        self._check_ids()
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])
        of_rows = inputs._replace(targets=inputs.targets.reshape(-1))
        results = linear_weighted_loss(
            hidden, self.weight, self.bias, of_rows, self.options, self.return_stats, self.settings, self.shard
        )
        return self._results(results, inputs)


def _check_scores(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
    check_dense(name, tensor)
    if tensor.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected one of {names_of(LOGITS_DTYPES)}")


def _refuse_leaf(logits: Tensor) -> None:
    # PyTorch refuses in-place writes to both: they would overwrite a parameter with its gradient.
    base = logits._base
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        got = "a leaf" if logits.is_leaf else "a view of a leaf"
        raise RuntimeError(
            f"logits: got {got} that requires grad, expected a model's output: inplace_backward would overwrite it"
        )


def _check_targets_dtype(targets: Tensor) -> None:
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: got {type(targets).__name__}, expected a tensor")
    check_dense("targets", targets)
    if targets.dtype not in TARGET_DTYPES:
        raise TypeError(f"targets: got dtype {targets.dtype}, expected one of {names_of(TARGET_DTYPES)}")


def _targets_do_not_fit(name: str, scores: Tensor, targets: Tensor, last: str) -> ValueError:
    return ValueError(
        f"targets: got shape {list(targets.shape)}, expected {list(scores.shape[:-1])}: that of {name} "
        f"{list(scores.shape)} without {last}"
    )


def _check_rest(
    there: str,
    scores: Tensor,
    targets: Tensor,
    row_weight: Tensor | None,
    normalizer: float | Tensor | None,
    options: LossOptions,
) -> None:
    if scores.device != targets.device:
        raise ValueError(f"targets: got device {targets.device}, expected {scores.device}, where {there}")
    if options.shift and targets.dim() == 0:
        raise ValueError("shift: got True with targets of shape [], expected a sequence dimension")
    if row_weight is not None:
        _check_row_weight(row_weight, targets)
    refuse_transforms(scores, targets, row_weight, normalizer if isinstance(normalizer, Tensor) else None)
    if normalizer is not None:
        _check_normalizer(normalizer, targets, options.reduction)


def _has_tangent(*values: Tensor | float | None) -> bool:
    # For an op without a forward-mode formula PyTorch would drop the tangent, and return a derivative of zero.
    if getattr(forward_ad, "_current_level", -1) < 0:
        return False
    if torch.compiler.is_compiling():
        # The fake tensors of a compiler have no tangent.
        return True
    tensors = (value for value in values if isinstance(value, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _no_forward_mode() -> RuntimeError:
    return RuntimeError(
        "pdl_ext: the fused loss has no forward-mode derivative in chunks, of a shard or under a tracer: use "
        "functional.pdl_loss without process_group and torch.compile, or pdl_ext.reference"
    )


def _check_table(name: str, table: Tensor, vocab_size: int, device: torch.device) -> None:
    if not isinstance(table, Tensor):
        raise TypeError(f"{name}: got {type(table).__name__}, expected a tensor or None")
    check_dense(name, table)
    refuse_transforms(table)
    if table.dtype != torch.float32:
        raise TypeError(f"{name}: got dtype {table.dtype}, expected float32 whatever the logits' dtype is")
    if table.shape != (vocab_size,):
        raise ValueError(f"{name}: got shape {list(table.shape)}, expected [{vocab_size}], the logits' vocabulary")
    if table.device != device:
        raise ValueError(f"{name}: got device {table.device}, expected {device}, where the logits are")
    if table.requires_grad or _has_tangent(table):
        got = "requires grad" if table.requires_grad else "has a tangent"
        raise ValueError(f"{name}: got a tensor that {got}, expected one that does not: only row_weight may have one")


def _check_row_weight(row_weight: Tensor, targets: Tensor) -> None:
    if not isinstance(row_weight, Tensor):
        raise TypeError(f"row_weight: got {type(row_weight).__name__}, expected a tensor or None")
    check_dense("row_weight", row_weight)
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
        check_dense("normalizer", normalizer)
        if normalizer.dim() != 0 or normalizer.device != targets.device or normalizer.requires_grad:
            raise ValueError(
                f"normalizer: got shape {list(normalizer.shape)} on {normalizer.device}"
                f"{', requiring grad' if normalizer.requires_grad else ''}, expected a 0-d tensor on {targets.device} "
                "that does not require grad"
            )
    elif not isinstance(normalizer, (torch.SymInt, torch.SymFloat)):
        check_number("normalizer", normalizer, 0, MAX, "a finite number >= 0 or a 0-d tensor")
