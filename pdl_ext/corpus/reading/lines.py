"""Files of lines, plain or compressed: the common part of plain text and JSON lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pdl_ext.corpus.reading.access import opened, read_at, read_head
from pdl_ext.corpus.reading.compression import SUFFIXES, BytesRead, compression_of, decompressed
from pdl_ext.corpus.reading.foreign import HEAD_BYTES, kind_of_lines
from pdl_ext.corpus.reading.tokenizer import MAX_TEXT_BYTES
from pdl_ext.corpus.source import Part, Sample, Source
from pdl_ext.storage.place import Place

__all__ = ["Line", "LinePlace", "LineSource", "has_suffix"]

# Encoding is slow: a crash loses seconds of it, and no more.
_PART_BYTES = 2**22
_BLOCK_BYTES = 2**18
# Bytes of a compressed file's sample: its texts, and the content by which its compression is estimated.
_SAMPLE_BYTES = 2**18
_UNPACKED_BYTES = 2**23
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def has_suffix(path: Place, *suffixes: str) -> bool:
    """Whether a name ends in one of the suffixes, possibly followed by that of a compression."""
    name = path.name.lower()
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name.endswith(suffixes)


class Line(NamedTuple):
    """A line without its end, and the byte of the (decompressed) file at which it begins."""

    offset: int
    content: bytes


class LinePlace:
    """A byte of a file. As text it names the line, which is searched only then: few lines have errors."""

    def __init__(self, source: LineSource, offset: int) -> None:
        self._source, self._offset = source, offset

    def __str__(self) -> str:
        source, offset = self._source, self._offset
        byte = f"byte {offset}{' of its decompressed content' if source.is_compressed else ''}"
        try:
            return f"{source.path}: line {source.line_number(offset)} ({byte})"
        except ValueError:
            # The file was removed or replaced.
            return f"{source.path}: {byte}"


class LineSource(Source):
    """A file of UTF-8, with or without a byte order mark, or compressed; lines end in \\n or \\r\\n.

    Raises ValueError that names a file whose beginning is that of another kind.
    A part is a range of bytes, with the lines that begin in it; a compressed file is one part.
    """

    def __init__(self, format_name: str, path: Place) -> None:
        super().__init__(format_name, path, "text")
        self._compression = compression_of(path)
        if self._compression and not self.size:
            raise ValueError(f"{path}: got 0 bytes, expected {self._compression} data")
        head = next(self._blocks(0, self.size), b"") if self._compression else read_head(path, HEAD_BYTES)
        kind = kind_of_lines(head[:HEAD_BYTES])
        if kind is not None:
            raise ValueError(f"{path}: is {kind.name}, expected text in UTF-8: {kind.remedy}")

    def parts(self, size: int) -> Iterator[Part]:
        if self._compression:
            # In decompressed bytes, whose number is unknown.
            yield Part(0, sys.maxsize, self.size)
            return
        per_part = min(size, _PART_BYTES)
        for start in range(0, self.size, per_part):
            stop = min(start + per_part, self.size)
            yield Part(start, stop, stop - start)

    def sample(self) -> Sample:
        if not self._compression:
            return super().sample()
        read = BytesRead()
        unpacked = 0
        for block in decompressed(self.path, self._compression, read):
            unpacked += len(block)
            if unpacked >= _UNPACKED_BYTES:
                break
        stop = min(unpacked, _SAMPLE_BYTES)
        tokens = sum(batch.tokens.size for batch in self.batches(Part(0, stop, 0)))
        return Sample(tokens, read.number * stop // max(unpacked, 1))

    def lines(self, part: Part) -> Iterator[Line]:
        """The lines of a part. Raises ValueError for a line above MAX_TEXT_BYTES, and for damaged compressed data."""
        stop = part.stop
        begin = self._first_line(part.start, stop)
        if begin >= stop:
            return
        pending = bytearray()
        for block in self._blocks(begin, self.size):
            *ended, rest = block.split(b"\n")
            for content in ended:
                if pending:
                    content = bytes(pending + content)
                    pending.clear()
                self._check_length(begin, content)
                yield _unmarked(Line(begin, content.removesuffix(b"\r")))
                begin += len(content) + 1
                if begin >= stop:
                    return
            pending += rest
            self._check_length(begin, pending)
        if pending:
            yield _unmarked(Line(begin, bytes(pending).removesuffix(b"\r")))

    def whole(self) -> Line:
        """The whole file as one line. Raises ValueError for a file above MAX_TEXT_BYTES."""
        content = bytearray()
        for block in self._blocks(0, self.size):
            content += block
            if len(content) > MAX_TEXT_BYTES:
                raise ValueError(
                    f"{self.path}: got a document above {MAX_TEXT_BYTES} bytes, expected smaller ones: "
                    "give sample_by line, for each line to be a text"
                )
        return _unmarked(Line(0, bytes(content)))

    def decode(self, line: Line) -> str:
        """The text of a line. Raises ValueError that names the line and the byte that is not UTF-8."""
        try:
            return line.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.place(line.offset + error.start)}: is not UTF-8 ({error.reason})") from error

    def place(self, offset: int) -> LinePlace:
        """The file and a byte in it, for an error."""
        return LinePlace(self, offset)

    def line_number(self, offset: int) -> int:
        """The number of the line, from 1 on, that contains a byte: the file is read again up to it."""
        newlines = begin = 0
        for block in self._blocks(0, offset):
            newlines += block.count(b"\n", 0, max(0, offset - begin))
            begin += len(block)
            if begin >= offset:
                break
        return newlines + 1

    @property
    def is_compressed(self) -> bool:
        """Whether offsets are positions in the decompressed content."""
        return self._compression is not None

    def _first_line(self, start: int, stop: int) -> int:
        """The first position from start to before stop where a line begins, or stop if there is none."""
        if start == 0:
            return 0
        # Includes the byte before, which may end a line.
        begin = start - 1
        for block in self._blocks(begin, stop - 1):
            index = block.find(b"\n")
            if index >= 0:
                return begin + index + 1
            begin += len(block)
        return stop

    def _check_length(self, offset: int, content: bytes | bytearray) -> None:
        if len(content) > MAX_TEXT_BYTES:
            raise ValueError(f"{self.place(offset)}: got a line above {MAX_TEXT_BYTES} bytes, expected shorter ones")

    def _blocks(self, begin: int, end: int) -> Iterator[bytes]:
        """The file's bytes from begin to end, or all its decompressed content, in blocks of limited size."""
        return decompressed(self.path, self._compression) if self._compression else self._plain_blocks(begin, end)

    def _plain_blocks(self, begin: int, end: int) -> Iterator[bytes]:
        with opened(self.path) as file:
            while begin < end:
                block = np.empty(min(end - begin, _BLOCK_BYTES), np.uint8)
                read_at(file, block, begin, self.path)
                yield block.tobytes()
                begin += block.size


def _unmarked(line: Line) -> Line:
    is_marked = line.offset == 0 and line.content.startswith(_BYTE_ORDER_MARK)
    return Line(len(_BYTE_ORDER_MARK), line.content[len(_BYTE_ORDER_MARK) :]) if is_marked else line
