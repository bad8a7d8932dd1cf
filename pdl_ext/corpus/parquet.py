"""Parquet, of which only the columns that are needed are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdl_ext._optional import require
from pdl_ext.corpus.columns import Columns, Rows, arrow_errors
from pdl_ext.corpus.source import Batch, Format, Part, ReadOptions, Source

__all__ = ["FORMAT"]

_MAGIC = b"PAR1"
# Decoded at once: what a core's cache holds.
_DECODED_BYTES = 2**22
_LARGEST_BATCH = 2**20
# Of a column's compressed pages, read at once: not the column of a row group, which may be of any size.
_BUFFER_BYTES = 2**20


class _ParquetSource(Source):
    """A part is a range of row groups."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        with arrow_errors(path, "Parquet"), _opened(path) as file:
            metadata = file.metadata
            self._columns = Columns(path, file.schema_arrow, options)
            leaves = [
                leaf
                for leaf in range(metadata.num_columns)
                for name in self._columns.names
                if f"{metadata.schema.column(leaf).path}.".startswith(f"{name}.")
            ]
            # Not the metadata, of which a corpus has as much as files.
            self._sizes = [_sizes(metadata.row_group(group), leaves) for group in range(metadata.num_row_groups)]
        super().__init__("parquet", path, self._columns.dtype)

    def parts(self, size: int) -> Iterator[Part]:
        start = total = 0
        for group, (compressed, _) in enumerate(self._sizes):
            if group > start and total + compressed > size:
                yield Part(start, group, total)
                start, total = group, 0
            total += compressed
        if start < len(self._sizes):
            yield Part(start, len(self._sizes), total)

    def batches(self, part: Part) -> Iterator[Batch]:
        with arrow_errors(self.path, "Parquet"), _opened(self.path) as file:
            yield from self._columns.batches(self._rows(file, part))

    def _rows(self, file: Any, part: Part) -> Iterator[Rows]:
        for group in range(part.start, part.stop):
            expected = file.metadata.row_group(group).num_rows
            per_batch = _DECODED_BYTES * expected // max(self._sizes[group][1], 1)
            got = 0
            for batch in file.iter_batches(
                min(max(per_batch, 1), _LARGEST_BATCH),
                row_groups=[group],
                columns=self._columns.names,
                use_threads=False,
            ):
                yield Rows(batch, range(got, got + batch.num_rows), f"row group {group}")
                got += batch.num_rows
            if got != expected:
                raise ValueError(f"{self.path}: got {got} rows in row group {group}, expected {expected}")


def _opened(path: Path) -> Any:
    parquet = require("pyarrow.parquet", "corpus")
    # Not read ahead, which would hold the columns of a whole row group.
    return parquet.ParquetFile(
        str(path), memory_map=False, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
    )


def _sizes(group: Any, leaves: list[int]) -> tuple[int, int]:
    """The bytes of columns in a row group: in the file, and decoded."""
    columns = [group.column(leaf) for leaf in leaves]
    return sum(column.total_compressed_size for column in columns), sum(
        column.total_uncompressed_size for column in columns
    )


def _open(path: Path, options: ReadOptions) -> list[Source]:
    return [_ParquetSource(path, options)]


FORMAT = Format("parquet", _open, recognises=lambda path, head: head.startswith(_MAGIC))
