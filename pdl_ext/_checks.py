"""Checks of single values. Each error names the argument, the value received and the value expected."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Collection
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "MAX",
    "check_choice",
    "check_dense",
    "check_exponent",
    "check_flag",
    "check_group",
    "check_ignore_index",
    "check_integer",
    "check_number",
    "check_vocab_size",
    "default_device",
    "is_batch_of_gradients",
    "is_dtensor",
    "is_traced",
    "names_of",
    "not_scriptable",
    "refuse_transforms",
]


T = TypeVar("T")

MAX = sys.float_info.max

# NumPy's scalars are included. mypy does not know that these numbers can be compared.
_NUMBERS: Any = numbers.Real
_INTEGERS: Any = numbers.Integral
_functorch: Any = torch._C._functorch
_ASKED_BY_SCRIPT = "__prepare_scriptable__"


def check_number(name: str, value: Any, low: float, high: float, expected: str, *, open_low: bool = False) -> float:
    """The value as a float. Any real number is accepted, NumPy's too.

    Raises TypeError unless it is a number, ValueError unless low <= value <= high (open_low: low < value).
    """
    # isinstance of an abstract class takes a microsecond, and a step has five of these checks.
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, _NUMBERS)):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected {expected}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not low <= number <= high or (open_low and number == low):
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    return number


def check_exponent(name: str, value: Any) -> float:
    """The exponent of a frequency as a float. Raises TypeError or ValueError unless it is from -10000 to 10000."""
    return check_number(name, value, -10_000, 10_000, "a number from -10000 to 10000")


def check_integer(name: str, value: Any, low: int, high: int, expected: str) -> int:
    """The value as an int; NumPy's integers are accepted. Raises ValueError unless low <= value <= high."""
    is_integer = type(value) is int or (isinstance(value, _INTEGERS) and not isinstance(value, bool))
    if not is_integer or not low <= value <= high:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    return int(value)


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError unless value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected True or False")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises ValueError unless value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {sorted(choices)}")


def check_vocab_size(vocab_size: int) -> int:
    """The size as an int. Raises ValueError unless it is an int from 1 to 2^31 - 1."""
    return check_integer("vocab_size", vocab_size, 1, 2**31 - 1, "an int from 1 to 2^31 - 1")


def check_ignore_index(ignore_index: int) -> int:
    """The id as an int. Raises ValueError unless it fits into int32."""
    return check_integer("ignore_index", ignore_index, -(2**31), 2**31 - 1, "an int from -2^31 to 2^31 - 1")


def check_group(group: Any) -> Any:
    """Returns the group. Raises TypeError unless it is None or a ProcessGroup that includes this process."""
    # A rank outside a group has a placeholder for it. Collectives accept that placeholder and do nothing.
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: got {type(group).__name__}, expected a ProcessGroup that this rank is in, or None")
    return group


def default_device() -> torch.device:
    """PyTorch's default device, or the CPU instead of meta: counts cannot be filled in later as weights can."""
    device = torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device


def is_dtensor(value: Any) -> bool:
    """Whether the value is a DTensor of torch.distributed, without importing that module."""
    # isinstance is not used: the compiler does not see all attributes of a DTensor.
    return type(value) is not Tensor and hasattr(value, "device_mesh")


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises TypeError for a sparse tensor, a nested tensor or a DTensor."""
    if is_dtensor(tensor):
        raise TypeError(f"{name}: got a DTensor, expected a plain tensor, as full_tensor() gives")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name}: got {kind}, expected a dense tensor, as to_dense() or to_padded_tensor() give")


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raises RuntimeError inside a transform of torch.func that wraps one of the tensors.

    The kernels would read through the wrapper and produce no gradient.
    """
    if not torch._C._are_functorch_transforms_active():
        return
    # The compiler's tracer does not support is_functorch_wrapped_tensor.
    if torch.compiler.is_compiling() or any(
        tensor is not None and _functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors
    ):
        raise RuntimeError(
            "pdl_ext: the kernels do not support torch.func's transforms (vmap, grad, jvp, jacrev, ...). Instead of "
            "vmap pass all leading dimensions at once, and take gradients by backward() or torch.autograd.grad. "
            "pdl_ext.reference supports all transforms"
        )


def is_batch_of_gradients(upstream: Tensor) -> bool:
    """Whether autograd asks for several gradients at once (`is_grads_batched`, `jacobian(vectorize=True)`)."""
    return bool(_functorch.is_legacy_batchedtensor(upstream))


def is_traced() -> bool:
    """Whether tensors have no usable values: under a compiler, a tracer or a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def not_scriptable(callable_: T) -> T:
    """Decorates a function or a module's class, so that torch.jit.script raises a TypeError that says what to use."""
    setattr(callable_, _ASKED_BY_SCRIPT, _refuse_script)
    return callable_


def _refuse_script(*_: object) -> NoReturn:
    raise TypeError(
        "pdl_ext: torch.jit.script is not supported, expected torch.compile, torch.export or torch.jit.trace"
    )


def names_of(dtypes: tuple[torch.dtype, ...]) -> str:
    """The names of dtypes, for an error message."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
