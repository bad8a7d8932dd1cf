"""Calls beside compiled graphs, which hold no counter, no error and no collective now and then.

A module of its own, since `torch.compiler` imports the compiler for it. Counting a corpus and most losses do without
these 72 MiB and this second.
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
    """Has a method called while a graph is traced that has no room for it; the results mean nothing.

    A method, since PyTorch 2.10 takes no module as an argument of such a function.
    """
    torch.compiler.assume_constant_result(method)
    return True
