"""Reads files by position, and names them in every error."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["opened", "read_array", "read_at", "read_head"]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """The descriptor of a file to read. Raises ValueError that names one which cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(descriptor: int, buffer: NDArray[Any], offset: int, path: Path) -> None:
    """Fills a contiguous array from a file at a byte offset. Raises ValueError that names a file that is too short."""
    view = memoryview(buffer.view(np.uint8).data)
    done = 0
    while done < len(view):
        try:
            got = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read at byte {offset + done} ({error.strerror})") from error
        if got == 0:
            raise ValueError(f"{path}: ends at byte {offset + done}, expected {len(view) - done} bytes more")
        done += got


def read_array(path: Path, dtype: str, offset: int, count: int) -> NDArray[Any]:
    """`count` numbers of a file from a byte offset on. Raises ValueError that names the file if it is too short."""
    numbers = np.empty(count, dtype)
    with opened(path) as file:
        read_at(file, numbers, offset, path)
    return numbers


def read_head(path: Path, size: int) -> bytes:
    """The first bytes of a file: fewer than `size` only if it ends there. Raises ValueError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
