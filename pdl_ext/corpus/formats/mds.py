"""MosaicML's folders of MDS shards, and their index.json.

A shard holds the offsets of the samples, then the columns as JSON, then the samples (reading/samples.py).
"""

from __future__ import annotations

import functools
import json
import math
import operator
from pathlib import PurePath
from typing import Any

import numpy as np

from pdl_ext.corpus.reading.access import read_head
from pdl_ext.corpus.reading.compression import decompressed
from pdl_ext.corpus.reading.listing import listed_file, read_json
from pdl_ext.corpus.reading.samples import Column, Encoding, Layout, Reader, SampleSource
from pdl_ext.corpus.source import Format, ReadOptions, Source
from pdl_ext.storage.place import Place, is_file

__all__ = ["FORMAT"]

_INDEX = "index.json"
_SUFFIX = ".mds"
_VERSION = 2
_INDEX_HEAD_BYTES = 2**14
_LARGEST_CONFIG = 2**20
# The names of compressions in the index, and those in this package.
_COMPRESSIONS = {"zstd": "zstd", "gz": "gzip", "bz2": "bzip2"}
_NAMES = (*_COMPRESSIONS, "br", "snappy")
# For columns without a dtype: the number at the beginning of each array.
_DTYPES = {8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32", 64: "uint64", 65: "int64"}


class _Shard(SampleSource):
    def check_own(self, window: Reader, begin: int, end: int) -> None:
        if end - begin > _LARGEST_CONFIG:
            raise ValueError(f"{self.path}: got {end - begin} bytes of columns, expected {_LARGEST_CONFIG} at most")
        try:
            columns = _columns(json.loads(window.read(begin, end - begin).tobytes()))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.path}: cannot be read at byte {begin} as JSON ({error!r})") from error
        if columns != self.columns:
            raise ValueError(
                f"{self.path}: got the columns {columns}, expected {self.columns}, as {self.listing.name} says"
            )


def _encoding(index: Place, column: Column) -> Encoding:
    """How a column is read. Raises ValueError that names the index, for a column whose size does not fit."""
    kind, *details = column.encoding.split(":")
    if kind in ("str", "bytes"):
        return Encoding("text" if kind == "str" else kind)
    if kind != "ndarray" or len(details) > 2 or (details and details[0] not in _DTYPES.values()):
        return Encoding("")
    dtype = np.dtype(details[0]).newbyteorder("<") if details else None
    if len(details) < 2:
        return Encoding("array", dtype, prefix=_prefix)
    shape = _shape(details[1])
    if dtype is None or not shape or column.size != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{index}: column {column.name!r} holds {column.encoding!r} in {column.size} bytes, expected the lengths "
            f"of its axes and {np.dtype(details[0]).itemsize} bytes a number"
        )
    return Encoding("array", dtype, shape)


def _prefix(first: bytes, dtype: np.dtype[Any] | None) -> tuple[np.dtype[Any] | None, tuple[int, ...] | None, int]:
    """Reads the dtype, unless the column states it, and the lengths of the axes.

    The dtype is 1 byte. Another byte holds the number of axes and the width of their lengths, which follow.
    """
    used = 0
    if dtype is None:
        name = _DTYPES.get(first[0]) if first else None
        dtype, used = np.dtype(name).newbyteorder("<") if name else None, 1
    # The number of axes, and the logarithm of the width of their lengths.
    axes, width = divmod(first[used], 4) if used < len(first) else (0, 0)
    begin = used + 1
    end = begin + axes * 2**width
    if not axes or end > len(first):
        return dtype, None, end
    lengths = (first[begin + axis * 2**width :][: 2**width] for axis in range(axes))
    return dtype, tuple(int.from_bytes(length, "little") for length in lengths), end


def _shape(text: str) -> tuple[int, ...]:
    """The lengths of axes in the name of an encoding; empty if there are none."""
    lengths = text.split(",")
    return tuple(map(int, lengths)) if all(length.isdecimal() and len(length) < 20 for length in lengths) else ()


def _columns(config: dict[str, Any]) -> list[Column]:
    """The columns that a config describes. Raises KeyError, TypeError or ValueError if it does not describe any."""
    columns = [
        Column(str(name), str(encoding), None if size is None else operator.index(size))
        for name, encoding, size in zip(
            config["column_names"], config["column_encodings"], config["column_sizes"], strict=True
        )
    ]
    if any(column.size is not None and not 1 <= column.size < 2**32 for column in columns):
        raise ValueError("sizes outside of 1 to 2^32 - 1")
    return columns


def _recognises(path: Place, head: bytes) -> bool:
    index = _index_file(path)
    if index.name != _INDEX or not index.is_file():
        # Only shards have this name; without its index a shard is refused.
        return _is_shard(path) and not path.is_dir()
    # litdata's index.json has chunks instead.
    return b'"shards"' in read_head(index, _INDEX_HEAD_BYTES)


def _is_shard(path: Place) -> bool:
    """Whether a name is that of a shard, compressed or not."""
    return path.suffix == _SUFFIX or (path.suffix[1:] in _NAMES and PurePath(path.stem).suffix == _SUFFIX)


def _index_file(path: Place) -> Place:
    """The index of a folder, of a shard, or the index itself."""
    return path / _INDEX if path.is_dir() else path.with_name(_INDEX) if _is_shard(path) else path


def _open(path: Place, options: ReadOptions) -> list[Source]:
    index_file = _index_file(path)
    if not index_file.is_file():
        raise ValueError(f"{index_file}: is missing, expected it beside the MDS shards, whose columns it describes")
    index = read_json(index_file)
    only = path.name if _is_shard(path) and not path.is_dir() else None
    sources: list[Source] = []
    try:
        if index["version"] != _VERSION:
            raise ValueError(f"{index_file}: got version {index['version']!r}, expected {_VERSION}")
        for entry in index["shards"]:
            if only is None or only in _names(entry):
                sources.append(_shard(index_file, entry, options))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{index_file}: is damaged or not an index of MDS shards ({error!r})") from error
    if not sources and only is not None:
        raise ValueError(f"{path}: is not among the {len(index['shards'])} shards of {index_file}")
    return sources


def _names(entry: dict[str, Any]) -> list[Any]:
    """The names of a shard's file and, if there is one, of the compressed one."""
    packed = entry.get("zip_data")
    return [entry["raw_data"]["basename"], *([packed["basename"]] if packed else [])]


def _shard(index: Place, entry: dict[str, Any], options: ReadOptions) -> Source:
    if entry["format"] != "mds":
        raise ValueError(f"{index}: got shards of format {entry['format']!r}, expected 'mds'")
    raw, packed = entry["raw_data"], entry.get("zip_data")
    listed, compression = raw, None
    if packed and not is_file(index.parent / str(raw["basename"])):
        listed, compression = packed, _compression(index, entry)
    path = listed_file(index, listed["basename"])
    unpack = functools.partial(decompressed, path, compression) if compression else None
    if type(raw["bytes"]) is not int or type(entry["samples"]) is not int:
        raise TypeError(f"bytes {raw['bytes']!r}, samples {entry['samples']!r}")
    try:
        columns = _columns(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index}: got no columns of {raw['basename']} ({error!r})") from error
    layout = Layout(index, columns, [_encoding(index, column) for column in columns], options)
    shard = _Shard("mds", index, path, entry["samples"], layout, options, unpack=unpack, unpacked_size=raw["bytes"])
    if shard.size != listed["bytes"]:
        raise ValueError(f"{path}: got {shard.size} bytes, expected {listed['bytes']}, as {index.name} says")
    return shard


def _compression(index: Place, entry: dict[str, Any]) -> str:
    name = str(entry["compression"]).partition(":")[0]
    if name not in _COMPRESSIONS:
        raise ValueError(
            f"{index.parent / str(entry['zip_data']['basename'])}: is compressed ({entry['compression']}), expected "
            f"{' or '.join(_COMPRESSIONS)}, or {entry['raw_data']['basename']}: decompress it into its folder first"
        )
    return _COMPRESSIONS[name]


FORMAT = Format("mds", _open, _recognises, has_folders=True, has_header=True)
