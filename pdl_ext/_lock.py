"""A lock that survives copies, pickles and forks of the object that owns it."""

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
    """Holds a reentrant `lock`.

    A shallow copy of the owner shares the lock, since it shares the tensors. A deep copy or a pickle gets its own. A
    forked process gets a new lock, since the thread that held the old one does not exist there.
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
    """Decorates methods of an object with a `lock`: one thread at a time runs any of them."""

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return cast("Method", alone)
