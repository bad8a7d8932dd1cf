"""The loss as a module: it owns the frequency and the weights computed from it."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Unpack

from pdl_ext._checks import check_exponent, check_integer, check_number, default_device, is_traced, not_scriptable
from pdl_ext._lock import Exclusion
from pdl_ext._token_weights import TokenWeights, blend_state
from pdl_ext.counts import check_count_values, log_probabilities
from pdl_ext.engine.autograd import LastUpstream
from pdl_ext.engine.call import LinearLossCall, LossCall, RowStats
from pdl_ext.frequency import TokenFrequency
from pdl_ext.options import (
    DEFAULTS,
    LossKeywords,
    LossOptions,
    OptionsAsAttributes,
    check_keywords,
    spells_out_options,
)
from pdl_ext.weighting import PowerLaw, Weighting
from pdl_ext.weighting.base import check_blend, check_fixed, check_weighting

__all__ = ["PDLLoss"]

_beginning = Exclusion()


@not_scriptable
class PDLLoss(OptionsAsAttributes, nn.Module):
    """Cross-entropy in which each target is weighted by (frequency + epsilon) ** -alpha.

    Args:
        frequency: a TokenFrequency, its int64 [V] counts, or the path of a counts file. None learns it online: in
            training mode each call first counts its targets and then weights them, so that no target is unseen. In eval
            mode nothing is counted.
        alpha, epsilon: shorthand for `weighting=PowerLaw(alpha, epsilon)`. The default alpha is the paper's; begin
            with 0.25 (docs/alpha.md).
        weighting: PowerLaw with its further options, or another class of `pdl_ext.weighting`. With one that needs no
            counts, such as Uniform, nothing is learned.
        logit_adjustment: the factor of log f, which is added to the logits, also in eval mode. The smoothed frequency
            f = (n + 1) / (N + V) comes from the loss's own counts, whatever the weighting. 1 is balanced softmax (arXiv
            2007.07314).
        weight_drop: the share of rows, from 0 to 1, whose token weight is replaced by 1 (arXiv 2010.04380). Each call
            in training mode draws the rows anew, with PyTorch's generator on the targets' device. It cannot be combined
            with label_smoothing_weight="class": set later, that raises at the next training call.
        vocab_size: V of an online loss. Without it V is taken from the first logits.
        sync_every: k, for an online loss on several ranks of torch.distributed. After counting, and before weighting,
            each k-th call in training mode adds the other ranks' counts since then (`TokenFrequency.sync`). The weights
            are then the same on all ranks. All ranks must make equally many calls. With None each rank counts for
            itself, and the first one warns once. Without a process group it has no effect.
        inplace_backward, and the options of a loss: as in `functional.pdl_loss`. The options are also attributes, which
            may be set during training; a wrong value raises at once.

    In training mode a call also computes the gradient, as `functional.pdl_loss` does. It uses the most recent upstream
    gradient: a loss scale or a division by accumulated batches stays the same from step to step. In eval mode backward
    computes the gradient.

    The weights of a given frequency are kept until its counts, `blend` or `weighting` change. PyTorch's count of writes
    detects such a change. It misses writes by `.data`, NumPy or a collective of gloo: call `refresh` after one. Call it
    also before a CUDA graph is replayed on other counts. Compiled graphs compute the weights in each call.

    `state_dict` holds the counts and `blend`. `load_state_dict` also restores them into an online loss that has seen no
    logits yet. Loaders that write in place, such as torch.distributed.checkpoint and from_pretrained, need
    `vocab_size`.

    Raises TypeError or ValueError that names the argument. A call raises ValueError if the counts are uninitialised
    memory, and warns if they do not add up to `TokenFrequency.seen`. `state_dict` raises ValueError for an online
    loss without vocab_size that has seen no logits.
    Source: arXiv 2505.16900, the loss L = -sum w(y) log p(y) with w(t) = 1 / (freq(t) + eps) ** alpha.
    """

    frequency: TokenFrequency | None
    _blend: Tensor

    @spells_out_options
    def __init__(
        self,
        frequency: TokenFrequency | Tensor | str | os.PathLike[str] | None = None,
        *,
        alpha: float = 1.0,
        epsilon: float = 1e-7,
        weighting: Weighting | None = None,
        weight_drop: float = 0.0,
        logit_adjustment: float = 0.0,
        inplace_backward: bool = False,
        vocab_size: int | None = None,
        sync_every: int | None = None,
        **options: Unpack[LossKeywords],
    ) -> None:
        super().__init__()
        self._options = LossOptions.of("PDLLoss", options)
        if weighting is None:
            weighting = PowerLaw(alpha=alpha, epsilon=epsilon)
        elif not (alpha == 1.0 and epsilon == 1e-7):
            raise ValueError(
                "weighting: got one together with alpha or epsilon, expected either: they are PowerLaw's shorthand"
            )
        check_weighting(weighting)
        self.weighting = weighting
        self.weight_drop = weight_drop
        self.logit_adjustment = logit_adjustment
        self.inplace_backward = inplace_backward
        self._is_given = frequency is not None
        if sync_every is not None:
            sync_every = check_integer("sync_every", sync_every, 1, 2**31 - 1, "None or an int from 1 to 2^31 - 1")
            if not self.online:
                given = "a given frequency" if frequency is not None else f"weighting={weighting}"
                raise ValueError(
                    f"sync_every: got {sync_every} with {given}, expected None: only an online loss counts"
                )
        self.sync_every = sync_every
        self._calls_since_sync = 0
        self._told_of_ranks = False
        self._last_upstream = LastUpstream()

        if isinstance(frequency, (str, os.PathLike)):
            frequency = TokenFrequency.load(frequency)
        elif isinstance(frequency, Tensor):
            frequency = TokenFrequency.from_counts(frequency)
        elif frequency is not None and not isinstance(frequency, TokenFrequency):
            raise TypeError(
                f"frequency: got {type(frequency).__name__}, expected TokenFrequency, int64 counts, a path or None"
            )
        if frequency is None and vocab_size is not None:
            frequency = self._new_frequency(vocab_size)
        if frequency is not None and vocab_size not in (None, frequency.vocab_size):
            raise ValueError(f"vocab_size: got {vocab_size}, expected {frequency.vocab_size}, the frequency's")

        self.frequency = frequency
        self._weights = TokenWeights(self.weighting.blend)
        # Whether the given frequency is not empty. Memory that was never written, mostly 0, cannot show this later.
        self._holds_tokens = (
            frequency is not None and not frequency.counts.is_meta and not is_traced() and frequency.total > 0
        )
        device = default_device() if frequency is None else frequency.counts.device
        self.register_buffer("_blend", blend_state(weighting.blend, device))
        if frequency is not None:
            check_fixed(weighting.fixed, frequency.vocab_size)
        self.register_load_state_dict_post_hook(_refresh_after_load)

    @property
    def online(self) -> bool:
        """Whether the loss counts the targets that it trains on."""
        return not self._is_given and (self.weighting.needs_counts or self._logit_adjustment != 0)

    @property
    def weight_drop(self) -> float:
        """The share of rows whose token weight is 1 in training. May be set during training."""
        return self._weight_drop

    @weight_drop.setter
    def weight_drop(self, value: float) -> None:
        value = check_number("weight_drop", value, 0, 1, "a number from 0 to 1")
        if value > 0 and self._options.smooths_by_class:
            raise _no_drop_by_class(value)
        self._weight_drop = value

    @property
    def logit_adjustment(self) -> float:
        """The factor of log f that is added to the logits. May be set during training."""
        return self._logit_adjustment

    @logit_adjustment.setter
    def logit_adjustment(self, value: float) -> None:
        self._logit_adjustment = check_exponent("logit_adjustment", value)

    @property
    def blend(self) -> float:
        """The factor of w - 1 in the weights, from 0 to 1; 0 is plain cross-entropy. May be set during training."""
        return self._weights.blend_of(self._blend)

    @blend.setter
    def blend(self, value: float) -> None:
        self._weights.set_blend(self._blend, check_blend(value))
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Computes the tables of a given frequency again, in place; an online loss does so at every call.

        It is needed only after a write that PyTorch does not detect, or before a CUDA graph is replayed.
        """
        self._weights.forget()
        frequency = self.frequency
        if frequency is not None and not self.online and not frequency.counts.is_meta:
            self._weights.kept(frequency.counts, self._blend, self.weighting)
            if self.logit_adjustment != 0:
                self._weights.offset(frequency.counts, self.logit_adjustment)

    @spells_out_options
    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        logit_offset: Tensor | None = None,
        return_stats: bool = False,
        process_group: dist.ProcessGroup | None = None,
        **options: Unpack[LossKeywords],
    ) -> Tensor | tuple[Tensor, RowStats]:
        """The loss of logits [..., V] and targets [...]; arguments, result and errors as in `functional.pdl_loss`.

        options: for this call only, instead of the loss's own. `ignore_index` is not allowed: counts depend on it.
        """
        # All errors are raised before an online loss counts its targets.
        call = LossCall(
            logits,
            targets,
            row_weight=row_weight,
            normalizer=normalizer,
            options=self._options_of_call(options),
            return_stats=return_stats,
            process_group=process_group,
            vocab_size=self._vocab_size(),
            inplace_backward=self.inplace_backward,
            at_once=self.training,
            last=self._last_upstream,
        )
        return self._loss("logits", call, logit_offset)

    @spells_out_options
    def linear(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        logit_offset: Tensor | None = None,
        return_stats: bool = False,
        max_chunk_bytes: int | None = None,
        accumulate: str = "float32",
        process_group: dist.ProcessGroup | None = None,
        **options: Unpack[LossKeywords],
    ) -> Tensor | tuple[Tensor, RowStats]:
        """The loss of hidden states [..., H] under a classifier [V, H], without all logits [..., V] in memory.

        Arguments, result and errors as in `functional.linear_pdl_loss`; `inplace_backward` has no effect here.
        options: as in forward.
        """
        call = LinearLossCall(
            hidden,
            weight,
            bias,
            targets,
            row_weight=row_weight,
            normalizer=normalizer,
            options=self._options_of_call(options),
            return_stats=return_stats,
            max_chunk_bytes=max_chunk_bytes,
            accumulate=accumulate,
            process_group=process_group,
            vocab_size=self._vocab_size(),
        )
        return self._loss("weight", call, logit_offset)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of the first builds of 0.1.0 have each option as an attribute.
        given = {name: state[name] for name in DEFAULTS.keys() & state.keys()}
        kept = {name: value for name, value in state.items() if name not in given}
        kept.setdefault("_last_upstream", LastUpstream())
        if "online" in kept:
            kept |= {"_is_given": not kept.pop("online"), "_weight_drop": 0.0, "_logit_adjustment": 0.0}
        super().__setstate__({"_options": LossOptions(**given), **kept})

    def extra_repr(self) -> str:
        options = self._options
        told = f"{self.weighting}, reduction={options.reduction!r}, online={self.online}, shift={options.shift}"
        for name in ("modulation", "weight_drop", "logit_adjustment"):
            if value := getattr(self, name):
                told += f", {name}={value}"
        return told

    def _options_of_call(self, given: LossKeywords) -> LossOptions:
        if not given:
            return self._options
        check_keywords("PDLLoss", given)
        if "ignore_index" in given:
            raise TypeError("ignore_index: got one in a call, expected none: pass it to PDLLoss, which counts by it")
        return dataclasses.replace(self._options, **given)

    def _loss(
        self, name: str, call: LossCall | LinearLossCall, logit_offset: Tensor | None
    ) -> Tensor | tuple[Tensor, RowStats]:
        self._check_state(call.process_group)
        # Before an online loss counts.
        call.check_tables(None, logit_offset)
        if self.training and self._weight_drop > 0 and call.options.smooths_by_class:
            raise _no_drop_by_class(self._weight_drop)
        weights = self._current_weights(name, call)
        if weights is not None and self.training and self._weight_drop > 0:
            call.drop_weights(weights, self._weight_drop)
            weights = None
        elif weights is not None and call.options.smooths_by_class and not self.online:
            # A copy: backward needs the weights, and the kept table may be overwritten before.
            weights = weights.clone()
        if self._logit_adjustment != 0:
            adjustment = self._log_frequency()
            logit_offset = adjustment if logit_offset is None else adjustment + logit_offset
        return call.loss(weights, logit_offset)

    def _vocab_size(self) -> int | None:
        frequency = cast("TokenFrequency | None", self._modules.get("frequency"))
        return None if frequency is None else frequency.table.counts.shape[0]

    def _log_frequency(self) -> Tensor:
        """The offset of the logits, in memory that nothing overwrites before backward needs it."""
        counts = cast("TokenFrequency", self.frequency).table.counts
        if self.online or is_traced():
            return self.logit_adjustment * log_probabilities(counts)
        return self._weights.offset(counts, self.logit_adjustment).clone()

    def _current_weights(self, name: str, call: LossCall | LinearLossCall) -> Tensor | None:
        """The table of weights, or None for ones."""
        # Not by attribute, for which nn.Module takes a microsecond.
        frequency = cast("TokenFrequency | None", self._modules.get("frequency"))
        if frequency is None and not self.online:
            return None if self.weighting.is_one() else self._weights_without_counts(call)
        if frequency is None:
            # If several threads begin at once, one creates the frequency and the others count into it.
            with _beginning.lock:
                return self._learned_weights(self.frequency, name, call)
        kept, counts = self._weights, frequency.table.counts
        traced = is_traced()
        if not traced and not kept.are_checked(counts):
            self._check_counts(frequency)
        if self.online:
            return self._learned_weights(frequency, name, call)
        _check_vocabulary(name, call, counts)
        if self.weighting.is_one():
            return None
        of_counts = kept.fresh if traced else kept.kept
        # Not by attribute either.
        return of_counts(counts, cast("Tensor", self._buffers["_blend"]), self.weighting)

    def _weights_without_counts(self, call: LossCall | LinearLossCall) -> Tensor:
        counts = torch.zeros(call.shard.vocab_size, dtype=torch.int64, device=call.targets.device)
        return self._weights.fresh(counts, self._blend, self.weighting)

    def _learned_weights(
        self, frequency: TokenFrequency | None, name: str, call: LossCall | LinearLossCall
    ) -> Tensor | None:
        is_new, device = frequency is None, call.targets.device
        if frequency is None:
            frequency = self._new_frequency(call.shard.vocab_size).to(device)
        counts = frequency.table.counts
        _check_vocabulary(name, call, counts)
        check_fixed(self.weighting.fixed, call.shard.vocab_size)
        if self.training:
            try:
                frequency.update(call.learned_targets(), strict=device.type == "cpu")
            except IndexError:
                raise call.bad_target() from None
        if is_new:
            # A validation pass under inference_mode may come first; training must be able to use its buffers.
            with torch.inference_mode(False):
                self._blend = self._blend.to(device)
            self.frequency = frequency
        if self.training and self.sync_every is not None:
            from pdl_ext._outside_graphs import call_outside

            call_outside(PDLLoss._sync_if_due, self, frequency)
        if self.weighting.is_one():
            return None
        return self._weights.fresh(counts, cast("Tensor", self._buffers["_blend"]), self.weighting)

    def _check_state(self, process_group: dist.ProcessGroup | None) -> None:
        """Raises ValueError, or warns, for problems that do not depend on a call's inputs."""
        if process_group is not None and self.sync_every is not None:
            raise ValueError(
                "process_group: got one with sync_every, expected either: its ranks count the same targets, so call "
                "`frequency.sync` with a group of ranks whose targets differ"
            )
        if torch.compiler.is_compiling():
            from pdl_ext._outside_graphs import mark_called_while_traced

            mark_called_while_traced(PDLLoss._check_while_traced)
            self._check_while_traced(process_group is not None)
            return
        if self.online and self.training and self.sync_every is None and not self._told_of_ranks:
            self._tell_of_ranks(process_group)

    def _check_while_traced(self, of_shard: bool) -> bool:
        if self.frequency is not None:
            self._check_counts(self.frequency)
        if type(self._blend) is Tensor:
            # This restores the blend if it was lost.
            self._weights.blend_of(self._blend)
        if self.online and self.training and self.sync_every is None and not of_shard:
            self._tell_of_ranks(None)
        return True

    def _sync_if_due(self, frequency: TokenFrequency) -> None:
        with frequency.lock:
            self._calls_since_sync += 1
            if self._calls_since_sync == self.sync_every:
                self._calls_since_sync = 0
                frequency.sync()

    def _check_counts(self, frequency: TokenFrequency) -> None:
        # Once for each tensor of counts, since it waits for the device. Loading in place and counting keep the tensor.
        counts = frequency.counts
        # A tracer's tensors have no numbers.
        if (
            type(counts) is not Tensor
            or counts.is_meta
            or (counts.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            return
        lost = "to_empty and from_pretrained lose counts that they do not load: load them, or make the loss afterwards"
        # Between two updates of other threads.
        with frequency.lock:
            try:
                check_count_values("frequency", counts)
            except ValueError as error:
                raise ValueError(f"{error}. {lost}") from None
            if self._holds_tokens and not frequency.total:
                raise ValueError(f"frequency: got no token, expected those given to the loss. {lost}")
            try:
                frequency.check_conserved("frequency", with_files=False)
            except ValueError as error:
                # An average of a model's buffers breaks the law, too, but is still useful.
                warnings.warn(f"{error}. {lost}", stacklevel=6)
        self._weights.check(counts)

    def _tell_of_ranks(self, process_group: dist.ProcessGroup | None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            return
        # The ranks of a sharded vocabulary count the same targets.
        ranks = dist.get_world_size() // (1 if process_group is None else dist.get_world_size(process_group))
        if ranks > 1:
            self._told_of_ranks = True
            if dist.get_rank() == 0:
                warnings.warn(
                    f"PDLLoss: learns the frequencies online on {ranks} ranks, each from its own targets, so that "
                    "their weights differ. Pass sync_every=k for counts of all ranks, or count ahead and pass the "
                    "frequency. Ignore this warning if each rank is to learn for itself",
                    stacklevel=7,
                )

    def _new_frequency(self, vocab_size: int) -> TokenFrequency:
        frequency = TokenFrequency(vocab_size, ignore_index=self._options.ignore_index)
        if self.sync_every is not None:
            # From the first count on, since counting comes before the first sync.
            frequency.track_own()
        return frequency

    def _replicate_for_data_parallel(self) -> PDLLoss:
        replica = super()._replicate_for_data_parallel()
        # The replica is on another device, and exists for one call.
        replica._weights = copy.copy(self._weights)
        return replica

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.frequency is None and self.online:
            raise ValueError(
                f"vocab_size: got none for {prefix.removesuffix('.') or 'a loss'}, which learns online and has seen no "
                "logits, expected PDLLoss(vocab_size=...). Loaders such as "
                "torch.distributed.checkpoint and from_pretrained read its state first, and would leave out the counts"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        counts = state_dict.get(f"{prefix}frequency.counts")
        if counts is not None:
            self._holds_tokens = False
            if self.frequency is None:
                self.frequency = self._new_frequency(counts.shape[0]).to(self._blend.device)
        blend = state_dict.get(f"{prefix}_blend")
        if blend is not None and blend.is_floating_point() and not blend.is_meta:
            # The blend was once saved as a floating-point number.
            state = blend_state(check_blend(float(blend)), blend.device)
            state_dict = {**state_dict, f"{prefix}_blend": state}
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_vocabulary(name: str, call: LossCall | LinearLossCall, counts: Tensor) -> None:
    vocab_size, device = call.shard.vocab_size, call.targets.device
    if vocab_size != counts.shape[0]:
        raise ValueError(f"{name}: got a vocabulary of {vocab_size}, expected {counts.shape[0]}, the frequency's")
    if device != counts.device:
        remedy = "load its counts" if counts.is_meta else "move the loss with .to()"
        raise ValueError(f"{name}: got device {device}, expected {counts.device}, where the frequency is: {remedy}")


def _no_drop_by_class(weight_drop: float) -> ValueError:
    return ValueError(
        f'weight_drop: got {weight_drop} with label_smoothing_weight="class", expected 0: a target cannot weigh 1 '
        "while its class weighs otherwise"
    )


# At module level, so that the loss can be pickled.
def _refresh_after_load(loss: PDLLoss, _: Any) -> None:
    # After loading, all ranks count their calls from 0 again.
    loss._calls_since_sync = 0
    loss.refresh()
