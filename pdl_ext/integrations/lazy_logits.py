"""Logits that are not computed until needed: operations on them are recorded, and a loss reads the record.

A head that is `recording()` returns LazyLogits. A scale, a softcap, a cast and a slice of the vocabulary are recorded
as steps. Every other operation computes the real logits, differentiably, and continues with these.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = ["Head", "LazyLogits", "Modes", "Transform", "record", "recording", "stop_recording"]


class _Thread(threading.local):
    wanted = False


_thread = _Thread()


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Within this block, and on this thread, heads that `record` has prepared return LazyLogits."""
    before = _thread.wanted
    _thread.wanted = True
    try:
        yield
    finally:
        _thread.wanted = before


@dataclass(frozen=True)
class Modes:
    """PyTorch's modes around a forward; autocast is its dtype, or None."""

    autocast: torch.dtype | None
    inference: bool
    grad: bool

    @classmethod
    def now(cls, device_type: str) -> Modes:
        is_autocast = torch.is_autocast_enabled(device_type)
        autocast = torch.get_autocast_dtype(device_type) if is_autocast else None
        return cls(autocast, torch.is_inference_mode_enabled(), torch.is_grad_enabled())

    @contextlib.contextmanager
    def restored(self, device_type: str) -> Iterator[None]:
        autocast = torch.autocast(device_type, dtype=self.autocast, enabled=self.autocast is not None)
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad), autocast:
            yield


@dataclass(frozen=True)
class Head:
    """The factors of the logits: hidden [..., H], weight [V, H], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    versions: tuple[int | None, ...]
    modes: Modes

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
        return cls(hidden, weight, bias, _versions(weight, bias), Modes.now(hidden.device.type))

    def product(self) -> Tensor:
        """The logits as the head would have computed them. Raises RuntimeError if its weight has changed since."""
        if _versions(self.weight, self.bias) != self.versions:
            raise RuntimeError(
                "logits: got a head that was changed since the forward, as by an optimizer's step, expected the same "
                "one. Read the logits before the step, or use apply_pdl_loss(fused=False)"
            )
        return nn.functional.linear(self.hidden, self.weight, self.bias)


def _versions(*tensors: Tensor | None) -> tuple[int | None, ...]:
    return tuple(None if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors)


@dataclass(frozen=True)
class Transform:
    """z = softcap tanh(logit_scale x / softcap), or without a softcap z = logit_scale x.

    width: how many of the first logits are kept.
    """

    logit_scale: float
    softcap: float | None
    width: int


@dataclass(frozen=True)
class _Step:
    """One operation on the logits, and its factor if it is a multiplication."""

    apply: Callable[[Tensor], Tensor]
    factor: float | None = None
    is_tanh: bool = False


class LazyLogits(Tensor):
    """Logits [..., V] of a head, in the dtype that it would return, without memory for them."""

    head: Head
    steps: tuple[_Step, ...]
    made: Tensor | None
    # The name of the first operation that could not be recorded.
    unknown: str | None

    @staticmethod
    def __new__(cls, head: Head, dtype: torch.dtype, width: int, steps: tuple[_Step, ...] = ()) -> LazyLogits:
        shape = (*head.hidden.shape[:-1], width)
        lazy: LazyLogits = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=head.hidden.device)
        lazy.head, lazy.steps, lazy.made, lazy.unknown = head, steps, None, None
        return lazy

    def __init__(self, *_: Any) -> None:
        pass

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyLogits({tuple(self.shape)})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.dense().__deepcopy__(memo)

    def dense(self) -> Tensor:
        """The logits as the model would have computed them, attached to its graph."""
        if self.made is None:
            # In the modes of the forward, wherever they are read.
            with self.head.modes.restored(self.device.type):
                made = self.head.product()
                for step in self.steps:
                    made = step.apply(made)
            self.made = made
        return self.made

    def transform(self) -> Transform | None:
        """The steps as options of a loss; None if they are not a scale with a softcap, or the logits were computed."""
        if self.made is not None:
            return None
        scale, softcap, after_tanh = 1.0, None, False
        for step in self.steps:
            if step.is_tanh:
                if after_tanh:
                    return None
                softcap, after_tanh = 1.0, True
            elif step.factor is not None and after_tanh:
                if softcap != 1.0 or step.factor <= 0:
                    return None
                softcap = step.factor
            elif step.factor is not None:
                scale *= step.factor
        if scale == 0:
            return None
        # tanh(scale x) is softcap tanh(logit_scale x / softcap) over softcap.
        return Transform(scale if softcap is None else scale * softcap, softcap, self.shape[-1])

    def _then(self, step: _Step, dtype: torch.dtype | None = None, width: int | None = None) -> LazyLogits:
        return LazyLogits(self.head, dtype or self.dtype, width or self.shape[-1], (*self.steps, step))

    def _as(self, dtype: torch.dtype) -> LazyLogits:
        # The same object if nothing is cast, as in PyTorch, so that a write to it is seen.
        return self if dtype == self.dtype else self._then(_Step(lambda made: made.to(dtype)), dtype)

    def _detached(self) -> LazyLogits:
        head = self.head
        bias = None if head.bias is None else head.bias.detach()
        modes = dataclasses.replace(head.modes, grad=False)
        # A detached tensor has the version of its tensor.
        detached = Head(head.hidden.detach(), head.weight.detach(), bias, head.versions, modes)
        return LazyLogits(detached, self.dtype, self.shape[-1], self.steps)

    def _recorded(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """The result of an operation that can be recorded, or None."""
        if function in (torch.tanh, Tensor.tanh) and not arguments:
            return self._then(_Step(torch.tanh, is_tanh=True))
        if function is Tensor.contiguous and not arguments:
            return self
        # DistributedDataParallel clones the outputs of a forward.
        if function in (torch.clone, Tensor.clone) and not arguments:
            return LazyLogits(self.head, self.dtype, self.shape[-1], self.steps)
        if function is Tensor.float and not arguments:
            return self._as(torch.float32)
        if function is Tensor.detach and not arguments:
            return self._detached()
        if len(arguments) != 1:
            return None
        value = arguments[0]
        if function in _MULTIPLICATIONS | _DIVISIONS and type(value) in (int, float):
            factor = float(value) if function in _MULTIPLICATIONS else 1.0 / value if value else None
            return None if factor is None else self._then(_Step(lambda made: function(made, value), factor))
        if function is Tensor.to and isinstance(value, torch.dtype):
            return self._as(value)
        if function is Tensor.to and value == self.device:
            return self
        if function is Tensor.__getitem__:
            width = _first_columns(value, self.shape[-1])
            return None if width is None else self._then(_Step(lambda made: made[..., :width]), width=width)
        return None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _OF_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if args and isinstance(args[0], LazyLogits) and args[0].made is None and not kwargs:
            result = args[0]._recorded(function, tuple(args[1:]))
            if result is not None:
                return result
        name = getattr(function, "__name__", str(function))
        args, kwargs = tree_map_only(LazyLogits, functools.partial(_dense_for, name), (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # For operations that bypass __torch_function__, such as a backend's own calls.
        name = str(function)
        args, kwargs = tree_map_only(LazyLogits, lambda lazy: _dense_for(name, lazy).detach(), (args, kwargs or {}))
        return function(*args, **kwargs)


def _dense_for(name: str, lazy: LazyLogits) -> Tensor:
    lazy.unknown = lazy.unknown or name
    return lazy.dense()


def _first_columns(index: Any, width: int) -> int | None:
    """The number of columns that an index [..., :k] keeps, or None for another index."""
    if not (isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis and isinstance(index[1], slice)):
        return None
    columns = index[1]
    if columns.start not in (None, 0) or columns.step not in (None, 1) or type(columns.stop) is not int:
        return None
    return columns.stop if 0 < columns.stop <= width else None


_MULTIPLICATIONS = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__}
_DIVISIONS = {torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide}
_DIVISIONS |= {Tensor.__truediv__}
# Attributes and methods that need no values of the logits.
_ATTRIBUTES: tuple[str, ...] = (
    "shape",
    "dtype",
    "device",
    "ndim",
    "layout",
    "grad_fn",
    "requires_grad",
    "is_leaf",
    "is_cuda",
    "is_meta",
)
_ATTRIBUTES += ("is_cpu", "is_sparse", "is_nested", "is_quantized", "is_mps", "is_xpu")
_METHODS = ("dim", "size", "numel", "ndimension", "is_floating_point", "is_complex", "element_size", "__len__")
_OF_SHAPE = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES} | {getattr(Tensor, name) for name in _METHODS}
_OF_SHAPE |= {torch.is_floating_point, torch.is_complex, torch.numel}


def record(module: nn.Module) -> bool:
    """Makes a linear head return LazyLogits while `recording()`; False for a head with a forward of its own."""
    if type(module).forward is not nn.Linear.forward or "forward" in module.__dict__:
        return False

    @functools.wraps(nn.Linear.forward)
    def forward(self: Any, hidden: Tensor) -> Tensor:
        if not _thread.wanted or not _is_understood(self, hidden):
            return nn.Linear.forward(self, hidden)
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(hidden.device.type)
        return LazyLogits(Head.of(hidden, self.weight, self.bias), dtype, self.weight.shape[0])

    forward.records = True  # type: ignore[attr-defined]
    module.forward = types.MethodType(forward, module)
    return True


def stop_recording(module: nn.Module) -> None:
    """Undoes `record` in a module, its submodules, and copies of them."""
    for inner in module.modules():
        if hasattr(inner.__dict__.get("forward"), "records"):
            del inner.__dict__["forward"]


def _is_understood(module: Any, hidden: Tensor) -> bool:
    # A compiler cannot create a tensor of this package's class. ZeRO-3 frees the weight after the head has returned,
    # and so does FSDP2 if the head is a unit of its own.
    weight: Any = module.weight
    if torch.compiler.is_compiling() or hasattr(weight, "ds_id") or hasattr(module, "unshard"):
        return False
    # This excludes DTensors and quantised weights.
    plain = (Tensor, nn.Parameter)
    return type(hidden) in plain and type(weight) in plain and weight.is_floating_point()
