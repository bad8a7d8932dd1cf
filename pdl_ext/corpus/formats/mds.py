"""MosaicML's folders of MDS shards, and their index.json.

A shard: the number of samples (u32), the byte that each begins at and the one where the last ends (u32), its columns as
JSON, then the samples. A sample: the sizes (u32) of those columns that have no fixed one, then what is in each column.
"""

from __future__ import annotations

import json
import math
import operator
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pdl_ext.corpus.reading.access import OpenFile, opened, read_at, read_head
from pdl_ext.corpus.reading.batches import BATCH_TOKENS, joined
from pdl_ext.corpus.reading.columns import TEXT_COLUMN, TOKEN_COLUMNS
from pdl_ext.corpus.reading.listing import listed_file, read_json
from pdl_ext.corpus.reading.tokenizer import TextEncoder
from pdl_ext.corpus.reading.width import BLOCK_BYTES, doubt_of_width
from pdl_ext.corpus.source import (
    Batch,
    Format,
    Part,
    ReadOptions,
    Source,
    as_signed,
    check_stated_dtype,
    count_dtype,
)
from pdl_ext.storage.place import Place, is_file

__all__ = ["FORMAT"]

_INDEX = "index.json"
_SUFFIX = ".mds"
_VERSION = 2
_HEAD_BYTES = 2**14
_WINDOW_BYTES = 2**20
_LARGEST_CONFIG = 2**20
# Samples whose offsets are read at once.
_OFFSETS = 2**14
# Samples whose bytes tell of what width their numbers are.
_SAMPLES = 8
# By the number that arrays begin with in columns that do not tell.
_DTYPES = {8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32", 64: "uint64", 65: "int64"}
# The dtype (1), the number of axes and the width of their lengths (1), the lengths (at most 63 of 8).
_LARGEST_PREFIX = 2 + 63 * 8


class _Column(NamedTuple):
    """What a column of the samples holds, and in how many bytes; None: each sample tells."""

    name: str
    encoding: str
    size: int | None


class _Numbers(NamedTuple):
    """Where a sample's numbers are in the file, and of what shape they are: each row of the last axis is a sequence."""

    first_byte: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def number(self) -> int:
        return math.prod(self.shape)


class _Layout:
    """The columns of a shard, and which of them are read.

    text: whether the tokens' column holds texts; dtypes: of each column's numbers, shapes: of its
    arrays, None if each sample tells; (-1,) of bytes.
    Raises ValueError that names the index, for columns that are missing or hold neither tokens nor text.
    """

    def __init__(self, index: Place, columns: list[_Column], options: ReadOptions) -> None:
        self.columns = columns
        self._index = index
        self._options = options
        self._numbers_of = {column.name: number for number, column in enumerate(columns)}
        policy = options.policy
        self.tokens = self._number(policy.column or self._found(), "--column")
        self.text = columns[self.tokens].encoding == "str"
        self.mask = None if policy.mask is None else self._number(policy.mask, "--mask")
        self.labels = None if policy.skip_prompt is None else self._number(policy.skip_prompt, "--skip-prompt")
        if self.text:
            self._check_text()
            return
        self.dtypes: dict[int, np.dtype[Any] | None] = {}
        self.shapes: dict[int, tuple[int, ...] | None] = {}
        for number in (self.tokens, self.mask, self.labels):
            if number is not None:
                self._check_numbers(columns[number], number == self.mask)
                kind, *details = columns[number].encoding.split(":")
                name = options.dtype if kind == "bytes" else details[0] if details else None
                self.dtypes[number] = np.dtype(name).newbyteorder("<") if name else None
                self.shapes[number] = (-1,) if kind == "bytes" else _shape(details[1]) if len(details) == 2 else None

    def _found(self) -> str:
        encodings = {column.name: column.encoding for column in self.columns}
        if self._options.tokenizer is not None and encodings.get(TEXT_COLUMN) == "str":
            return TEXT_COLUMN
        for name in TOKEN_COLUMNS:
            if encodings.get(name, "").startswith(("ndarray", "bytes")):
                return name
        defaults = (*TOKEN_COLUMNS, TEXT_COLUMN)
        got = [f"{name} ({encoding})" if name in defaults else name for name, encoding in encodings.items()]
        raise ValueError(
            f"{self._index}: got the columns {', '.join(got) or '(none)'}, expected arrays or bytes in one of "
            f"{', '.join(TOKEN_COLUMNS)}, or {TEXT_COLUMN} with a tokenizer: name another with --column"
        )

    def _number(self, name: str, option: str) -> int:
        if name not in self._numbers_of:
            names = ", ".join(self._numbers_of) or "(none)"
            raise ValueError(f"{self._index}: has no column {name!r}, expected one of {names} ({option})")
        return self._numbers_of[name]

    def _check_text(self) -> None:
        name = self.columns[self.tokens].name
        if self._options.tokenizer is None:
            raise ValueError(f"{self._index}: column {name!r} holds text, expected a tokenizer for it (--tokenizer)")
        for number in (self.mask, self.labels):
            if number is not None:
                raise ValueError(
                    f"{self._index}: got column {self.columns[number].name!r} beside texts, expected tokens in {name!r}"
                )

    def _check_numbers(self, column: _Column, is_mask: bool) -> None:
        kind, *details = column.encoding.split(":")
        if kind == "bytes" and not is_mask:
            if self._options.dtype is None:
                raise ValueError(
                    f"{self._index}: column {column.name!r} holds bytes, which do not tell of what dtype: give dtype "
                    "(--dtype), int64 for what llm-foundry wrote"
                )
            return
        if kind != "ndarray" or len(details) > 2 or (details and details[0] not in _DTYPES.values()):
            raise ValueError(
                f"{self._index}: column {column.name!r} holds {column.encoding!r}, expected arrays of integers"
                f"{'' if is_mask else ', or bytes'}"
            )
        if len(details) == 2:
            size = np.dtype(details[0]).itemsize
            shape = _shape(details[1])
            if not shape or column.size != math.prod(shape) * size:
                raise ValueError(
                    f"{self._index}: column {column.name!r} holds {column.encoding!r} in {column.size} bytes, expected "
                    f"the lengths of its axes and {size} bytes a number"
                )


class _Window:
    """A file, read from front to back in larger pieces than it is asked for."""

    def __init__(self, file: OpenFile, size: int, path: Place, ahead: int = _WINDOW_BYTES) -> None:
        self.file, self._size, self._path, self._ahead = file, size, path, ahead
        self._bytes = np.empty(0, np.uint8)
        self._start = 0

    def read(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Some bytes of the file. Raises ValueError if it ends before."""
        begin = offset - self._start
        if size > 0 and (begin < 0 or begin + size > self._bytes.size):
            # A new buffer, as what was read from the old one may still be in use.
            self._bytes = np.empty(max(min(self._ahead, self._size - offset), size), np.uint8)
            read_at(self.file, self._bytes, offset, self._path)
            self._start, begin = offset, 0
        return self._bytes[begin : begin + size]


class _Shard(Source):
    """A part is a range of samples, of which each is a sequence."""

    def __init__(self, index: Place, path: Place, samples: int, layout: _Layout, options: ReadOptions) -> None:
        super().__init__("mds", path, "text", (index,))
        self._layout = layout
        self._options = options
        self._policy = options.policy
        self._samples = samples
        with opened(path) as file:
            window = _Window(file, self.size, path, _HEAD_BYTES)
            self._check_head(window, index)
            if not layout.text:
                stated = self._dtype(window)
                self.dtype = count_dtype(stated)
                # One that is given may be that of labels alone, and a shard without samples may tell none.
                if samples and "bytes" not in (layout.columns[number].encoding for number in layout.dtypes):
                    check_stated_dtype(path, stated, options)

    def doubt(self) -> str | None:
        if self._layout.text or self._layout.columns[self._layout.tokens].encoding != "bytes":
            return None
        samples = sorted({self._samples * number // _SAMPLES for number in range(min(self._samples, _SAMPLES))})
        blocks, sizes = [], []
        with opened(self.path) as file:
            window = _Window(file, self.size, self.path, _HEAD_BYTES)
            for sample in samples:
                for _, places in self._read(window, Part(sample, sample + 1, 0)):
                    begin, end = places[self._layout.tokens]
                    blocks.append(window.read(begin, min(BLOCK_BYTES, end - begin)))
                    sizes.append(end - begin)
        return doubt_of_width(self.path, self.dtype, blocks, sizes, self._options)

    def parts(self, size: int) -> Iterator[Part]:
        per_part = max(1, self._samples * size // self.size)
        for start in range(0, self._samples, per_part):
            stop = min(start + per_part, self._samples)
            yield Part(start, stop, self.size * stop // self._samples - self.size * start // self._samples)

    def batches(self, part: Part) -> Iterator[Batch]:
        with opened(self.path) as file:
            # A window for each column, since those of a long sample are far from each other.
            windows = [_Window(file, self.size, self.path) for _ in range(3)]
            if self._layout.text:
                yield from TextEncoder(self._options, self.path).batches(self._texts(windows[0], part))
            else:
                pieces = (piece for sample in self._read(windows[0], part) for piece in self._pieces(windows, *sample))
                yield from joined(pieces)

    def _check_head(self, window: _Window, index: Place) -> None:
        (samples,) = _integers(window, 0, 1) if self.size >= 8 else (0,)
        end_of_offsets = 8 + 4 * samples
        if samples != self._samples or end_of_offsets > self.size:
            raise ValueError(
                f"{self.path}: got {samples} samples in {self.size} bytes, expected {self._samples}, as "
                f"{index.name} says"
            )
        (begin,) = _integers(window, 4, 1)
        (end,) = _integers(window, 4 + 4 * samples, 1)
        if not end_of_offsets <= begin <= end or end != self.size or begin - end_of_offsets > _LARGEST_CONFIG:
            raise ValueError(
                f"{self.path}: got samples from byte {begin} to {end}, expected from {end_of_offsets} or more to "
                f"{self.size}, where the file ends"
            )
        try:
            config = json.loads(window.read(end_of_offsets, begin - end_of_offsets).tobytes())
            columns = _columns(config)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.path}: cannot be read at byte {end_of_offsets} as JSON ({error!r})") from error
        if columns != self._layout.columns:
            raise ValueError(
                f"{self.path}: got the columns {columns}, expected {self._layout.columns}, as {index.name} says"
            )

    def _dtype(self, window: _Window) -> str:
        dtype = self._layout.dtypes[self._layout.tokens]
        if dtype is None:
            # Samples of another are read, too.
            samples = self._read(window, Part(0, min(self._samples, 1), 0))
            places = next(samples, None)
            dtype = np.dtype(np.int64) if places is None else self._numbers(window, *places, self._layout.tokens).dtype
        return dtype.name

    def _read(self, window: _Window, part: Part) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """The number of each sample, and where each of its columns begins and ends in the file."""
        sizes = [column.size for column in self._layout.columns]
        varying = sizes.count(None)
        first = 8 + 4 * self._samples
        offsets_window = _Window(window.file, self.size, self.path, 4 * _OFFSETS)
        for start in range(part.start, part.stop, _OFFSETS):
            stop = min(start + _OFFSETS, part.stop)
            offsets = _integers(offsets_window, 4 + 4 * start, stop - start + 1)
            for sample, begin, end in zip(range(start, stop), offsets, offsets[1:], strict=False):
                places = []
                position = begin + 4 * varying
                if first <= begin and position <= end <= self.size:
                    own = iter(_integers(window, begin, varying))
                    for size in sizes:
                        places.append((position, position := position + (next(own) if size is None else size)))
                if not places or position != end:
                    raise ValueError(
                        f"{self.path}: sample {sample} is damaged: got bytes {begin} to {end} of {self.size}, expected "
                        f"its columns to end at {position}"
                    )
                yield sample, places

    def _texts(self, window: _Window, part: Part) -> Iterator[str]:
        for sample, places in self._read(window, part):
            begin, end = places[self._layout.tokens]
            pieces = [window.read(at, min(_WINDOW_BYTES, end - at)) for at in range(begin, end, _WINDOW_BYTES)]
            try:
                yield b"".join(piece.tobytes() for piece in pieces).decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.path}: sample {sample} is not UTF-8 ({error})") from error

    def _pieces(self, windows: list[_Window], sample: int, places: list[tuple[int, int]]) -> Iterator[Batch]:
        layout = self._layout
        tokens = self._numbers(windows[0], sample, places, layout.tokens)
        others = []
        for number, window, no_target in (
            (layout.mask, windows[1], 0),
            (layout.labels, windows[2], self._policy.ignore_index),
        ):
            if number is not None:
                numbers = self._numbers(window, sample, places, number)
                name = layout.columns[number].name
                if numbers.number != tokens.number:
                    raise ValueError(
                        f"{self.path}: column {name!r} has {numbers.number} values in sample {sample}, expected "
                        f"{tokens.number}, one a token"
                    )
                # Of bytes no shape is known.
                if numbers.shape != tokens.shape and (-1,) not in (layout.shapes[number], layout.shapes[layout.tokens]):
                    raise ValueError(
                        f"{self.path}: column {name!r} has shape {numbers.shape} in sample {sample}, expected "
                        f"{tokens.shape}, that of the tokens"
                    )
                others.append((numbers, window, no_target))
        for start in range(0, tokens.number, BATCH_TOKENS):
            count = min(BATCH_TOKENS, tokens.number - start)
            is_target = None
            for numbers, window, no_target in others:
                kept = as_signed(_slice(numbers, window, start, count)) != no_target
                is_target = kept if is_target is None else is_target & kept
            if self._policy.targets == "shifted":
                row = tokens.shape[-1]
                is_target = np.ones(count, np.bool_) if is_target is None else is_target
                is_target[-start % row :: row] = False
            yield Batch(_slice(tokens, windows[0], start, count), is_target)

    def _numbers(self, window: _Window, sample: int, places: list[tuple[int, int]], number: int) -> _Numbers:
        begin, end = places[number]
        dtype, shape = self._layout.dtypes[number], self._layout.shapes[number]
        if shape is None:
            prefix = window.read(begin, min(_LARGEST_PREFIX, end - begin)).tobytes()
            used = 0
            if dtype is None:
                name = _DTYPES.get(prefix[0]) if prefix else None
                dtype, used = np.dtype(name).newbyteorder("<") if name else None, 1
            # The number of axes, and the logarithm of the width of their lengths.
            axes, width = divmod(prefix[used], 4) if used < len(prefix) else (0, 0)
            first = used + 1
            begin += first + axes * 2**width
            if axes and begin <= end:
                lengths = (prefix[first + axis * 2**width :][: 2**width] for axis in range(axes))
                shape = tuple(int.from_bytes(length, "little") for length in lengths)
        elif shape == (-1,) and dtype is not None:
            shape = ((end - begin) // dtype.itemsize,)
        if dtype is None or shape is None or begin + math.prod(shape) * dtype.itemsize != end:
            raise ValueError(
                f"{self.path}: column {self._layout.columns[number].name!r} of sample {sample} is damaged: expected an "
                f"array of integers in bytes {places[number][0]} to {end}"
            )
        return _Numbers(begin, shape, dtype)


def _shape(text: str) -> tuple[int, ...]:
    """The lengths of axes, as encodings name them; empty if it is none."""
    lengths = text.split(",")
    return tuple(map(int, lengths)) if all(length.isdecimal() and len(length) < 20 for length in lengths) else ()


def _integers(window: _Window, offset: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}I", window.read(offset, 4 * count).tobytes())


def _slice(numbers: _Numbers, window: _Window, start: int, count: int) -> NDArray[Any]:
    itemsize = numbers.dtype.itemsize
    return window.read(numbers.first_byte + start * itemsize, count * itemsize).view(numbers.dtype)


def _columns(config: dict[str, Any]) -> list[_Column]:
    """Raises KeyError, TypeError or ValueError for anything else than a description of columns."""
    columns = [
        _Column(str(name), str(encoding), None if size is None else operator.index(size))
        for name, encoding, size in zip(
            config["column_names"], config["column_encodings"], config["column_sizes"], strict=True
        )
    ]
    if any(column.size is not None and not 1 <= column.size < 2**32 for column in columns):
        raise ValueError("sizes outside of [1, 2^32)")
    return columns


def _recognises(path: Place, head: bytes) -> bool:
    index = _index_file(path)
    if index.name != _INDEX or not index.is_file():
        # Nothing else is called so, and without its index it is refused.
        return path.suffix == _SUFFIX and not path.is_dir()
    # litdata's index.json has chunks instead.
    return b'"shards"' in read_head(index, _HEAD_BYTES)


def _index_file(path: Place) -> Place:
    """The index of a folder, of a shard, or the index itself."""
    return path / _INDEX if path.is_dir() else path.with_name(_INDEX) if path.suffix == _SUFFIX else path


def _open(path: Place, options: ReadOptions) -> list[Source]:
    index_file = _index_file(path)
    if not index_file.is_file():
        raise ValueError(f"{index_file}: is missing, expected it beside the MDS shards, of which it tells the columns")
    index = read_json(index_file)
    only = None if path.is_dir() or path.suffix != _SUFFIX else path.name
    sources: list[Source] = []
    try:
        if index["version"] != _VERSION:
            raise ValueError(f"{index_file}: got version {index['version']!r}, expected {_VERSION}")
        for entry in index["shards"]:
            if only in (None, entry["raw_data"]["basename"]):
                sources.append(_shard(index_file, entry, options))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{index_file}: is damaged or no index of MDS shards ({error!r})") from error
    if not sources and only is not None:
        raise ValueError(f"{path}: is not among the {len(index['shards'])} shards of {index_file}")
    return sources


def _shard(index: Place, entry: dict[str, Any], options: ReadOptions) -> Source:
    if entry["format"] != "mds":
        raise ValueError(f"{index}: got shards of format {entry['format']!r}, expected 'mds'")
    raw, packed = entry["raw_data"], entry.get("zip_data")
    if packed and not is_file(index.parent / raw["basename"]):
        raise ValueError(
            f"{index.parent / packed['basename']}: is compressed ({entry['compression']}), expected "
            f"{raw['basename']}: decompress it into its folder first"
        )
    path = listed_file(index, raw["basename"])
    if type(entry["samples"]) is not int:
        raise TypeError(f"samples {entry['samples']!r}")
    try:
        columns = _columns(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index}: got no columns of {raw['basename']} ({error!r})") from error
    shard = _Shard(index, path, entry["samples"], _Layout(index, columns, options), options)
    if shard.size != raw["bytes"]:
        raise ValueError(f"{path}: got {shard.size} bytes, expected {raw['bytes']}, as {index.name} says")
    return shard


FORMAT = Format("mds", _open, _recognises, has_folders=True, has_header=True)
