"""The tables that a loss computes from counts, kept until one of their inputs changes.

They are not buffers: code that saves, casts, shards or initialises a model's buffers would treat them as state.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from pdl_ext._checks import is_traced
from pdl_ext.counts import log_probabilities
from pdl_ext.weighting import Weighting
from pdl_ext.weighting.base import fixed_table

__all__ = ["TokenWeights", "blend_state"]

# The encoding of a blend as an integer: -(_ZERO + blend * _ONE). For most blends it keeps all digits of float64.
_ZERO, _ONE = 2**40, 2**60


def blend_state(blend: float, device: torch.device) -> Tensor:
    """A blend as a buffer: 0-d int64, a negative number that is linear in the blend.

    Code that casts a model's floating buffers, such as FSDP's buffer_dtype and .half(), leaves integers alone. Memory
    that was never written, mostly 0, is not a valid encoding. The average of several encodings is the encoding of the
    average.
    """
    # It may be made under inference mode and set outside of it.
    with torch.inference_mode(False):
        return torch.tensor(_encoded(blend), dtype=torch.int64, device=device)


def _encoded(blend: float) -> int:
    return -(_ZERO + round(blend * _ONE))


def _mix(state: Tensor) -> Tensor:
    """The blend in the form that the op takes, on the state's device."""
    # The rounding of an average may exceed the ends.
    return ((-state - _ZERO).to(torch.float64) / _ONE).clamp(0.0, 1.0).to(torch.float32)


class _Source(NamedTuple):
    """A tensor that something was computed from, and its version (PyTorch's count of the writes to it)."""

    tensor: weakref.ref[Tensor]
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Source | None:
        """None for a tensor of inference mode, which has no version."""
        return None if tensor.is_inference() else cls(weakref.ref(tensor), tensor._version)

    def is_current(self, tensor: Tensor) -> bool:
        return self.tensor() is tensor and self.version == tensor._version


class _Settings(NamedTuple):
    """The op's arguments besides the counts, and their sources."""

    mix: Tensor
    fixed: Tensor | None
    state: _Source | None
    weighting: Weighting
    vocab_size: int


class TokenWeights:
    """Weights of counts under a weighting and a blend, for one module on one device.

    They are computed in place where possible, so that a captured CUDA graph reads the new ones. A copy or a pickle
    keeps only the blend.
    """

    def __init__(self, blend: float) -> None:
        # The value that replaces a state which turns out to be memory that was never written.
        self._blend = blend
        # The counts that were checked.
        self._checked: weakref.ref[Tensor] | None = None
        self._settings: _Settings | None = None
        # The weights of counts under settings.
        self._kept: tuple[_Source | None, _Settings, Tensor] | None = None
        # The offset of counts under an adjustment.
        self._kept_offset: tuple[_Source | None, float, Tensor] | None = None

    def __reduce__(self) -> tuple[type[TokenWeights], tuple[float]]:
        return TokenWeights, (self._blend,)

    def are_checked(self, counts: Tensor) -> bool:
        """Whether `check` was called with this tensor."""
        return self._checked is not None and self._checked() is counts

    def check(self, counts: Tensor) -> None:
        """Records that a tensor of counts has passed its check."""
        self._checked = weakref.ref(counts)

    def blend_of(self, state: Tensor) -> float:
        """The blend in a state. An invalid state gets its blend back. Waits for the device."""
        if state.is_meta:
            return self._blend
        found = int(state)
        if found != _encoded(self._blend):
            if _encoded(1.0) <= found <= _encoded(0.0):
                self._blend = (-found - _ZERO) / _ONE
            else:
                self.set_blend(state, self._blend)
        return self._blend

    def set_blend(self, state: Tensor, blend: float) -> None:
        """Writes a blend to a state."""
        self._blend = blend
        with torch.no_grad():
            state.fill_(_encoded(blend))

    def forget(self) -> None:
        """Makes the next call compute everything again."""
        if self._settings is not None:
            self._settings = self._settings._replace(state=None)
        if self._kept_offset is not None:
            self._kept_offset = None, *self._kept_offset[1:]

    def kept(self, counts: Tensor, state: Tensor, weighting: Weighting) -> Tensor:
        """The weights [V] of counts; those of the last call if nothing has changed since."""
        settings = self._current_settings(counts, state, weighting)
        if self._kept is not None:
            source, of_settings, weights = self._kept
            # FSDP moves a buffer to another device without a new tensor; the settings detect that.
            if source is not None and source.is_current(counts) and of_settings is settings:
                return weights
        # The weights may be needed outside of inference mode, too.
        with torch.inference_mode(False), torch.no_grad():
            computed = weighting.table(counts, settings.mix, settings.fixed)
            weights = computed if self._kept is None else _in_place(self._kept[2], computed)
        self._kept = _Source.of(counts), settings, weights
        return weights

    def fresh(self, counts: Tensor, state: Tensor, weighting: Weighting) -> Tensor:
        """The weights [V] of counts, computed in this call, which may be traced into a graph."""
        if is_traced():
            mix, fixed = _mix(state), fixed_table(weighting.fixed, counts)
        else:
            mix, fixed, *_ = self._current_settings(counts, state, weighting)
        return weighting.table(counts, mix, fixed)

    def offset(self, counts: Tensor, adjustment: float) -> Tensor:
        """adjustment * log f, float32 [V] of counts; that of the last call if nothing has changed since."""
        old = self._kept_offset
        if old is not None:
            source, of_adjustment, offset = old
            is_current = source is not None and source.is_current(counts) and of_adjustment == adjustment
            if is_current and offset.device == counts.device:
                return offset
        with torch.inference_mode(False), torch.no_grad():
            computed = adjustment * log_probabilities(counts)
            offset = computed if old is None else _in_place(old[2], computed)
        self._kept_offset = _Source.of(counts), adjustment, offset
        return offset

    def _current_settings(self, counts: Tensor, state: Tensor, weighting: Weighting) -> _Settings:
        old = self._settings
        # A new blend, such as DistributedDataParallel writes in each step, does not change the table of fixed weights.
        fixed_is_current = (
            old is not None
            and old.weighting is weighting
            and old.vocab_size == counts.shape[0]
            and old.mix.device == counts.device
        )
        if old is not None and fixed_is_current and old.state is not None and old.state.is_current(state):
            return old
        if (old is None or old.state is None or old.state.tensor() is not state) and not _is_capturing(state):
            self.blend_of(state)
        with torch.inference_mode(False), torch.no_grad():
            # A state on meta has no value: whoever loaded the counts left it out.
            mix = torch.tensor(self._blend, dtype=torch.float32, device="cpu") if state.is_meta else _mix(state)
            mix = mix.to(counts.device)
            mix = mix if old is None else _in_place(old.mix, mix)
            fixed = old.fixed if old is not None and fixed_is_current else fixed_table(weighting.fixed, counts)
        self._settings = _Settings(mix, fixed, _Source.of(state), weighting, counts.shape[0])
        return self._settings


def _in_place(old: Tensor, new: Tensor) -> Tensor:
    """The new values, in the memory of the old ones if device and shape allow."""
    return old.copy_(new) if (old.device, old.shape) == (new.device, new.shape) else new


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
