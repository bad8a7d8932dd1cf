"""Many concurrent requests to a store, since each takes time."""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

__all__ = ["begun", "in_order"]

T = TypeVar("T")
R = TypeVar("R")

_AT_ONCE = 32


def in_order(function: Callable[[T], R], items: Sequence[T], *, at_once: bool) -> Iterator[R]:
    """The results of a function for items, in their order; with `at_once` many are computed concurrently, in threads.

    Raises the error of the first item for which the function fails.
    """
    if not at_once or len(items) < 2:
        yield from map(function, items)
        return
    with concurrent.futures.ThreadPoolExecutor(min(_AT_ONCE, len(items))) as threads:
        yield from threads.map(function, items)


def begun(items: Iterator[T]) -> Iterator[T]:
    """The same items; a thread begins to produce the first one at once. Its error is raised in its place."""
    first: concurrent.futures.Future[list[T]] = concurrent.futures.Future()

    def begin() -> None:
        try:
            first.set_result(list(itertools.islice(items, 1)))
        except BaseException as error:
            first.set_exception(error)

    threading.Thread(target=begin, daemon=True).start()

    def all_items() -> Iterator[T]:
        yield from first.result()
        yield from items

    return all_items()
