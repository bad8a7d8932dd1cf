"""Shards of samples with columns: the common part of MDS and litdata.

A shard begins with the number of samples, the first byte of each, and the end of the last, all u32. Data of the
format's own follow, then the samples. A sample has the sizes (u32) of those columns without a fixed size, then the
content of each column. A shard may be compressed as a whole.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pdl_ext.corpus.reading.access import OpenFile, opened, read_at
from pdl_ext.corpus.reading.batches import BATCH_TOKENS, joined
from pdl_ext.corpus.reading.columns import TEXT_COLUMN, TOKEN_COLUMNS
from pdl_ext.corpus.reading.tokenizer import PlacedText, TextEncoder
from pdl_ext.corpus.reading.width import BLOCK_BYTES, doubt_of_width
from pdl_ext.corpus.source import (
    Batch,
    Part,
    ReadOptions,
    Sample,
    Source,
    as_signed,
    check_stated_dtype,
    count_dtype,
)
from pdl_ext.storage.place import Place

__all__ = ["Column", "Encoding", "Layout", "Reader", "SampleSource"]

_HEAD_BYTES = 2**14
_WINDOW_BYTES = 2**20
# Samples whose offsets are read at once.
_OFFSETS = 2**14
# The number of samples by which the width of their numbers is checked.
_SAMPLES = 8
# Samples of a compressed shard by which the tokens in the rest are estimated.
_SAMPLED = 64
# The parts of a compressed shard that are held: everything before the samples, and one sample.
_LARGEST_PACKED_HEAD = 2**26
_LARGEST_PACKED_SAMPLE = 2**26
# The dtype of an array and the lengths of its axes: at most 63 of 8 bytes.
_LARGEST_PREFIX = 16 + 63 * 8


class Column(NamedTuple):
    """A column of the samples, its encoding, and its size in bytes; None: each sample states its own."""

    name: str
    encoding: str
    size: int | None


class Encoding(NamedTuple):
    """How the content of a column is read."""

    # "array", "bytes", "text", or "" for a column with neither tokens nor text.
    kind: str
    # The dtype of an array's numbers, None if each sample states its own.
    dtype: np.dtype[Any] | None = None
    # The shape of the arrays, None if each sample states its own, (-1,) for one axis of any length.
    shape: tuple[int, ...] | None = None
    # Reads dtype and shape from a sample's first bytes: the dtype, the shape (None if damaged), and the bytes used.
    prefix: Callable[[bytes, np.dtype[Any] | None], tuple[np.dtype[Any] | None, tuple[int, ...] | None, int]] = (
        lambda first, dtype: (dtype, None, 0)
    )


class _Numbers(NamedTuple):
    """The position of a sample's numbers in the file, and their shape: each row of the last axis is a sequence."""

    first_byte: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def number(self) -> int:
        return math.prod(self.shape)


class Layout:
    """The columns of a shard, and which of them are read.

    columns, encodings: equally many; text: whether the tokens' column holds texts; listing: the file that describes the
    columns, for errors.
    Raises ValueError that names the listing, for columns that are missing or hold neither tokens nor text.
    """

    def __init__(
        self,
        listing: Place,
        columns: list[Column],
        encodings: list[Encoding],
        options: ReadOptions,
        *,
        bare: bool = False,
    ) -> None:
        self.columns = columns
        self.encodings = encodings
        # Whether a sample is its only column, without a size before it.
        self.bare = bare
        self._listing = listing
        self._options = options
        self._numbers_of = {column.name: number for number, column in enumerate(columns)}
        policy = options.policy
        self.tokens = self._number(policy.column or self._found(), "--column")
        self.text = encodings[self.tokens].kind == "text"
        self.mask = None if policy.mask is None else self._number(policy.mask, "--mask")
        self.labels = None if policy.skip_prompt is None else self._number(policy.skip_prompt, "--skip-prompt")
        # The columns that are read, with the user's dtype if they have none of their own.
        self.read: dict[int, Encoding] = {}
        if self.text:
            self._check_text()
            return
        for number in (self.tokens, self.mask, self.labels):
            if number is not None:
                self._check_numbers(number, number == self.mask)
                self.read[number] = self._of_bytes() if encodings[number].kind == "bytes" else encodings[number]

    def _of_bytes(self) -> Encoding:
        dtype = self._options.dtype
        return Encoding("bytes", None if dtype is None else np.dtype(dtype).newbyteorder("<"), (-1,))

    def _found(self) -> str:
        kinds = {column.name: encoding.kind for column, encoding in zip(self.columns, self.encodings, strict=True)}
        if self._options.tokenizer is not None and kinds.get(TEXT_COLUMN) == "text":
            return TEXT_COLUMN
        for name in TOKEN_COLUMNS:
            if kinds.get(name) in ("array", "bytes"):
                return name
        defaults = (*TOKEN_COLUMNS, TEXT_COLUMN)
        got = [f"{name} ({encoding})" if name in defaults else name for name, encoding, _ in self.columns]
        raise ValueError(
            f"{self._listing}: got the columns {', '.join(got) or '(none)'}, expected arrays or bytes in one of "
            f"{', '.join(TOKEN_COLUMNS)}, or {TEXT_COLUMN} with a tokenizer: name another with --column"
        )

    def _number(self, name: str, option: str) -> int:
        if name not in self._numbers_of:
            names = ", ".join(self._numbers_of) or "(none)"
            raise ValueError(f"{self._listing}: has no column {name!r}, expected one of {names} ({option})")
        return self._numbers_of[name]

    def _check_text(self) -> None:
        name = self.columns[self.tokens].name
        if self._options.tokenizer is None:
            raise ValueError(f"{self._listing}: column {name!r} holds text, expected a tokenizer for it (--tokenizer)")
        for number in (self.mask, self.labels):
            if number is not None:
                raise ValueError(
                    f"{self._listing}: got column {self.columns[number].name!r} beside texts, expected tokens in "
                    f"{name!r}"
                )

    def _check_numbers(self, number: int, is_mask: bool) -> None:
        column, kind = self.columns[number], self.encodings[number].kind
        if kind == "bytes" and not is_mask:
            if self._options.dtype is None:
                raise ValueError(
                    f"{self._listing}: column {column.name!r} holds bytes of unknown dtype: give dtype (--dtype), "
                    "int64 for files of llm-foundry"
                )
        elif kind != "array":
            raise ValueError(
                f"{self._listing}: column {column.name!r} holds {column.encoding!r}, expected arrays of integers"
                f"{'' if is_mask else ', or bytes'}"
            )


class _Window:
    """A file that is read from front to back, in larger pieces than requested."""

    def __init__(self, file: OpenFile, size: int, path: Place, ahead: int = _WINDOW_BYTES) -> None:
        self.file, self._size, self._path, self._ahead = file, size, path, ahead
        self._bytes = np.empty(0, np.uint8)
        self._start = 0

    def read(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Some bytes of the file. Raises ValueError if it ends before."""
        begin = offset - self._start
        if size > 0 and (begin < 0 or begin + size > self._bytes.size):
            # A new buffer, since views of the old one may still be in use.
            self._bytes = np.empty(max(min(self._ahead, self._size - offset), size), np.uint8)
            read_at(self.file, self._bytes, offset, self._path)
            self._start, begin = offset, 0
        return self._bytes[begin : begin + size]


class _Unpacked:
    """The content of a compressed file, read from front to back.

    It holds the head, and everything since the last `drop_before`.
    """

    def __init__(self, path: Place, blocks: Iterator[bytes]) -> None:
        self._path = path
        self._blocks = blocks
        self._head = np.empty(0, np.uint8)
        self._held = bytearray()
        self._start = 0

    def keep_head(self, size: int) -> None:
        """Keeps the first bytes from now on. Raises ValueError that names the file if they are too many."""
        if size > _LARGEST_PACKED_HEAD:
            raise ValueError(
                f"{self._path}: got {size} bytes before its samples, expected {_LARGEST_PACKED_HEAD} at most in a "
                "compressed shard: decompress it first"
            )
        self._head = self.read(0, size)
        self.drop_before(size)

    def drop_before(self, offset: int) -> None:
        """Drops the content before a byte. Raises ValueError if the content ends before it."""
        while self._start + len(self._held) < offset:
            self._start += len(self._held)
            self._held.clear()
            self._hold_more(offset)
        if offset > self._start:
            del self._held[: offset - self._start]
            self._start = offset

    def read(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Some bytes. Raises ValueError if they were dropped, or if the content ends before."""
        end = offset + size
        if end <= self._head.size:
            return self._head[offset:end]
        if offset < self._start:
            raise ValueError(f"{self._path}: got a sample at byte {offset} behind those of {self._start}")
        while self._start + len(self._held) < end:
            self._hold_more(end)
        begin = offset - self._start
        return np.frombuffer(memoryview(self._held)[begin : begin + size], np.uint8).copy()

    def _hold_more(self, expected: int) -> None:
        block = next(self._blocks, None)
        if block is None:
            raise ValueError(
                f"{self._path}: ends at byte {self._start + len(self._held)} of its decompressed content, expected "
                f"{expected} or more"
            )
        self._held += block

    def check_end(self, size: int) -> None:
        """Raises ValueError that names the file unless it decompresses to this number of bytes."""
        end = self._start + len(self._held) + sum(map(len, self._blocks))
        if end != size:
            raise ValueError(f"{self._path}: decompresses to {end} bytes, expected {size}")


Reader: TypeAlias = _Window | _Unpacked


class SampleSource(Source):
    """A part is a range of samples, each of which is a sequence; a compressed shard is one part.

    listing: the file that lists the shard with its number of samples.
    unpack: returns the blocks of a compressed shard from its beginning.
    unpacked_size: of a compressed shard, None if unknown.
    """

    def __init__(
        self,
        format_name: str,
        listing: Place,
        path: Place,
        samples: int,
        layout: Layout,
        options: ReadOptions,
        *,
        unpack: Callable[[], Iterator[bytes]] | None = None,
        unpacked_size: int | None = None,
    ) -> None:
        super().__init__(format_name, path, "text", (listing,))
        self.listing = listing
        self._layout = layout
        self._options = options
        self._policy = options.policy
        self._samples = samples
        self._unpack = unpack
        with opened(path) as file:
            window = self._window(file, _HEAD_BYTES)
            self._unpacked_size = self._checked_head(window, unpacked_size if unpack else self.size)
            if not layout.text:
                stated = self._dtype(window)
                self.dtype = count_dtype(stated)
                # A given dtype may be meant for labels alone, and a shard without samples may state none.
                if samples and "bytes" not in (encoding.kind for encoding in layout.read.values()):
                    check_stated_dtype(path, stated, options)

    @property
    def columns(self) -> list[Column]:
        """The columns that the listing describes."""
        return self._layout.columns

    def check_own(self, window: Reader, begin: int, end: int) -> None:
        """Raises ValueError for invalid data between offsets and samples. Here there must be none."""
        if begin != end:
            raise ValueError(f"{self.path}: its samples are from byte {end} on, expected from {begin}")

    def doubt(self) -> str | None:
        if self._layout.text or self._layout.encodings[self._layout.tokens].kind != "bytes":
            return None
        samples = sorted({self._samples * number // _SAMPLES for number in range(min(self._samples, _SAMPLES))})
        if self._unpack:
            samples = list(range(len(samples)))
        blocks, sizes = [], []
        with opened(self.path) as file:
            window = self._window(file, _HEAD_BYTES)
            for sample in samples:
                for _, places in self._read(window, Part(sample, sample + 1, 0)):
                    begin, end = places[self._layout.tokens]
                    blocks.append(window.read(begin, min(BLOCK_BYTES, end - begin)))
                    sizes.append(end - begin)
        return doubt_of_width(self.path, self.dtype, blocks, sizes, self._options)

    def sample(self) -> Sample:
        if not self._unpack or not self._samples:
            return super().sample()
        samples = min(self._samples, _SAMPLED)
        tokens = sum(batch.tokens.size for batch in self.batches(Part(0, samples, 0)))
        return Sample(tokens, self.size * samples // self._samples)

    def parts(self, size: int) -> Iterator[Part]:
        per_part = max(1, self._samples if self._unpack else self._samples * size // self.size)
        for start in range(0, self._samples, per_part):
            stop = min(start + per_part, self._samples)
            yield Part(start, stop, self.size * stop // self._samples - self.size * start // self._samples)

    def batches(self, part: Part) -> Iterator[Batch]:
        with opened(self.path) as file:
            windows = self._windows(file)
            if self._layout.text:
                yield from TextEncoder(self._options, self.path).batches(self._texts(windows[0], part))
            else:
                pieces = (piece for sample in self._read(windows[0], part) for piece in self._pieces(windows, *sample))
                yield from joined(pieces)
            if isinstance(windows[0], _Unpacked) and part.stop == self._samples:
                windows[0].check_end(self._unpacked_size)

    def placed_batches(self, part: Part) -> Iterator[tuple[object, Batch]]:
        with opened(self.path) as file:
            windows = self._windows(file)
            if self._layout.text:
                encoder = TextEncoder(self._options, self.path)
                yield from ((text.place, encoder.encode([text])) for text in self._texts(windows[0], part))
                return
            for sample, places in self._read(windows[0], part):
                for batch in joined(self._pieces(windows, sample, places)):
                    yield f"{self.path}: sample {sample}", batch

    def _windows(self, file: OpenFile) -> list[Reader]:
        # One for each column, since those of a long sample are far from each other.
        return [self._window(file)] * 3 if self._unpack else [self._window(file) for _ in range(3)]

    def _window(self, file: OpenFile, ahead: int = _WINDOW_BYTES) -> Reader:
        if self._unpack is None:
            return _Window(file, self.size, self.path, ahead)
        unpacked = _Unpacked(self.path, self._unpack())
        (samples,) = _integers(unpacked, 0, 1)
        unpacked.keep_head(8 + 4 * samples)
        return unpacked

    def _checked_head(self, window: Reader, size: int | None) -> int:
        """The number of bytes of the shard, decompressed; `size` if that is known."""
        (samples,) = _integers(window, 0, 1) if size is None or size >= 8 else (0,)
        end_of_offsets = 8 + 4 * samples
        if samples != self._samples or (size is not None and end_of_offsets > size):
            raise ValueError(
                f"{self.path}: got {samples} samples in {size} bytes, expected {self._samples}, as "
                f"{self.listing.name} says"
            )
        (begin,) = _integers(window, 4, 1)
        (end,) = _integers(window, 4 + 4 * samples, 1)
        if not end_of_offsets <= begin <= end or size not in (None, end):
            raise ValueError(
                f"{self.path}: got samples from byte {begin} to {end}, expected from {end_of_offsets} or more to "
                f"{size}, where the file ends"
            )
        self.check_own(window, end_of_offsets, begin)
        return end

    def _dtype(self, window: Reader) -> str:
        dtype = self._layout.read[self._layout.tokens].dtype
        if dtype is None:
            # Samples of another dtype are read, too.
            samples = self._read(window, Part(0, min(self._samples, 1), 0))
            places = next(samples, None)
            dtype = np.dtype(np.int64) if places is None else self._numbers(window, *places, self._layout.tokens).dtype
        return dtype.name

    def _read(self, window: Reader, part: Part) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """The number of each sample, and the begin and end of each of its columns in the file."""
        sizes = [column.size for column in self._layout.columns]
        varying = 0 if self._layout.bare else sizes.count(None)
        first = 8 + 4 * self._samples
        offsets_window = window
        if isinstance(window, _Window):
            offsets_window = _Window(window.file, self.size, self.path, 4 * _OFFSETS)
        for start in range(part.start, part.stop, _OFFSETS):
            stop = min(start + _OFFSETS, part.stop)
            offsets = _integers(offsets_window, 4 + 4 * start, stop - start + 1)
            for sample, begin, end in zip(range(start, stop), offsets, offsets[1:], strict=False):
                places = []
                position = begin + 4 * varying
                if first <= begin and position <= end <= self._unpacked_size:
                    self._pass(window, begin, end, sample)
                    own = iter((end - begin,) if self._layout.bare else _integers(window, begin, varying))
                    for size in sizes:
                        places.append((position, position := position + (next(own) if size is None else size)))
                if not places or position != end:
                    raise ValueError(
                        f"{self.path}: sample {sample} is damaged: got bytes {begin} to {end} of "
                        f"{self._unpacked_size}, expected its columns to end at {position}"
                    )
                yield sample, places

    def _pass(self, window: Reader, begin: int, end: int, sample: int) -> None:
        """Drops the content before a sample of a compressed shard."""
        if isinstance(window, _Unpacked):
            if end - begin > _LARGEST_PACKED_SAMPLE:
                raise ValueError(
                    f"{self.path}: got {end - begin} bytes as sample {sample}, expected {_LARGEST_PACKED_SAMPLE} at "
                    "most in a compressed shard: decompress it first"
                )
            window.drop_before(begin)

    def _texts(self, window: Reader, part: Part) -> Iterator[PlacedText]:
        for sample, places in self._read(window, part):
            begin, end = places[self._layout.tokens]
            pieces = [window.read(at, min(_WINDOW_BYTES, end - at)) for at in range(begin, end, _WINDOW_BYTES)]
            try:
                text = b"".join(piece.tobytes() for piece in pieces).decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.path}: sample {sample} is not UTF-8 ({error})") from error
            yield PlacedText(f"{self.path}: sample {sample}", text)

    def _pieces(self, windows: list[Reader], sample: int, places: list[tuple[int, int]]) -> Iterator[Batch]:
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
                        f"{tokens.number}, one per token"
                    )
                # Bytes have no known shape.
                if numbers.shape != tokens.shape and (-1,) not in (
                    layout.read[number].shape,
                    layout.read[layout.tokens].shape,
                ):
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

    def _numbers(self, window: Reader, sample: int, places: list[tuple[int, int]], number: int) -> _Numbers:
        begin, end = places[number]
        encoding = self._layout.read[number]
        dtype, shape = encoding.dtype, encoding.shape
        if shape is None:
            prefix = window.read(begin, min(_LARGEST_PREFIX, end - begin)).tobytes()
            dtype, shape, used = encoding.prefix(prefix, dtype)
            begin += used
        elif shape == (-1,) and dtype is not None:
            shape = ((end - begin) // dtype.itemsize,)
        if dtype is None or shape is None or begin + math.prod(shape) * dtype.itemsize != end:
            raise ValueError(
                f"{self.path}: column {self._layout.columns[number].name!r} of sample {sample} is damaged: expected an "
                f"array of integers in bytes {places[number][0]} to {end}"
            )
        return _Numbers(begin, shape, dtype)


def _integers(window: Reader, offset: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}I", window.read(offset, 4 * count).tobytes())


def _slice(numbers: _Numbers, window: Reader, start: int, count: int) -> NDArray[Any]:
    itemsize = numbers.dtype.itemsize
    return window.read(numbers.first_byte + start * itemsize, count * itemsize).view(numbers.dtype)
