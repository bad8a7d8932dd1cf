"""Asks a store many things at once, since it takes its time for each."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

__all__ = ["in_order"]

T = TypeVar("T")
R = TypeVar("R")

_AT_ONCE = 32


def in_order(function: Callable[[T], R], items: Sequence[T], *, at_once: bool) -> Iterator[R]:
    """What a function makes of each item, in their order; with `at_once` of many at a time, in threads.

    Raises what the function raises of the first item that it fails at.
    """
    if not at_once or len(items) < 2:
        yield from map(function, items)
        return
    with concurrent.futures.ThreadPoolExecutor(min(_AT_ONCE, len(items))) as threads:
        yield from threads.map(function, items)
