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


def _version(tensor: Tensor) -> int | None:
    """What PyTorch counts of the writes to a tensor; None for one of inference mode, where it counts none."""
    return None if tensor.is_inference() else tensor._version


class _Source(NamedTuple):
    """A tensor as it was when something was computed from it."""

    tensor: Tensor
    version: int | None
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Source:
        return cls(tensor, _version(tensor), tensor.device)

    def is_current(self, tensor: Tensor) -> bool:
        # FSDP moves a buffer to another device without a new tensor.
        return (
            self.tensor is tensor
            and self.version is not None
            and self.version == _version(tensor)
            and self.device == tensor.device
        )


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
        self._blend_source: _Source | None = None
        self._mix: Tensor | None = None
        self._fixed_of: tuple[PowerLaw, int, torch.device] | None = None
        self._fixed: Tensor | None = None
        self._counts_source: _Source | None = None
        self._weighting: PowerLaw | None = None
        self._weights: Tensor | None = None

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
        self._blend_source = self._fixed_of = self._counts_source = None

    def kept(self, counts: Tensor, state: Tensor, weighting: PowerLaw) -> Tensor:
        """The weights [V] of counts; those of the last call if nothing has changed."""
        mix, fixed = self._settings(counts, state, weighting)
        source, weights = self._counts_source, self._weights
        if weights is not None and source is not None and source.is_current(counts):
            return weights
        # They may be needed outside of inference mode, too.
        with torch.inference_mode(False), torch.no_grad():
            computed = functional.weights_with_fixed(counts, weighting, mix, fixed)
            if weights is None or weights.device != computed.device or weights.shape != computed.shape:
                weights = computed
            else:
                weights.copy_(computed)
        self._weights, self._counts_source = weights, _Source.of(counts)
        return weights

    def fresh(self, counts: Tensor, state: Tensor, weighting: PowerLaw) -> Tensor:
        """The weights [V] of counts, computed in this call, which may be traced into a graph."""
        if torch.compiler.is_compiling():
            mix, fixed = _mix(state), functional.fixed_table(weighting, counts)
        else:
            mix, fixed = self._settings(counts, state, weighting)
        return functional.weights_with_fixed(counts, weighting, mix, fixed)

    def _settings(self, counts: Tensor, state: Tensor, weighting: PowerLaw) -> tuple[Tensor, Tensor | None]:
        mix, source = self._mix, self._blend_source
        if mix is None or source is None or mix.device != counts.device or not source.is_current(state):
            if (source is None or source.tensor is not state) and type(state) is Tensor and not _is_capturing(state):
                self.blend_of(state)
            with torch.inference_mode(False), torch.no_grad():
                computed = _mix(state).to(counts.device)
                if mix is None or mix.device != computed.device:
                    mix = computed
                else:
                    mix.copy_(computed)
            self._mix, self._blend_source, self._counts_source = mix, _Source.of(state), None
        of = (weighting, counts.shape[0], counts.device)
        # By identity first: equality compares all options.
        if self._fixed_of is None or self._fixed_of[0] is not weighting or self._fixed_of[1:] != of[1:]:
            with torch.inference_mode(False):
                self._fixed = functional.fixed_table(weighting, counts)
            self._fixed_of, self._counts_source = of, None
        return mix, self._fixed


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
