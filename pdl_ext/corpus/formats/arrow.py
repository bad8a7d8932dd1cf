"""Arrow's IPC files, including Feather 2, and streams."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

from pdl_ext._optional import require
from pdl_ext.corpus.reading.access import read_head
from pdl_ext.corpus.reading.arrow_stream import CONTINUATION, StreamSource, arrow_file, read_options
from pdl_ext.corpus.reading.columns import Columns, Rows, arrow_errors
from pdl_ext.corpus.source import Batch, Format, Part, ReadOptions, Source
from pdl_ext.storage.place import Place

__all__ = ["FORMAT"]

_MAGIC = b"ARROW1"
# A longer schema is more likely not a schema at all.
_LARGEST_SCHEMA = 2**24


class _FileSource(Source):
    """A part is a range of record batches; each batch is read completely."""

    def __init__(self, path: Place, options: ReadOptions) -> None:
        with arrow_errors(path, "Arrow"), arrow_file(path) as file, _file_reader(file) as reader:
            self._columns = Columns(path, reader.schema, options)
            self._fields = [reader.schema.get_field_index(name) for name in self._columns.names]
            self._record_batches = reader.num_record_batches
        super().__init__("arrow", path, self._columns.dtype)

    def parts(self, size: int) -> Iterator[Part]:
        # The end of each record batch is not available, so they count as equally large.
        number = self._record_batches
        per_part = max(1, number * size // self.size)
        for start in range(0, number, per_part):
            stop = min(start + per_part, number)
            yield Part(start, stop, self.size * stop // number - self.size * start // number)

    def batches(self, part: Part) -> Iterator[Batch]:
        with arrow_errors(self.path, "Arrow"):
            yield from self._columns.batches(self._rows(part))

    def placed_batches(self, part: Part) -> Iterator[tuple[object, Batch]]:
        with arrow_errors(self.path, "Arrow"):
            yield from self._columns.placed_batches(self._rows(part))

    def _rows(self, part: Part) -> Iterator[Rows]:
        with arrow_file(self.path) as file, _file_reader(file, self._fields) as reader:
            for number in range(part.start, part.stop):
                batch = reader.get_batch(number)
                yield Rows(batch, range(batch.num_rows), f"record batch {number}")


def _file_reader(file: Any, fields: Sequence[int] = ()) -> Any:
    return require("pyarrow.ipc", "corpus").open_file(file, options=read_options(fields))


def _is_stream(head: bytes) -> bool:
    return head.startswith(CONTINUATION) and 0 < struct.unpack_from("<i", head.ljust(8, b"\0"), 4)[0] <= _LARGEST_SCHEMA


def _open(path: Place, options: ReadOptions) -> list[Source]:
    head = read_head(path, len(_MAGIC))
    return [_FileSource(path, options) if head.startswith(_MAGIC) else StreamSource("arrow", path, options)]


FORMAT = Format(
    "arrow", _open, recognises=lambda path, head: head.startswith(_MAGIC) or _is_stream(head), has_header=True
)
