"""NumPy's .npy: a header with dtype and shape, then the tokens; each row of a matrix is a sequence."""

from __future__ import annotations

import math

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from pdl_ext.corpus.reading.access import read_head
from pdl_ext.corpus.reading.flat import FlatSource
from pdl_ext.corpus.reading.npy_header import HEAD_BYTES, npy_header
from pdl_ext.corpus.source import Format, ReadOptions, Source
from pdl_ext.storage.place import Place

__all__ = ["FORMAT"]


def _open(path: Place, options: ReadOptions) -> list[Source]:
    header = npy_header(str(path), read_head(path, HEAD_BYTES))
    header.check_rows(str(path), options)
    shape = header.shape

    def row_starts(start: int, stop: int) -> NDArray[np.int64]:
        return np.arange(-(-start // shape[-1]) * shape[-1], stop, shape[-1], dtype=np.int64)

    tokens = math.prod(shape)
    return [
        FlatSource(
            "npy",
            path,
            header.dtype,
            options,
            first_byte=header.first_byte,
            tokens=tokens,
            starts_between=row_starts if len(shape) > 1 else None,
        )
    ]


def _recognises(path: Place, head: bytes) -> bool:
    # Also with a damaged first byte, or the header would be read as raw ids.
    return head[1:6] == npy_format.MAGIC_PREFIX[1:] and (head[0] == npy_format.MAGIC_PREFIX[0] or head[7:8] == b"\0")


FORMAT = Format("npy", _open, _recognises, has_header=True)
