"""Parquet files; only the needed columns are read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pdl_ext._optional import require
from pdl_ext.corpus.reading.arrow_stream import arrow_file
from pdl_ext.corpus.reading.columns import Columns, Rows, arrow_errors
from pdl_ext.corpus.source import SAMPLE_TOKENS, Batch, Format, Part, ReadOptions, Sample, Source
from pdl_ext.storage.place import Place

__all__ = ["FORMAT"]

_MAGIC = b"PAR1"
# The bytes decoded at once: they fit into a core's cache.
_DECODED_BYTES = 2**20
# In rows: the stated size covers all columns, which may be much wider.
_SMALLEST_BATCH = 16
_LARGEST_BATCH = 2**20
# A larger column of a row group is read through a buffer. Smaller ones are read completely: pyarrow makes the buffer as
# large as a damaged page claims, up to 2 GiB.
_LARGEST_WHOLE = 2**23
_BUFFER_BYTES = 2**18


class _ParquetSource(Source):
    """A part is a range of row groups."""

    def __init__(self, path: Place, options: ReadOptions) -> None:
        with arrow_errors(path, "Parquet"), _opened(path) as file:
            self._columns = Columns(path, file.schema_arrow, options)
            # Not the metadata themselves: over a whole corpus they are as large as its files.
            groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
            self._rows_of = [group.num_rows for group in groups]
            stated = [group.total_byte_size for group in groups]
        super().__init__("parquet", path, self._columns.dtype)
        # Some writers state 0. pyarrow also reports the sizes of columns, but aborts the process if those are damaged.
        rows = max(sum(self._rows_of), 1)
        largest = self.size * max(self._rows_of, default=0) // rows
        self._buffer_bytes = _BUFFER_BYTES if largest > _LARGEST_WHOLE else 0
        self._decoded = [
            max(size, self.size * number // rows) for size, number in zip(stated, self._rows_of, strict=True)
        ]

    def parts(self, size: int) -> Iterator[Part]:
        total = max(sum(self._decoded), 1)
        start, begin, end, decoded = 0, 0, 0, 0
        for group, group_decoded in enumerate(self._decoded):
            decoded += group_decoded
            group_end = self.size * decoded // total
            if group > start and group_end - begin > size:
                yield Part(start, group, end - begin)
                start, begin = group, end
            end = group_end
        if start < len(self._decoded):
            yield Part(start, len(self._decoded), end - begin)

    def sample(self) -> Sample:
        tokens = rows = 0
        with arrow_errors(self.path, "Parquet"), _opened(self.path, self._buffer_bytes) as file:
            for some in self._rows(file, Part(0, len(self._rows_of), 0)):
                tokens += sum(batch.tokens.size for batch in self._columns.batches([some]))
                rows += some.batch.num_rows
                if tokens >= SAMPLE_TOKENS:
                    break
        return Sample(tokens, self.size * rows // max(sum(self._rows_of), 1))

    def batches(self, part: Part) -> Iterator[Batch]:
        with arrow_errors(self.path, "Parquet"), _opened(self.path, self._buffer_bytes) as file:
            yield from self._columns.batches(self._rows(file, part))

    def placed_batches(self, part: Part) -> Iterator[tuple[object, Batch]]:
        with arrow_errors(self.path, "Parquet"), _opened(self.path, self._buffer_bytes) as file:
            yield from self._columns.placed_batches(self._rows(file, part))

    def _rows(self, file: Any, part: Part) -> Iterator[Rows]:
        for group in range(part.start, part.stop):
            expected = self._rows_of[group]
            per_batch = _DECODED_BYTES * expected // max(self._decoded[group], 1)
            got = 0
            for batch in file.iter_batches(
                min(max(per_batch, _SMALLEST_BATCH), _LARGEST_BATCH),
                row_groups=[group],
                columns=self._columns.names,
                use_threads=False,
            ):
                yield Rows(batch, range(got, got + batch.num_rows), f"row group {group}")
                got += batch.num_rows
            if got != expected:
                raise ValueError(f"{self.path}: got {got} rows in row group {group}, expected {expected}")


@contextlib.contextmanager
def _opened(path: Place, buffer_bytes: int = 0) -> Iterator[Any]:
    parquet = require("pyarrow.parquet", "corpus")
    with arrow_file(path) as file:
        # No reading ahead, which would hold the columns of a whole row group.
        yield parquet.ParquetFile(
            file, memory_map=False, buffer_size=buffer_bytes, pre_buffer=False, page_checksum_verification=True
        )


def _open(path: Place, options: ReadOptions) -> list[Source]:
    return [_ParquetSource(path, options)]


FORMAT = Format("parquet", _open, recognises=lambda path, head: head.startswith(_MAGIC), has_header=True)
