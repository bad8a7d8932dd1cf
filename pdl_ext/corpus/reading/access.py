"""Reads files by position, and names them in every error."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from pdl_ext.storage.place import Place, RemotePath

__all__ = ["OpenFile", "opened", "read_array", "read_at", "read_head", "read_numbers"]


class OpenFile(Protocol):
    """A file that is open for one reading thread."""

    def read_at(self, view: memoryview, offset: int, /) -> int:
        """Reads bytes from an offset on into a buffer, and returns how many: 0 only at or after the file's end."""

    def read_ahead(self, start: int, stop: int, /) -> None:
        """Prepares to read the bytes from start to stop consecutively."""


class _FileOnDisk:
    # Not a generator with @contextmanager: Python 3.10's leaves an exception, and with it the arrays of the frames that
    # it passed, to the garbage collector.
    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read_at(self, view: memoryview, offset: int, /) -> int:
        return os.preadv(self._descriptor, [view], offset)

    def read_ahead(self, start: int, stop: int, /) -> None:
        # With this the kernel reads further ahead while earlier bytes are counted. It is not given the ranges
        # themselves: Linux would cache those page by page, which is slower to read than its own larger pieces.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def opened(path: Place) -> contextlib.AbstractContextManager[OpenFile]:
    """Opens a file for reading. Raises ValueError that names it if it cannot be opened."""
    return path.ranges() if isinstance(path, RemotePath) else _FileOnDisk(path)


def read_at(file: OpenFile, buffer: NDArray[Any], offset: int, path: Place) -> None:
    """Fills a contiguous array from a file's byte offset on. Raises ValueError that names a file that is too short."""
    view = memoryview(buffer.view(np.uint8).data)
    done = 0
    while done < len(view):
        try:
            got = file.read_at(view[done:], offset + done)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read at byte {offset + done} ({error.strerror})") from error
        if got == 0:
            raise ValueError(f"{path}: ends at byte {offset + done}, expected {len(view) - done} bytes more")
        done += got


def read_numbers(file: OpenFile, dtype: str, offset: int, count: int, path: Place) -> NDArray[Any]:
    """`count` numbers of a file from a byte offset on. Raises ValueError that names a file that is too short."""
    numbers = np.empty(count, dtype)
    read_at(file, numbers, offset, path)
    return numbers


def read_array(path: Place, dtype: str, offset: int, count: int) -> NDArray[Any]:
    """read_numbers of a file that is opened for this."""
    with opened(path) as file:
        return read_numbers(file, dtype, offset, count, path)


def read_head(path: Place, size: int) -> bytes:
    """The first bytes of a file, fewer than `size` only if it ends. Raises ValueError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
