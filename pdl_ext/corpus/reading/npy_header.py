"""The header of NumPy's arrays in files: dtype and shape."""

from __future__ import annotations

import io
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy_format

from pdl_ext.corpus.source import TOKEN_DTYPES, ReadOptions, count_dtype

__all__ = ["HEAD_BYTES", "NpyHeader", "npy_header"]

# NumPy itself refuses longer headers. The 12 bytes before them hold their length.
HEAD_BYTES = 12 + 10_000
_VERSIONS = ((1, 0), (2, 0), (3, 0))


class NpyHeader(NamedTuple):
    """dtype: of the numbers, a name in TOKEN_DTYPES; first_byte: the position of the first number."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: str
    first_byte: int

    def check_rows(self, place: str, options: ReadOptions) -> None:
        """Raises ValueError that names the place for shifted targets in a matrix whose rows are stored as columns."""
        if len(self.shape) > 1 and self.fortran_order and options.policy.targets == "shifted":
            raise ValueError(
                f"{place}: got a matrix in Fortran's order, expected C's, where rows are sequences, to count shifted "
                "targets"
            )


def npy_header(place: str, head: bytes) -> NpyHeader:
    """The header in the first HEAD_BYTES of an array. Raises ValueError that names the place unless it has integers."""
    # NumPy gets only the header's bytes, so that a wrong length in it cannot allocate much memory.
    file = io.BytesIO(head)
    dtype: np.dtype[Any]
    try:
        version = npy_format.read_magic(file)
        if version not in _VERSIONS:
            raise ValueError(f"version {version[0]}.{version[1]}")
        # Version 3 differs from 2 only in the names of fields, which arrays of numbers do not have.
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
        raise ValueError(f"{place}: is damaged or not a .npy file of version 1 to 3 ({error})") from error
    if dtype.byteorder == ">":
        raise ValueError(f"{place}: got big-endian {dtype.name}, expected little-endian tokens")
    counted = count_dtype(dtype.name)
    if counted not in TOKEN_DTYPES:
        # Objects are pickles, which can run any code.
        way_out = ": it holds pickles: give the rows, as arrays of integers, to count_corpus" if dtype.hasobject else ""
        raise ValueError(f"{place}: got an array of {dtype}, expected one of {', '.join(TOKEN_DTYPES)}{way_out}")
    if any(length < 0 for length in shape):
        raise ValueError(f"{place}: got shape {shape}, expected lengths of 0 or more")
    return NpyHeader(shape, fortran_order, counted, file.tell())
