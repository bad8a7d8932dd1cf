"""Checks of single values, whose errors name the argument, what came and what was expected."""

from __future__ import annotations

import math
import numbers
import os
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
    "check_path",
    "check_vocab_size",
    "default_device",
    "is_dtensor",
    "is_traced",
    "names_of",
    "not_scriptable",
    "refuse_transforms",
]


T = TypeVar("T")

MAX = sys.float_info.max

# NumPy's scalars are among them; mypy knows no order of these.
_NUMBERS: Any = numbers.Real
_INTEGERS: Any = numbers.Integral
_functorch: Any = torch._C._functorch
_ASKED_BY_SCRIPT = "__prepare_scriptable__"


def check_number(name: str, value: Any, low: float, high: float, expected: str, *, open_low: bool = False) -> float:
    """The value as a float; any real number is one, NumPy's too.

    Raises TypeError unless it is a number, ValueError unless low <= value <= high (open_low: low < value).
    """
    # An abstract class takes a microsecond to ask, and a step has five of these.
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
    """The exponent of a frequency as a float. Raises TypeError or ValueError unless it is in [-10000, 10000]."""
    return check_number(name, value, -10_000, 10_000, "a number in [-10000, 10000]")


def check_integer(name: str, value: Any, low: int, high: int, expected: str) -> int:
    """The value as an int; NumPy's are ints. Raises ValueError unless it is one with low <= value <= high."""
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
    """The size as an int. Raises ValueError unless it is one in [1, 2^31)."""
    return check_integer("vocab_size", vocab_size, 1, 2**31 - 1, "an int in [1, 2^31)")


def check_ignore_index(ignore_index: int) -> int:
    """The id as an int. Raises ValueError unless it is one that fits into int32."""
    return check_integer("ignore_index", ignore_index, -(2**31), 2**31 - 1, "an int in [-2^31, 2^31)")


def check_path(name: str, value: Any) -> None:
    """Raises TypeError unless value is a path, ValueError for one that no file has."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected a path")
    if not os.fspath(value):
        raise ValueError(f"{name}: got an empty name, expected a path")
    if "\0" in os.fspath(value):
        raise ValueError(f"{name}: got {os.fspath(value)!r}, which has a null in it, expected a path")


def check_group(group: Any) -> Any:
    """Gives the group. Raises TypeError unless it is one of processes, this one among them, or None."""
    # A rank outside of a group has a placeholder for it, which collectives take and do nothing.
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: got {type(group).__name__}, expected a ProcessGroup that this rank is in, or None")
    return group


def default_device() -> torch.device:
    """Where PyTorch puts what a module makes; the CPU instead of meta: counts are no weights that are filled later."""
    device = torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device


def is_dtensor(value: Any) -> bool:
    """Whether it is one of torch.distributed's DTensors, without an import of these."""
    # A compiler does not see all of a DTensor's attributes.
    return type(value) is not Tensor and hasattr(value, "device_mesh")


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises TypeError for a tensor that is sparse, nested, or a DTensor."""
    if is_dtensor(tensor):
        raise TypeError(f"{name}: got a DTensor, expected a plain tensor, as full_tensor() gives")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name}: got {kind}, expected a dense tensor, as to_dense() or to_padded_tensor() give")


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raises RuntimeError inside a transform of torch.func that wraps one of the tensors.

    The kernels would see through the wrapper, and leave no gradient.
    """
    if not torch._C._are_functorch_transforms_active():
        return
    # A compiler's tracer does not know it.
    if torch.compiler.is_compiling() or any(
        tensor is not None and _functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors
    ):
        raise RuntimeError(
            "pdl_ext: the kernels do not go with torch.func's transforms (vmap, grad, jvp, jacrev, ...): pass all "
            "leading dimensions at once instead of vmap, and take gradients by backward() or torch.autograd.grad; "
            "pdl_ext.reference goes with all of them"
        )


def is_traced() -> bool:
    """Whether the values of tensors are not to be had, or of no use later: under a compiler, a tracer or a mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def not_scriptable(callable_: T) -> T:
    """Decorates a function, or a module's class: torch.jit.script raises TypeError, and no riddle about annotations."""
    setattr(callable_, _ASKED_BY_SCRIPT, _refuse_script)
    return callable_


def _refuse_script(*_: object) -> NoReturn:
    raise TypeError(
        "pdl_ext: torch.jit.script does not take it, expected torch.compile, torch.export or torch.jit.trace"
    )


def names_of(dtypes: tuple[torch.dtype, ...]) -> str:
    """The names of dtypes, for an error."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
