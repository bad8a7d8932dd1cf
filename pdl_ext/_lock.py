"""A lock that goes with an object through copies, pickles and forks."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

__all__ = ["Exclusion", "exclusive"]

Method = TypeVar("Method", bound=Callable[..., Any])


class Exclusion:
    """Holds a `lock`, which the thread that has it may take again.

    A shallow copy of the owner has the same one, as it has the same tensors; a deep or pickled one has its own; a
    forked process, in which no thread is left to give it back, has a new one.
    """

    __slots__ = ("__weakref__", "lock")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        _living.add(self)

    def __reduce__(self) -> tuple[type[Exclusion], tuple[()]]:
        return Exclusion, ()


_living: weakref.WeakSet[Exclusion] = weakref.WeakSet()


def _renew() -> None:
    for exclusion in _living:
        exclusion.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def exclusive(method: Method) -> Method:
    """Lets one thread at a time into those methods of an object that have this, by its `lock`."""

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return cast("Method", alone)
