"""litdata's folders of token streams: chunks of items one after the other, each a sequence, and index.json.

A chunk: the number of items (u32), the byte that each begins at and the one where the last ends (u32), then the items.
index.json tells what an item is; only those that are nothing but tokens are read.
"""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdl_ext.corpus.reading.access import read_array, read_head
from pdl_ext.corpus.reading.flat import AscendingNumbers, FlatSource
from pdl_ext.corpus.reading.listing import read_json
from pdl_ext.corpus.source import TOKEN_DTYPES, Format, ReadOptions, Source, Stamp, token_dtype
from pdl_ext.storage.place import Place, is_file

__all__ = ["FORMAT"]

_INDEX = "index.json"
# By litdata's own numbers of dtypes. Those of tensors have two names for most, one of which is written.
_TENSORS = {11: "uint8", 12: "int8", 13: "int16", 14: "int16", 15: "int32", 16: "int32", 17: "int64", 18: "int64"}
_TENSORS[20] = "uint16"
_ARRAYS = {0: "int8", 1: "int16", 2: "int32", 3: "int64", 4: "uint8", 5: "uint16", 6: "uint32"}


def _recognises(path: Place, head: bytes) -> bool:
    # Without its index a chunk is refused: its header would pass for ids.
    return _is_index(_index_file(path)) or (path.suffix == ".bin" and _is_chunk(path, head))


def _is_chunk(path: Place, head: bytes) -> bool:
    """Whether a file has the header of a chunk, which hardly any ids are by chance."""
    items, begin = np.frombuffer(head[:8], "<u4").tolist() if len(head) > 8 else (0, 0)
    if items == 0 or begin != 4 * (items + 2) or begin > Stamp.of(path).size:
        return False
    try:
        return AscendingNumbers(path, "<u4", 4, items + 1).last == Stamp.of(path).size
    except ValueError:
        return False


def _index_file(path: Place) -> Place:
    """The index of a folder, of a chunk, or the index itself."""
    return path / _INDEX if path.is_dir() else path.with_name(_INDEX) if path.suffix == ".bin" else path


def _is_index(path: Place) -> bool:
    # MosaicML's index.json has shards instead.
    return path.name == _INDEX and path.is_file() and re.search(rb'"chunks"\s*:', read_head(path, 4096)) is not None


def _open(path: Place, options: ReadOptions) -> list[Source]:
    index_file = _index_file(path)
    if not index_file.is_file():
        raise ValueError(f"{index_file}: is missing, expected it beside litdata's chunk {path.name}")
    dtype, chunks = _index(index_file, Stamp.of(index_file))
    if path.suffix == ".bin":
        if path.name not in chunks:
            raise ValueError(f"{path}: is not among the {len(chunks)} chunks of {index_file}")
        chunks = {path.name: chunks[path.name]}
    return [
        _source(index_file.with_name(name), items, tokens, dtype, index_file, options)
        for name, (items, tokens) in chunks.items()
    ]


@functools.lru_cache(maxsize=1)
def _index(path: Place, stamp: Stamp) -> tuple[str, dict[str, tuple[int, int | None]]]:
    """The dtype of the tokens, and of each chunk by its name the number of items and, where it is told, of tokens."""
    index = read_json(path)
    try:
        config = index["config"]
        data_format, compression = config["data_format"], config["compression"]
        encryption, loader = config.get("encryption"), config.get("item_loader")
        chunks = {
            str(chunk["filename"]): (int(chunk["chunk_size"]), None if chunk["dim"] is None else int(chunk["dim"]))
            for chunk in index["chunks"]
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: is damaged or no index of litdata ({type(error).__name__}: {error})") from error
    for name, value in (("compression", compression), ("encryption", encryption)):
        if value:
            raise ValueError(f"{path}: got chunks with {name} {value!r}, expected none: write them anew without it")
    if len(chunks) != len(index["chunks"]):
        ((name, times),) = collections.Counter(str(chunk["filename"]) for chunk in index["chunks"]).most_common(1)
        raise ValueError(f"{path}: lists {name} {times} times, expected each chunk once")
    for name in chunks:
        if not name or name != PurePath(name).name:
            raise ValueError(f"{path}: got chunk {name!r}, expected a name of a file beside it")
    return _dtype(path, data_format, loader), chunks


def _dtype(path: Place, data_format: Any, loader: Any) -> str:
    kind, _, number = data_format[0].partition(":") if _is_one_name(data_format) else ("", "", "")
    # An item's size stands before it, unless it is for TokensLoader, or a tensor of a time before loaders were told of.
    is_bare = loader == "TokensLoader" or (loader is None and kind == "no_header_tensor")
    known = {"no_header_tensor": _TENSORS, "no_header_numpy": _ARRAYS} if is_bare else {}
    if kind not in known or not number.isdecimal():
        raise ValueError(
            f"{path}: got items of {data_format!r} for {loader}, expected those of one tensor or array of one "
            "dimension for TokensLoader"
        )
    dtypes = {str(of_torch): name for of_torch, name in known[kind].items()}
    if number not in dtypes:
        raise ValueError(
            f"{path}: got items of {data_format[0]!r}, a dtype that is not one of {', '.join(TOKEN_DTYPES)} "
            f"(those have the numbers {sorted(known[kind])})"
        )
    return dtypes[number]


def _is_one_name(data_format: Any) -> bool:
    return isinstance(data_format, list) and len(data_format) == 1 and isinstance(data_format[0], str)


def _source(
    path: Place, items: int, tokens: int | None, dtype: str, index_file: Place, options: ReadOptions
) -> FlatSource:
    # Also of a name that none can have.
    if not is_file(path):
        raise ValueError(f"{path}: is missing, expected it beside {index_file}, which lists it")
    size = Stamp.of(path).size
    first_byte = 4 * (items + 2)
    if items < 0 or size < first_byte:
        raise ValueError(f"{path}: got {size} bytes, expected {first_byte} for the header of {items} items or more")
    stated, begin = read_array(path, "<u4", 0, 2).tolist()
    if stated != items:
        raise ValueError(f"{path}: states {stated} items, expected the {items} of {index_file}")
    offsets = AscendingNumbers(path, "<u4", 4, items + 1)
    if begin != first_byte or offsets.last != size:
        raise ValueError(
            f"{path}: its items lie from byte {begin} to {offsets.last}, expected from {first_byte} to {size}, the "
            "file's end"
        )
    itemsize = token_dtype(dtype).itemsize
    return FlatSource(
        "litdata",
        path,
        dtype,
        options,
        first_byte=first_byte,
        tokens=(size - first_byte) // itemsize if tokens is None else tokens,
        starts_between=_item_starts(path, offsets, first_byte, itemsize),
        companions=(index_file,),
    )


def _item_starts(
    path: Place, offsets: AscendingNumbers, first_byte: int, itemsize: int
) -> Callable[[int, int], NDArray[np.int64]]:
    def starts(start: int, stop: int) -> NDArray[np.int64]:
        begins = offsets.distinct_between(first_byte + start * itemsize, first_byte + stop * itemsize) - first_byte
        if (begins % itemsize).any():
            raise ValueError(f"{path}: got an item that begins inside a token, expected a multiple of {itemsize} bytes")
        return begins // itemsize

    return starts


FORMAT = Format("litdata", _open, _recognises, has_folders=True, has_header=True)
