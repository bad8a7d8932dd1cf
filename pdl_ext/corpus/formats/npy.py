"""NumPy's .npy: a header with dtype and shape, then the tokens; each row of a matrix is a sequence."""

from __future__ import annotations

import io
import math
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from pdl_ext.corpus.reading.access import read_head
from pdl_ext.corpus.reading.flat import FlatSource
from pdl_ext.corpus.source import TOKEN_DTYPES, Format, ReadOptions, Source, count_dtype
from pdl_ext.storage.place import Place

__all__ = ["FORMAT"]

# NumPy itself refuses longer headers than this, behind 12 bytes at most that tell their length.
_HEAD_BYTES = 12 + 10_000
_VERSIONS = ((1, 0), (2, 0), (3, 0))


def _open(path: Place, options: ReadOptions) -> list[Source]:
    shape, fortran_order, dtype, first_byte = _header(path)
    if dtype.byteorder == ">":
        raise ValueError(f"{path}: got big-endian {dtype.name}, expected little-endian tokens")
    counted = count_dtype(dtype.name)
    if counted not in TOKEN_DTYPES:
        raise ValueError(f"{path}: got an array of {dtype}, expected one of {', '.join(TOKEN_DTYPES)}")
    if any(length < 0 for length in shape):
        raise ValueError(f"{path}: got shape {shape}, expected lengths of 0 or more")
    is_matrix = len(shape) > 1
    if is_matrix and fortran_order and options.policy.targets == "shifted":
        raise ValueError(
            f"{path}: got a matrix in Fortran's order, expected C's, where rows are sequences, to count shifted targets"
        )

    def row_starts(start: int, stop: int) -> NDArray[np.int64]:
        return np.arange(-(-start // shape[-1]) * shape[-1], stop, shape[-1], dtype=np.int64)

    tokens = math.prod(shape)
    starts_between = row_starts if is_matrix else None
    return [
        FlatSource("npy", path, counted, options, first_byte=first_byte, tokens=tokens, starts_between=starts_between)
    ]


def _recognises(path: Place, head: bytes) -> bool:
    # Also with a damaged first byte, or the header would pass for raw ids.
    return head[1:6] == npy_format.MAGIC_PREFIX[1:] and (head[0] == npy_format.MAGIC_PREFIX[0] or head[7:8] == b"\0")


def _header(path: Place) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether in Fortran's order, dtype, and where the array begins."""
    # NumPy gets the header's bytes alone, so that no length that is stated in it makes anything large.
    file = io.BytesIO(read_head(path, _HEAD_BYTES))
    try:
        version = npy_format.read_magic(file)
        if version not in _VERSIONS:
            raise ValueError(f"version {version[0]}.{version[1]}")
        # Version 3 differs from 2 in the names of fields alone, which arrays of numbers do not have.
        read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
    except (
        ValueError,
        TypeError,
        KeyError,
        SyntaxError,
        TokenError,
        RecursionError,
        MemoryError,
        OverflowError,
    ) as error:
        raise ValueError(f"{path}: is damaged or no .npy file of version 1 to 3 ({error})") from error
    return shape, fortran_order, dtype, file.tell()


FORMAT = Format("npy", _open, _recognises, has_header=True)
