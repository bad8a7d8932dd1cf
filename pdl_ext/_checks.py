"""Checks of single values, whose errors name the argument, what came and what was expected."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist

__all__ = [
    "check_choice",
    "check_flag",
    "check_group",
    "check_ignore_index",
    "check_integer",
    "check_number",
    "check_path",
    "check_vocab_size",
    "names_of",
]


def check_number(name: str, value: Any, low: float, high: float, expected: str, *, open_low: bool = False) -> None:
    """Raises TypeError unless value is a number, ValueError unless low <= value <= high (open_low: low < value)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected {expected}")
    if not low <= value <= high or (open_low and value == low):
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def check_integer(name: str, value: Any, low: int, high: int, expected: str) -> None:
    """Raises ValueError unless value is an int with low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError unless value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected True or False")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises ValueError unless value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {sorted(choices)}")


def check_vocab_size(vocab_size: int) -> None:
    """Raises ValueError unless vocab_size is an int in [1, 2^31)."""
    check_integer("vocab_size", vocab_size, 1, 2**31 - 1, "an int in [1, 2^31)")


def check_ignore_index(ignore_index: int) -> None:
    """Raises ValueError unless ignore_index is an int that fits into int32."""
    check_integer("ignore_index", ignore_index, -(2**31), 2**31 - 1, "an int in [-2^31, 2^31)")


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


def names_of(dtypes: tuple[torch.dtype, ...]) -> str:
    """The names of dtypes, for an error."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
