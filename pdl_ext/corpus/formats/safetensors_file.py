"""Files of safetensors: a JSON header with name, dtype, shape and offsets of each tensor; one tensor is read."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdl_ext.corpus.reading.access import read_head
from pdl_ext.corpus.reading.arrays import chosen_array
from pdl_ext.corpus.reading.flat import FlatSource
from pdl_ext.corpus.source import Format, ReadOptions, Source, Stamp, token_dtype
from pdl_ext.storage.place import Place

__all__ = ["FORMAT"]

# The format's names of dtypes. uint64 is counted as int64.
_DTYPES = {"U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32"}
_DTYPES |= {"I64": "int64", "U64": "int64"}
# The safetensors library refuses longer headers.
_LARGEST_HEADER = 100_000_000


def _open(path: Place, options: ReadOptions) -> list[Source]:
    size = Stamp.of(path).size
    header_bytes = int.from_bytes(read_head(path, 8), "little")
    if size < 8 + header_bytes or header_bytes > _LARGEST_HEADER:
        raise ValueError(f"{path}: got {size} bytes, expected a header of {header_bytes} behind the first 8")
    try:
        header = json.loads(read_head(path, 8 + header_bytes)[8:])
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        axes = {name: len(tensor["shape"]) for name, tensor in tensors.items() if tensor["dtype"] in _DTYPES}
        last = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: is damaged or not a file of safetensors ({error!r})") from error
    if last != size - 8 - header_bytes:
        raise ValueError(f"{path}: got {size} bytes, expected {8 + header_bytes} and the {last} of its tensors")
    refused = {
        name: ValueError(f"{path}: {name!r} is a tensor of {tensors[name]['dtype']}, expected one of integers")
        for name in tensors
        if name not in axes
    }
    name = chosen_array(path, axes, refused, options)
    dtype, shape, begin, end = _places(path, name, tensors[name])
    if begin + math.prod(shape) * token_dtype(dtype).itemsize != end or end > last:
        raise ValueError(f"{path}: got {name!r} in bytes {begin} to {end} of {size}, expected {shape} of {dtype}")

    def row_starts(start: int, stop: int) -> NDArray[np.int64]:
        return np.arange(-(-start // shape[-1]) * shape[-1], stop, shape[-1], dtype=np.int64)

    return [
        FlatSource(
            "safetensors",
            path,
            dtype,
            options,
            first_byte=8 + header_bytes + begin,
            tokens=math.prod(shape),
            bytes_behind=last - end,
            starts_between=row_starts if len(shape) > 1 else None,
            has_columns=True,
        )
    ]


def _places(path: Place, name: str, tensor: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    try:
        begin, end = tensor["data_offsets"]
        numbers = [*tensor["shape"], begin, end]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"shape and offsets {numbers}")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: got a tensor {name!r} without shape and place ({error!r})") from error
    return _DTYPES[tensor["dtype"]], tuple(tensor["shape"]), begin, end


FORMAT = Format("safetensors", _open, lambda path, head: path.suffix.lower() == ".safetensors", has_header=True)
