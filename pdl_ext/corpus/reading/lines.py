"""Files of lines, plain or compressed: what plain text and JSON lines have in common."""

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

# Encoding is slow: seconds of it, and no more, are lost at a crash.
_PART_BYTES = 2**22
_BLOCK_BYTES = 2**18
# Of a compressed file: of its texts, and of what tells how much it was compressed.
_SAMPLE_BYTES = 2**18
_UNPACKED_BYTES = 2**23
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def has_suffix(path: Place, *suffixes: str) -> bool:
    """Whether a name ends in one of the suffixes, with or without that of a compression behind it."""
    name = path.name.lower()
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name.endswith(suffixes)


class Line(NamedTuple):
    """A line without its end, and the byte of the (decompressed) file at which it begins."""

    offset: int
    content: bytes


class LinePlace:
    """A byte of a file. As text it names the line, which is looked for only then: few lines are in error."""

    def __init__(self, source: LineSource, offset: int) -> None:
        self._source, self._offset = source, offset

    def __str__(self) -> str:
        source, offset = self._source, self._offset
        byte = f"byte {offset}{' of what it decompresses to' if source.is_compressed else ''}"
        try:
            return f"{source.path}: line {source.line_number(offset)} ({byte})"
        except ValueError:
            # The file is gone by now, or another.
            return f"{source.path}: {byte}"


class LineSource(Source):
    """A file of UTF-8, with or without a byte order mark, or compressed; lines end in \\n or \\r\\n.

    Raises ValueError that names one which begins as something else does.
    A part is a range of bytes, and of the lines that begin in it; or the whole file if that is compressed.
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
            # In bytes of what it decompresses to, of which nothing tells the number.
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
        """The lines of a part. Raises ValueError for one above MAX_TEXT_BYTES, or data that cannot be decompressed."""
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
        """All of the file as if it were one line. Raises ValueError for a file above MAX_TEXT_BYTES."""
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
        """The text of a line. Raises ValueError that names the line and the byte at which it is no UTF-8."""
        try:
            return line.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.place(line.offset + error.start)}: is not UTF-8 ({error.reason})") from error

    def place(self, offset: int) -> LinePlace:
        """The file and a byte in it, for an error."""
        return LinePlace(self, offset)

    def line_number(self, offset: int) -> int:
        """The number of the line, from 1 on, that a byte is in: the file is read again up to it."""
        newlines = begin = 0
        for block in self._blocks(0, offset):
            newlines += block.count(b"\n", 0, max(0, offset - begin))
            begin += len(block)
            if begin >= offset:
                break
        return newlines + 1

    @property
    def is_compressed(self) -> bool:
        """Whether offsets are those of what the file decompresses to."""
        return self._compression is not None

    def _first_line(self, start: int, stop: int) -> int:
        """Where the first line begins that begins in [start, stop), or stop if none does."""
        if start == 0:
            return 0
        # With the byte before, which may end a line.
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
        """Bytes [begin, end) of the file, or all that it decompresses to, a bounded number at a time."""
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
