"""Calls outside of compiled graphs, which can hold no counter, no error and no conditional collective.

A module of its own, since `torch.compiler` imports the compiler for it. That takes 72 MiB and a second, which counting
a corpus and most losses do not need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["call_outside", "mark_called_while_traced"]

T = TypeVar("T")


@torch.compiler.disable
def call_outside(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function between two graphs, in each run of them."""
    return function(*arguments)


@torch.compiler.assume_constant_result
def mark_called_while_traced(method: Callable[..., bool]) -> bool:
    """Calls a method once, while a graph is traced, outside of that graph; its result has no meaning.

    It takes a method, since PyTorch 2.10 accepts no module as an argument of such a function.
    """
    torch.compiler.assume_constant_result(method)
    return True
