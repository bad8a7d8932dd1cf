"""The tables of a loss that follow from counts, kept for as long as nothing has changed that they follow from.

They are no buffers: what saves, casts, shards or initialises the buffers of a model would take them for state.
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

# A blend as an integer: -(_ZERO + blend * _ONE). Of most blends that is all of float64's digits.
_ZERO, _ONE = 2**40, 2**60


def blend_state(blend: float, device: torch.device) -> Tensor:
    """A blend as a buffer: 0-d int64, a negative number that is linear in it.

    Integers are left alone by what casts a model's floating buffers, as FSDP's buffer_dtype and .half() do; memory that
    nobody has written, 0 most often, is no such number; and an average of several is that of their blends.
    """
    # It may be set outside of the inference mode that it is made in.
    with torch.inference_mode(False):
        return torch.tensor(_encoded(blend), dtype=torch.int64, device=device)


def _encoded(blend: float) -> int:
    return -(_ZERO + round(blend * _ONE))


def _mix(state: Tensor) -> Tensor:
    """The blend as the op takes it, on the state's device."""
    # An average may be rounded beyond the ends.
    return ((-state - _ZERO).to(torch.float64) / _ONE).clamp(0.0, 1.0).to(torch.float32)


class _Source(NamedTuple):
    """A tensor that something was computed from, and what PyTorch had counted of the writes to it."""

    tensor: weakref.ref[Tensor]
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Source | None:
        """None for a tensor of inference mode, where no writes are counted."""
        return None if tensor.is_inference() else cls(weakref.ref(tensor), tensor._version)

    def is_current(self, tensor: Tensor) -> bool:
        return self.tensor() is tensor and self.version == tensor._version


class _Settings(NamedTuple):
    """What the op takes beside counts, and what it was made from."""

    mix: Tensor
    fixed: Tensor | None
    state: _Source | None
    weighting: Weighting
    vocab_size: int


class TokenWeights:
    """Weights of counts under a weighting and a blend, of one module on one device.

    Computed in place where they can be, so that CUDA graphs that were captured see new ones. A copy of it, also a
    pickled one, knows the blend alone.
    """

    def __init__(self, blend: float) -> None:
        # What the state is restored to where it turns out to be memory that nobody has written.
        self._blend = blend
        # The counts that were found to be some.
        self._checked: weakref.ref[Tensor] | None = None
        self._settings: _Settings | None = None
        # Of counts under settings.
        self._kept: tuple[_Source | None, _Settings, Tensor] | None = None
        # Of counts under an adjustment.
        self._kept_offset: tuple[_Source | None, float, Tensor] | None = None

    def __reduce__(self) -> tuple[type[TokenWeights], tuple[float]]:
        return TokenWeights, (self._blend,)

    def are_checked(self, counts: Tensor) -> bool:
        """Whether `check` was called with this tensor."""
        return self._checked is not None and self._checked() is counts

    def check(self, counts: Tensor) -> None:
        """Remembers that a tensor of counts was found to be one."""
        self._checked = weakref.ref(counts)

    def blend_of(self, state: Tensor) -> float:
        """The blend in a state, which is restored if it is none. Waits for the device."""
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
        """Makes the next call compute everything."""
        if self._settings is not None:
            self._settings = self._settings._replace(state=None)
        if self._kept_offset is not None:
            self._kept_offset = None, *self._kept_offset[1:]

    def kept(self, counts: Tensor, state: Tensor, weighting: Weighting) -> Tensor:
        """The weights [V] of counts; those of the last call if nothing has changed."""
        settings = self._current_settings(counts, state, weighting)
        if self._kept is not None:
            source, of_settings, weights = self._kept
            # FSDP moves a buffer to another device without a new tensor, which the settings have noticed.
            if source is not None and source.is_current(counts) and of_settings is settings:
                return weights
        # They may be needed outside of inference mode, too.
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
        """adjustment * log f, float32 [V] of counts; that of the last call if nothing has changed."""
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
        # Another blend, as DistributedDataParallel writes one in each step, leaves the table of fixed weights as it is.
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
            # On meta there is nothing of it: whoever loaded the counts left it out.
            mix = torch.tensor(self._blend, dtype=torch.float32, device="cpu") if state.is_meta else _mix(state)
            mix = mix.to(counts.device)
            mix = mix if old is None else _in_place(old.mix, mix)
            fixed = old.fixed if old is not None and fixed_is_current else fixed_table(weighting.fixed, counts)
        self._settings = _Settings(mix, fixed, _Source.of(state), weighting, counts.shape[0])
        return self._settings


def _in_place(old: Tensor, new: Tensor) -> Tensor:
    """The new values, where the old ones are if they can be there."""
    return old.copy_(new) if (old.device, old.shape) == (new.device, new.shape) else new


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
