"""The token weights of a loss, kept for as long as nothing has changed that they follow from.

They are no buffers: what saves, casts, shards or initialises the buffers of a model would take them for state.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from pdl_ext import functional
from pdl_ext.weighting import PowerLaw

__all__ = ["TokenWeights", "blend_state"]


def blend_state(blend: float, device: torch.device) -> Tensor:
    """A blend as a buffer: int64, the bits of -blend in float64.

    Integers are left alone by what casts a model's floating buffers, as FSDP's buffer_dtype and .half() do; and memory
    that nobody has written, 0 most often, is no negative number.
    """
    # It may be set outside of the inference mode that it is made in.
    with torch.inference_mode(False):
        return torch.tensor(_bits(blend), dtype=torch.int64, device=device)


def _bits(blend: float) -> int:
    (bits,) = struct.unpack("<q", struct.pack("<d", -blend))
    return int(bits)


def _mix(state: Tensor) -> Tensor:
    """The blend as the op takes it, on the state's device."""
    # An average of several states, as of a model's buffers, may be beyond their bits.
    return state.view(torch.float64).neg().clamp(0.0, 1.0).to(torch.float32)


class _Source(NamedTuple):
    """A tensor that something was computed from, and what PyTorch had counted of the writes to it."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Source | None:
        """None for a tensor of inference mode, where no writes are counted."""
        return None if tensor.is_inference() else cls(tensor, tensor._version)

    def is_current(self, tensor: Tensor) -> bool:
        return self.tensor is tensor and self.version == tensor._version


class _Settings(NamedTuple):
    """What the op takes beside counts, and what it was made from."""

    mix: Tensor
    fixed: Tensor | None
    state: _Source | None
    weighting: PowerLaw
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
        self.checked: Tensor | None = None
        self._settings: _Settings | None = None
        # Of counts under settings.
        self._kept: tuple[_Source | None, _Settings, Tensor] | None = None

    def __reduce__(self) -> tuple[type[TokenWeights], tuple[float]]:
        return TokenWeights, (self._blend,)

    def blend_of(self, state: Tensor) -> float:
        """The blend in a state, which is restored if it is none. Waits for the device."""
        if state.is_meta:
            return self._blend
        bits = int(state)
        (minus,) = struct.unpack("<d", struct.pack("<q", bits))
        if bits < 0 and 0 <= -minus <= 1:
            self._blend = -minus
        else:
            self.set_blend(state, self._blend)
        return self._blend

    def set_blend(self, state: Tensor, blend: float) -> None:
        """Writes a blend to a state."""
        self._blend = blend
        with torch.no_grad():
            state.fill_(_bits(blend))

    def forget(self) -> None:
        """Makes the next call compute everything."""
        if self._settings is not None:
            self._settings = self._settings._replace(state=None)

    def kept(self, counts: Tensor, state: Tensor, weighting: PowerLaw) -> Tensor:
        """The weights [V] of counts; those of the last call if nothing has changed."""
        settings = self._current_settings(counts, state, weighting)
        if self._kept is not None:
            source, of_settings, weights = self._kept
            # FSDP moves a buffer to another device without a new tensor, which the settings have noticed.
            if source is not None and source.is_current(counts) and of_settings is settings:
                return weights
        # They may be needed outside of inference mode, too.
        with torch.inference_mode(False), torch.no_grad():
            computed = functional.weights_with_fixed(counts, weighting, settings.mix, settings.fixed)
            weights = computed if self._kept is None else _in_place(self._kept[2], computed)
        self._kept = _Source.of(counts), settings, weights
        return weights

    def fresh(self, counts: Tensor, state: Tensor, weighting: PowerLaw) -> Tensor:
        """The weights [V] of counts, computed in this call, which may be traced into a graph."""
        if torch.compiler.is_compiling():
            mix, fixed = _mix(state), functional.fixed_table(weighting, counts)
        else:
            mix, fixed, *_ = self._current_settings(counts, state, weighting)
        return functional.weights_with_fixed(counts, weighting, mix, fixed)

    def _current_settings(self, counts: Tensor, state: Tensor, weighting: PowerLaw) -> _Settings:
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
        if (old is None or old.state is None or old.state.tensor is not state) and not _is_capturing(state):
            self.blend_of(state)
        with torch.inference_mode(False), torch.no_grad():
            # On meta there is nothing of it: whoever loaded the counts left it out.
            mix = torch.tensor(self._blend, dtype=torch.float32, device="cpu") if state.is_meta else _mix(state)
            mix = mix.to(counts.device)
            mix = mix if old is None else _in_place(old.mix, mix)
            fixed = old.fixed if old is not None and fixed_is_current else functional.fixed_table(weighting, counts)
        self._settings = _Settings(mix, fixed, _Source.of(state), weighting, counts.shape[0])
        return self._settings


def _in_place(old: Tensor, new: Tensor) -> Tensor:
    """The new values, where the old ones are if they can be there."""
    return old.copy_(new) if (old.device, old.shape) == (new.device, new.shape) else new


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
