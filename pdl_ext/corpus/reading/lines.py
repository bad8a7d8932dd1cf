"""Files of lines, plain or compressed: what plain text and JSON lines have in common."""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pdl_ext._optional import require
from pdl_ext.corpus.reading.access import opened, read_at, read_head
from pdl_ext.corpus.reading.arrow_stream import arrow_file
from pdl_ext.corpus.reading.foreign import HEAD_BYTES, kind_of_lines
from pdl_ext.corpus.reading.tokenizer import MAX_TEXT_BYTES
from pdl_ext.corpus.source import Part, Source
from pdl_ext.storage.place import Place

__all__ = ["Line", "LineSource", "has_suffix", "is_compressed"]

# Encoding is slow: seconds of it, and no more, are lost at a crash.
_PART_BYTES = 2**22
_BLOCK_BYTES = 2**18
_COMPRESSED = (".gz", ".zst", ".zstd")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def is_compressed(path: Place) -> bool:
    """Whether a name ends in .gz, .zst or .zstd."""
    return path.suffix.lower() in _COMPRESSED


def has_suffix(path: Place, *suffixes: str) -> bool:
    """Whether a name ends in one of the suffixes, with or without that of a compression behind it."""
    name = path.name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return name.endswith(suffixes)


class Line(NamedTuple):
    """A line without its end, and the byte of the (decompressed) file at which it begins."""

    offset: int
    content: bytes


class LineSource(Source):
    """A file of UTF-8, with or without a byte order mark, or .gz, .zst or .zstd of it; lines end in \\n or \\r\\n.

    Raises ValueError that names one which begins as something else does.
    A part is a range of bytes, and of the lines that begin in it; or the whole file if that is compressed.
    """

    def __init__(self, format_name: str, path: Place) -> None:
        super().__init__(format_name, path, "text")
        self._compression = path.suffix.lower() if is_compressed(path) else None
        if self._compression and not self.size:
            raise ValueError(f"{path}: got 0 bytes, expected {self._compression} data")
        if self._compression in (".zst", ".zstd"):
            require("pyarrow", "corpus")
        head = next(self._blocks(0, self.size), b"") if self._compression else read_head(path, HEAD_BYTES)
        kind = kind_of_lines(head[:HEAD_BYTES])
        if kind is not None:
            raise ValueError(f"{path}: is {kind.name}, expected text in UTF-8: {kind.remedy}")

    def parts(self, size: int) -> Iterator[Part]:
        if self._compression:
            yield Part(0, self.size, self.size)
            return
        per_part = min(size, _PART_BYTES)
        for start in range(0, self.size, per_part):
            stop = min(start + per_part, self.size)
            yield Part(start, stop, stop - start)

    def lines(self, part: Part) -> Iterator[Line]:
        """The lines of a part. Raises ValueError for one above MAX_TEXT_BYTES, or data that cannot be decompressed."""
        stop = sys.maxsize if self._compression else part.stop
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
        """The text of a line. Raises ValueError that names the byte at which it is no UTF-8."""
        try:
            return line.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.place(line.offset + error.start)}: is not UTF-8 ({error.reason})") from error

    def place(self, offset: int) -> str:
        """The file and a byte in it, for an error."""
        return f"{self.path}: byte {offset}" + (" of what it decompresses to" if self._compression else "")

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
        if self._compression == ".gz":
            return self._gzip_blocks()
        return self._zstd_blocks() if self._compression else self._plain_blocks(begin, end)

    def _plain_blocks(self, begin: int, end: int) -> Iterator[bytes]:
        with opened(self.path) as file:
            while begin < end:
                block = np.empty(min(end - begin, _BLOCK_BYTES), np.uint8)
                read_at(file, block, begin, self.path)
                yield block.tobytes()
                begin += block.size

    def _gzip_blocks(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as packed, gzip.open(packed) as file:
                while block := file.read(_BLOCK_BYTES):
                    yield block
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{self.path}: cannot be decompressed as gzip ({error})") from error

    def _zstd_blocks(self) -> Iterator[bytes]:
        pyarrow = require("pyarrow", "corpus")
        try:
            with arrow_file(self.path) as file, pyarrow.CompressedInputStream(file, "zstd") as stream:
                while block := stream.read(_BLOCK_BYTES):
                    yield block
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{self.path}: cannot be decompressed as zstd ({error})") from error


def _unmarked(line: Line) -> Line:
    is_marked = line.offset == 0 and line.content.startswith(_BYTE_ORDER_MARK)
    return Line(len(_BYTE_ORDER_MARK), line.content[len(_BYTE_ORDER_MARK) :]) if is_marked else line
