"""Arrow's IPC files, which Feather 2 is too, and streams."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pdl_ext._optional import require
from pdl_ext.corpus.columns import Columns, Rows, arrow_errors
from pdl_ext.corpus.source import Batch, Format, Part, ReadOptions, Source

__all__ = ["FORMAT", "StreamSource", "read_stream"]

_MAGIC = b"ARROW1"
_CONTINUATION = b"\xff\xff\xff\xff"
_END_OF_STREAM = _CONTINUATION + bytes(4)
# A schema that is longer is more likely something else.
_LARGEST_SCHEMA = 2**24


class _FileSource(Source):
    """A part is a range of record batches, each of which is read whole."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        with arrow_errors(path, "Arrow"), _file(path) as file, _file_reader(file) as reader:
            self._columns = Columns(path, reader.schema, options)
            self._fields = [reader.schema.get_field_index(name) for name in self._columns.names]
            self._record_batches = reader.num_record_batches
        super().__init__("arrow", path, self._columns.dtype)

    def parts(self, size: int) -> Iterator[Part]:
        # Where each record batch ends is not to be had, so they count as equally large.
        number = self._record_batches
        per_part = max(1, number * size // self.size)
        for start in range(0, number, per_part):
            stop = min(start + per_part, number)
            yield Part(start, stop, self.size * stop // number - self.size * start // number)

    def batches(self, part: Part) -> Iterator[Batch]:
        with arrow_errors(self.path, "Arrow"), _file(self.path) as file, _file_reader(file, self._fields) as reader:
            yield from self._columns.batches(self._rows(reader, part))

    def _rows(self, reader: Any, part: Part) -> Iterator[Rows]:
        for number in range(part.start, part.stop):
            batch = reader.get_batch(number)
            yield Rows(batch, range(batch.num_rows), f"record batch {number}")


class StreamSource(Source):
    """A stream of record batches, each of which is read whole: one part.

    choose: which rows are counted of all that are read.
    """

    def __init__(
        self,
        format_name: str,
        path: Path,
        options: ReadOptions,
        *,
        companions: Sequence[Path] = (),
        choose: Callable[[Iterator[Rows]], Iterator[Rows]] = iter,
    ) -> None:
        with arrow_errors(path, "Arrow"), _file(path) as file, _stream_reader(path, file) as reader:
            self._columns = Columns(path, reader.schema, options)
        super().__init__(format_name, path, self._columns.dtype, companions)
        self._choose = choose

    def parts(self, size: int) -> Iterator[Part]:
        yield Part(0, 1, self.size)

    def batches(self, part: Part) -> Iterator[Batch]:
        with arrow_errors(self.path, "Arrow"):
            yield from self._columns.batches(self._choose(read_stream(self.path, self._columns.names)))


def read_stream(path: Path, names: Sequence[str] = ()) -> Iterator[Rows]:
    """All rows of a stream, with the columns named, or all. Raises ValueError that names a file which is damaged."""
    with arrow_errors(path, "Arrow"), _file(path) as file:
        with _stream_reader(path, file) as reader:
            fields = [reader.schema.get_field_index(name) for name in names]
        file.seek(0)
        first = 0
        with _stream_reader(path, file, fields) as reader:
            for batch in reader:
                yield Rows(batch, range(first, first + batch.num_rows), "the file")
                first += batch.num_rows
        if file.tell() != file.size():
            raise ValueError(f"{path}: got {file.size()} bytes, expected {file.tell()}, where its stream ends")


def _file(path: Path) -> Any:
    return require("pyarrow", "corpus").OSFile(str(path))


def _options(fields: Sequence[int]) -> Any:
    ipc = require("pyarrow.ipc", "corpus")
    # Not by threads: those that count read a part each.
    return ipc.IpcReadOptions(use_threads=False, included_fields=list(fields))


def _file_reader(file: Any, fields: Sequence[int] = ()) -> Any:
    return require("pyarrow.ipc", "corpus").open_file(file, options=_options(fields))


def _stream_reader(path: Path, file: Any, fields: Sequence[int] = ()) -> Any:
    # A reader takes the end of the file for the end of the stream, so that one which was cut off would go unseen.
    file.seek(max(0, file.size() - len(_END_OF_STREAM)))
    if file.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
        raise ValueError(f"{path}: does not end with the mark of a stream's end: it was cut off, or is no Arrow file")
    file.seek(0)
    return require("pyarrow.ipc", "corpus").open_stream(file, options=_options(fields))


def _is_stream(head: bytes) -> bool:
    return (
        head.startswith(_CONTINUATION) and 0 < struct.unpack_from("<i", head.ljust(8, b"\0"), 4)[0] <= _LARGEST_SCHEMA
    )


def _open(path: Path, options: ReadOptions) -> list[Source]:
    with arrow_errors(path, "Arrow"), open(path, "rb") as file:
        head = file.read(len(_MAGIC))
    return [_FileSource(path, options) if head.startswith(_MAGIC) else StreamSource("arrow", path, options)]


FORMAT = Format(
    "arrow", _open, recognises=lambda path, head: head.startswith(_MAGIC) or _is_stream(head), has_header=True
)
