"""litdata's folders: chunks of consecutive items, each a sequence, and index.json, which describes them.

A chunk: the number of items (u32), the first byte of each item and the end of the last one (u32), then the items. Items
for its TokensLoader are tokens only. Others are samples with columns, which are the leaves of a Python object, named by
their keys in it. A chunk may be compressed by zstd, as a whole or some items at a time.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pdl_ext.corpus.reading.access import read_array, read_head
from pdl_ext.corpus.reading.compression import decompressed
from pdl_ext.corpus.reading.flat import AscendingNumbers, FlatSource
from pdl_ext.corpus.reading.listing import read_json
from pdl_ext.corpus.reading.samples import Column, Encoding, Layout, SampleSource
from pdl_ext.corpus.source import TOKEN_DTYPES, Format, ReadOptions, Source, Stamp, token_dtype
from pdl_ext.storage.place import Place, is_file

__all__ = ["FORMAT"]

_INDEX = "index.json"
# litdata's numbers of dtypes. Most dtypes of tensors have two names, of which one is written.
_TENSORS = {11: "uint8", 12: "int8", 13: "int16", 14: "int16", 15: "int32", 16: "int32", 17: "int64", 18: "int64"}
_TENSORS[20] = "uint16"
_ARRAYS = {0: "int8", 1: "int16", 2: "int32", 3: "int64", 4: "uint8", 5: "uint16", 6: "uint32"}
# The header of a chunk whose items are compressed some at a time: magic, version, flags and three numbers. These are
# the numbers of items, of items in a batch, and of batches. Then come the positions of the items, from 0 on, and 24
# bytes per batch.
_BATCHES = struct.Struct("<8sHHIII")
_BATCHES_MAGIC, _BATCHES_VERSION = b"LDFZ01\0\0", 1
_BATCH_BYTES = 24
# The number of positions that are read at once.
_OFFSETS = 2**16


def _recognises(path: Place, head: bytes) -> bool:
    # Without its index a chunk is refused, since its header would be read as ids.
    return _is_index(_index_file(path)) or (path.suffix == ".bin" and _is_chunk(path, head))


def _is_chunk(path: Place, head: bytes) -> bool:
    """Whether a file has the header of a chunk, which ids hardly ever have by chance."""
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
    items, chunks = _index(index_file, Stamp.of(index_file))
    if path.suffix == ".bin":
        if path.name not in chunks:
            raise ValueError(f"{path}: is not among the {len(chunks)} chunks of {index_file}")
        chunks = {path.name: chunks[path.name]}
    if items.stream is not None and items.packing is None:
        return [
            _token_stream(_chunk(index_file, name), number, tokens, items.stream, index_file, options)
            for name, (number, tokens) in chunks.items()
        ]
    encodings = list(map(_encoding, items.formats))
    columns = [Column(name, form, None) for name, form in zip(_names(items, encodings), items.formats, strict=True)]
    layout = Layout(index_file, columns, encodings, options, bare=items.stream is not None)
    return [
        SampleSource("litdata", index_file, path, number, layout, options, unpack=_unpack(path, items.packing))
        for path, number in ((_chunk(index_file, name), number) for name, (number, _) in chunks.items())
    ]


class _Items(NamedTuple):
    """A description of the items of all chunks."""

    # The dtype of items that are tokens only, None for others.
    stream: str | None
    # The format of each leaf.
    formats: list[str]
    # The position of the leaves in the object.
    spec: Any
    # The unit of compression, a "chunk" or a "batch" of items; None without compression.
    packing: str | None


@functools.lru_cache(maxsize=1)
def _index(path: Place, stamp: Stamp) -> tuple[_Items, dict[str, tuple[int, int | None]]]:
    """The description of the items, and for each chunk, by name, the numbers of its items and, if stated, tokens."""
    index = read_json(path)
    try:
        config = index["config"]
        data_format, compression = config["data_format"], config["compression"]
        encryption, loader, spec = (config.get(name) for name in ("encryption", "item_loader", "data_spec"))
        # Older versions had no other unit.
        packing = (config.get("compression_level") or "chunk") if compression else None
        chunks = {
            str(chunk["filename"]): (int(chunk["chunk_size"]), None if chunk["dim"] is None else int(chunk["dim"]))
            for chunk in index["chunks"]
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: is damaged or not an index of litdata ({type(error).__name__}: {error})") from error
    if encryption:
        raise ValueError(
            f"{path}: got chunks with encryption {encryption!r}, expected none: write them anew without it"
        )
    if compression and (str(compression).partition(":")[0] != "zstd" or packing not in ("chunk", "batch")):
        raise ValueError(
            f"{path}: got chunks with compression {compression!r} of each {packing}, expected 'zstd' of a chunk or a "
            "batch: write them anew so, or without it"
        )
    if len(chunks) != len(index["chunks"]):
        ((name, times),) = collections.Counter(str(chunk["filename"]) for chunk in index["chunks"]).most_common(1)
        raise ValueError(f"{path}: lists {name} {times} times, expected each chunk once")
    for name in chunks:
        if not name or name != PurePath(name).name:
            raise ValueError(f"{path}: got chunk {name!r}, expected a name of a file beside it")
    if not isinstance(data_format, list) or not all(isinstance(name, str) for name in data_format):
        raise ValueError(f"{path}: got items of {data_format!r}, expected a list of their formats")
    if loader not in (None, "TokensLoader", "PyTreeLoader"):
        raise ValueError(f"{path}: got items for {loader!r}, expected those for TokensLoader or PyTreeLoader")
    # An item's size precedes it, unless it is for TokensLoader, or a tensor from versions that do not record the
    # loader.
    is_stream = loader == "TokensLoader" or (
        loader is None and len(data_format) == 1 and data_format[0].startswith("no_header_tensor:")
    )
    return _Items(_stream_dtype(path, data_format, loader) if is_stream else None, data_format, spec, packing), chunks


def _stream_dtype(path: Place, data_format: list[str], loader: Any) -> str:
    encoding = _encoding(data_format[0]) if len(data_format) == 1 else Encoding("")
    if encoding.dtype is None:
        raise ValueError(
            f"{path}: got items of {data_format!r} for {loader}, expected those of one tensor or array of one "
            f"dimension, of a dtype that is one of {', '.join(TOKEN_DTYPES)}. Their numbers are "
            f"{sorted(_TENSORS)} and {sorted(_ARRAYS)}"
        )
    return encoding.dtype.name


def _encoding(form: str) -> Encoding:
    """How a leaf is read, by litdata's name of its format."""
    kind, _, number = form.partition(":")
    if kind in ("str", "bytes"):
        return Encoding("text" if kind == "str" else kind)
    if kind in ("tensor", "numpy"):
        return Encoding("array", prefix=functools.partial(_prefix, _TENSORS if kind == "tensor" else _ARRAYS))
    known = {"no_header_tensor": _TENSORS, "no_header_numpy": _ARRAYS}.get(kind, {})
    dtypes = {str(of_litdata): name for of_litdata, name in known.items()}
    return Encoding("array", token_dtype(dtypes[number]), (-1,)) if number in dtypes else Encoding("")


def _prefix(
    dtypes: dict[int, str], first: bytes, dtype: np.dtype[Any] | None
) -> tuple[np.dtype[Any] | None, tuple[int, ...] | None, int]:
    """Reads the number of the dtype, the number of axes, and their lengths, all u32.

    Newer versions write those of tensors in big-endian order.
    """
    for order in "<>":
        number, axes = struct.unpack_from(f"{order}II", first) if len(first) >= 8 else (-1, 0)
        end = 8 + 4 * axes
        if number in dtypes and axes and end <= len(first):
            return token_dtype(dtypes[number]), struct.unpack_from(f"{order}{axes}I", first, 8), end
    return None, None, 0


def _names(items: _Items, encodings: list[Encoding]) -> list[str]:
    """The path of keys and positions to each leaf.

    An item that is a single leaf gets the usual name of such a column.
    """
    names = None
    with contextlib.suppress(ValueError, TypeError, KeyError, IndexError, RecursionError):
        names = list(_leaves(json.loads(items.spec)[1], ""))
    if names is None or len(names) != len(encodings) or len(set(names)) != len(names):
        names = list(map(str, range(len(encodings)))) if len(encodings) != 1 else [""]
    return ["text" if encodings[0].kind == "text" else "tokens"] if names == [""] else names


def _leaves(spec: dict[str, Any], name: str) -> Iterator[str]:
    if spec["type"] is None:
        yield name
        return
    children = spec["children_spec"]
    keys = json.loads(spec["context"])
    if not isinstance(keys, list) or len(keys) != len(children):
        keys = range(len(children))
    for key, child in zip(keys, children, strict=True):
        yield from _leaves(child, f"{name}.{key}" if name else str(key))


def _chunk(index_file: Place, name: str) -> Place:
    path = index_file.with_name(name)
    # This also covers names that no file can have.
    if not is_file(path):
        raise ValueError(f"{path}: is missing, expected it beside {index_file}, which lists it")
    return path


def _unpack(path: Place, packing: str | None) -> Callable[[], Iterator[bytes]] | None:
    if packing is None:
        return None
    return functools.partial(_batches, path) if packing == "batch" else functools.partial(decompressed, path, "zstd")


def _batches(path: Place) -> Iterator[bytes]:
    """The uncompressed content of a chunk whose items are compressed some at a time."""
    head = read_head(path, _BATCHES.size)
    fields = _BATCHES.unpack(head) if len(head) == _BATCHES.size else (b"", 0, 0, 0, 0, 0)
    magic, version, _, items, _, batches = fields
    if magic != _BATCHES_MAGIC or version != _BATCHES_VERSION:
        raise ValueError(f"{path}: begins with {head!r}, expected litdata's mark of compressed batches, version 1")
    first = 4 * (items + 2)
    yield np.array([items], "<u4").tobytes()
    for start in range(0, items + 1, _OFFSETS):
        count = min(_OFFSETS, items + 1 - start)
        yield (read_array(path, "<u4", _BATCHES.size + 4 * start, count) + np.uint32(first % 2**32)).tobytes()
    yield from decompressed(path, "zstd", start=_BATCHES.size + 4 * (items + 1) + _BATCH_BYTES * batches)


def _token_stream(
    path: Place, items: int, tokens: int | None, dtype: str, index_file: Place, options: ReadOptions
) -> FlatSource:
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
            f"{path}: its items are from byte {begin} to {offsets.last}, expected from {first_byte} to {size}, the "
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
