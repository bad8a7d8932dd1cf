"""Compressed files as blocks of their content, with bounded memory."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from pdl_ext._optional import require
from pdl_ext.storage.place import Place

__all__ = ["SUFFIXES", "BytesRead", "compression_of", "decompressed"]

# By the suffixes of names.
SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4"}
_BLOCK_BYTES = 2**18
# The most memory for decompressing a file: xz -9 takes half of it. For zstd it is the library's own limit; the others
# need at most 8 MiB.
_MEMORY_BYTES = 2**27


def compression_of(path: Place) -> str | None:
    """The compression that a name indicates, one of SUFFIXES; None without one."""
    return SUFFIXES.get(path.suffix.lower())


class BytesRead:
    """How many bytes of a compressed file were read so far, which is somewhat ahead of the blocks returned."""

    number = 0


def decompressed(path: Place, compression: str, read: BytesRead | None = None, start: int = 0) -> Iterator[bytes]:
    """The content of a file from a byte on, in blocks of at most 256 KiB, with at most 128 MiB of memory.

    read: is updated with each block to the number of bytes read.
    Raises ValueError that names a file which cannot be read, is damaged or truncated, or needs more memory.
    """
    if compression in ("zstd", "lz4"):
        require("pyarrow", "corpus")
    try:
        with path.open("rb") as file:
            file.seek(start)
            stream = _stream(file, compression)
            while block := stream.read(_BLOCK_BYTES):
                if read is not None:
                    read.number = file.tell()
                yield block
    except (OSError, EOFError, zlib.error, lzma.LZMAError, MemoryError) as error:
        # pyarrow's errors are OSErrors without a number.
        raise ValueError(f"{path}: cannot be decompressed as {compression} ({error})") from error


def _stream(file: Any, compression: str) -> Any:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=file)
    if compression == "bzip2":
        return _Streams(file, bz2.BZ2Decompressor)
    if compression == "xz":
        return _Streams(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY_BYTES), padding=b"\0")
    return require("pyarrow", "corpus").CompressedInputStream(file, compression)


class _Streams:
    """Consecutive streams, with some padding between them, read like any file.

    Python's own LZMAFile uses as much memory as a file requests. Its BZ2File silently ignores data after a stream.
    """

    def __init__(self, file: Any, new: Callable[[], Any], padding: bytes = b"") -> None:
        self._file, self._new, self._padding = file, new, padding
        self._decompressor = new()

    def read(self, size: int) -> bytes:
        """At most `size` bytes, none only at the end. Raises EOFError for a truncated file."""
        data = b""
        while True:
            if self._decompressor.eof:
                data = self._behind_padding(self._decompressor.unused_data)
                if not data:
                    return b""
                self._decompressor = self._new()
            elif self._decompressor.needs_input:
                data = self._file.read(_BLOCK_BYTES)
                if not data:
                    raise EOFError("it ends before its end-of-stream mark")
            if block := self._decompressor.decompress(data, size):
                return bytes(block)
            data = b""

    def _behind_padding(self, data: bytes) -> bytes:
        data = data.lstrip(self._padding)
        while not data and (more := self._file.read(_BLOCK_BYTES)):
            data = more.lstrip(self._padding)
        return data
