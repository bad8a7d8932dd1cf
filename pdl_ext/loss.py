"""The loss as a module: it owns the frequency and the weights that follow from it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pdl_ext import functional
from pdl_ext._checks import check_integer
from pdl_ext._lock import Exclusion
from pdl_ext._loss_inputs import LossOptions, bad_target, check_linear_inputs, check_loss_inputs
from pdl_ext._vocabulary import VocabularySlice
from pdl_ext.frequency import TokenFrequency
from pdl_ext.functional import RowStats
from pdl_ext.weighting import PowerLaw, check_blend

__all__ = ["PDLLoss"]

_beginning = Exclusion()


class PDLLoss(nn.Module):
    """Cross-entropy in which each target weighs (frequency + epsilon) ** -alpha.

    Args:
        frequency: a TokenFrequency, its int64 [V] counts, or the path of a counts file. None learns it online: in
            training mode each call first counts its targets and then weighs them, so that a target is never unseen;
            in eval mode nothing is counted.
        alpha, epsilon: shorthand for `weighting=PowerLaw(alpha, epsilon)`.
        weighting: PowerLaw with everything else that it can do.
        vocab_size: V of an online loss; without it V is that of the first logits.
        sync_every: k of an online loss on several ranks of torch.distributed: each k-th call in training mode, after
            counting and before weighing, adds what the other ranks have counted since (`TokenFrequency.sync`), so that
            the weights are then the same on all ranks. All ranks must make equally many calls. None: each rank counts
            for itself. Without a process group it changes nothing.
        reduction, ignore_index, shift, label_smoothing, z_loss, softcap, logit_scale, inplace_backward: as in
            `functional.pdl_loss`.

    With a given frequency the weights are computed once; after changing it call `refresh`. `state_dict` holds the
    counts and `blend`, and restores them also into a loss that has seen no logits yet.

    Raises TypeError or ValueError that names the argument.
    Source: arXiv 2505.16900, the loss L = -sum w(y) log p(y) with w(t) = 1 / (freq(t) + eps) ** alpha.
    """

    frequency: TokenFrequency | None
    _blend: Tensor
    _token_weight: Tensor | None
    _fixed: Tensor | None

    def __init__(
        self,
        frequency: TokenFrequency | Tensor | str | os.PathLike[str] | None = None,
        *,
        alpha: float = 1.0,
        epsilon: float = 1e-7,
        weighting: PowerLaw | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        shift: bool = False,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        inplace_backward: bool = False,
        vocab_size: int | None = None,
        sync_every: int | None = None,
    ) -> None:
        super().__init__()
        LossOptions(reduction, ignore_index, shift, label_smoothing, z_loss, softcap, logit_scale).check()
        if weighting is None:
            weighting = PowerLaw(alpha=alpha, epsilon=epsilon)
        elif not isinstance(weighting, PowerLaw):
            raise TypeError(f"weighting: got {type(weighting).__name__}, expected PowerLaw")
        elif (alpha, epsilon) != (1.0, 1e-7):
            raise ValueError(
                "weighting: got one together with alpha or epsilon, expected either: they are its shorthand"
            )
        self.weighting = weighting
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.shift = shift
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.inplace_backward = inplace_backward
        self.online = frequency is None
        if sync_every is not None:
            check_integer("sync_every", sync_every, 1, 2**31 - 1, "None or an int in [1, 2^31)")
            if frequency is not None:
                raise ValueError(
                    f"sync_every: got {sync_every} with a given frequency, expected None: only an online loss counts"
                )
        self.sync_every = sync_every
        self._calls_since_sync = 0

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

        self.frequency = None
        device = None if frequency is None else frequency.counts.device
        self.register_buffer("_blend", torch.tensor(weighting.blend, dtype=torch.float32, device=device))
        self.register_buffer("_token_weight", None, persistent=False)
        self.register_buffer("_fixed", None, persistent=False)
        if frequency is not None:
            self._take_frequency(frequency)
        self.register_load_state_dict_post_hook(_refresh_after_load)

    @property
    def blend(self) -> float:
        """How far the weights are from 1, in [0, 1]; 0 is plain cross-entropy. May be set while training."""
        return float(self._blend)

    @blend.setter
    def blend(self, value: float) -> None:
        check_blend(value)
        self._blend.fill_(value)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Computes the weights of a given frequency again, in place; an online loss does so at every call."""
        if self._token_weight is not None:
            self._token_weight.copy_(self._weights())

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        return_stats: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """The loss of logits [..., V] and targets [...]; arguments, result and errors as in `functional.pdl_loss`."""
        self._check_process_group(process_group)
        options = self._options()
        # Everything that can be refused is refused before an online loss counts its targets.
        check_loss_inputs(logits, targets, row_weight, normalizer, options)
        part = VocabularySlice.of_rank(logits.shape[-1], logits.device, process_group)
        weights = self._current_weights("logits", part.vocab_size, logits.device, targets)
        return functional.loss_of_checked(
            logits, targets, weights, row_weight, normalizer, None, options, part, self.inplace_backward, return_stats
        )

    def linear(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        return_stats: bool = False,
        max_chunk_bytes: int | None = None,
        accumulate: str = "float32",
        process_group: dist.ProcessGroup | None = None,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """The loss of hidden states [..., H] under a classifier [V, H], without their logits [..., V] in memory.

        Arguments, result and errors as in `functional.linear_pdl_loss`; `inplace_backward` has no meaning here.
        """
        self._check_process_group(process_group)
        options = self._options()
        check_linear_inputs(hidden, weight, bias, targets, row_weight, normalizer, options)
        settings = functional.linear_settings(hidden, max_chunk_bytes, accumulate)
        part = VocabularySlice.of_rank(weight.shape[0], hidden.device, process_group)
        weights = self._current_weights("weight", part.vocab_size, hidden.device, targets)
        return functional.linear_loss_of_checked(
            hidden, weight, bias, targets, weights, row_weight, normalizer, None, options, part, settings, return_stats
        )

    def _check_process_group(self, process_group: dist.ProcessGroup | None) -> None:
        if process_group is not None and self.sync_every is not None:
            raise ValueError(
                "process_group: got one with sync_every, expected either: its ranks count the same targets, so call "
                "`frequency.sync` with a group of ranks whose targets differ"
            )

    def _options(self) -> LossOptions:
        return LossOptions(
            self.reduction,
            self.ignore_index,
            self.shift,
            self.label_smoothing,
            self.z_loss,
            self.softcap,
            self.logit_scale,
        )

    def extra_repr(self) -> str:
        return f"{self.weighting}, reduction={self.reduction!r}, online={self.online}, shift={self.shift}"

    def _current_weights(self, name: str, vocab_size: int, device: torch.device, targets: Tensor) -> Tensor:
        # Not as attributes, which nn.Module looks up in a microsecond each.
        buffers = self._buffers
        weights = buffers["_token_weight"]
        if weights is not None:
            _check_vocabulary(name, vocab_size, device, weights)
            return weights
        frequency = self.frequency
        if frequency is None:
            # Of threads that begin at the same time one makes the frequency, in which the others count.
            with _beginning.lock:
                return self._learned_weights(self.frequency, name, vocab_size, device, targets)
        return self._learned_weights(frequency, name, vocab_size, device, targets)

    def _learned_weights(
        self, frequency: TokenFrequency | None, name: str, vocab_size: int, device: torch.device, targets: Tensor
    ) -> Tensor:
        buffers = self._buffers
        is_new = frequency is None
        if frequency is None:
            # A validation pass under inference_mode may come first, and training must be able to go on from it.
            with torch.inference_mode(False):
                frequency = self._new_frequency(vocab_size).to(device)
        counts = frequency._totals()[0]
        _check_vocabulary(name, vocab_size, device, counts)
        if self.training:
            learned = targets[..., 1:] if self.shift else targets
            try:
                frequency.update(learned, strict=device.type == "cpu")
            except IndexError:
                raise bad_target(targets, vocab_size, self.ignore_index, self.shift) from None
        if is_new:
            with torch.inference_mode(False):
                self._blend = self._blend.to(device)
                self._take_frequency(frequency)
        if self.training and self.sync_every is not None:
            from pdl_ext._sync_due import sync_if_due

            sync_if_due(self, frequency)
        return functional.weights_with_fixed(counts, self.weighting, buffers["_blend"], buffers["_fixed"])

    def _new_frequency(self, vocab_size: int) -> TokenFrequency:
        frequency = TokenFrequency(vocab_size, ignore_index=self.ignore_index)
        if self.sync_every is not None:
            # From the first count on, which comes before the first sync.
            frequency._track()
        return frequency

    def _weights(self) -> Tensor:
        assert self.frequency is not None
        return functional.weights_with_fixed(self.frequency.counts, self.weighting, self._blend, self._fixed)

    def _take_frequency(self, frequency: TokenFrequency) -> None:
        self.frequency = frequency
        self._fixed = functional.fixed_table(self.weighting, frequency.counts)
        if not self.online:
            self._token_weight = self._weights()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PDLLoss:
        # .half() and .to(dtype) are about the model: weights stay float32, or the loss would change with them.
        kept = {name: self._buffers[name] for name in ("_blend", "_token_weight", "_fixed")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        counts = state_dict.get(f"{prefix}frequency.counts")
        if self.frequency is None and counts is not None:
            self._take_frequency(self._new_frequency(counts.shape[0]).to(self._blend.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_vocabulary(name: str, vocab_size: int, device: torch.device, table: Tensor) -> None:
    if vocab_size != table.shape[0]:
        raise ValueError(f"{name}: got a vocabulary of {vocab_size}, expected {table.shape[0]}, the frequency's")
    if device != table.device:
        raise ValueError(f"{name}: got device {device}, expected {table.device}: move the loss with .to()")


# At module level, so that the loss can be pickled.
def _refresh_after_load(loss: PDLLoss, _: Any) -> None:
    # Whenever ranks load, they go on in step.
    loss._calls_since_sync = 0
    if loss.frequency is not None:
        loss._fixed = functional.fixed_table(loss.weighting, loss.frequency.counts)
    loss.refresh()
