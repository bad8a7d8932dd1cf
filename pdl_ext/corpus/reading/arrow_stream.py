"""Arrow's streams, which Arrow's own files and Hugging Face's datasets share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pdl_ext._optional import require
from pdl_ext.corpus.reading.columns import Columns, Rows, arrow_errors
from pdl_ext.corpus.source import SAMPLE_TOKENS, Batch, Part, ReadOptions, Sample, Source
from pdl_ext.storage.place import Place, RemotePath

__all__ = ["CONTINUATION", "StreamSource", "arrow_file", "read_options", "read_stream"]

# The beginning of each message of a stream.
CONTINUATION = b"\xff\xff\xff\xff"
_END_OF_STREAM = CONTINUATION + bytes(4)


class StreamSource(Source):
    """A stream of record batches, each of which is read completely: one part.

    choose: selects the rows to count among all that are read.
    """

    def __init__(
        self,
        format_name: str,
        path: Place,
        options: ReadOptions,
        *,
        companions: Sequence[Place] = (),
        choose: Callable[[Iterator[Rows]], Iterator[Rows]] = iter,
    ) -> None:
        with arrow_errors(path, "Arrow"), arrow_file(path) as file, _stream_reader(path, file) as reader:
            self._columns = Columns(path, reader.schema, options)
        super().__init__(format_name, path, self._columns.dtype, companions)
        self._choose = choose

    def parts(self, size: int) -> Iterator[Part]:
        yield Part(0, 1, self.size)

    def sample(self) -> Sample:
        tokens = 0
        size = self.size
        with arrow_errors(self.path, "Arrow"):
            for some in self._choose(read_stream(self.path, self._columns.names)):
                tokens += sum(batch.tokens.size for batch in self._columns.batches([some]))
                if tokens >= SAMPLE_TOKENS:
                    size = min(size, some.end or size)
                    break
        return Sample(tokens, size)

    def batches(self, part: Part) -> Iterator[Batch]:
        with arrow_errors(self.path, "Arrow"):
            yield from self._columns.batches(self._choose(read_stream(self.path, self._columns.names)))

    def placed_batches(self, part: Part) -> Iterator[tuple[object, Batch]]:
        with arrow_errors(self.path, "Arrow"):
            yield from self._columns.placed_batches(self._choose(read_stream(self.path, self._columns.names)))


def read_stream(path: Place, names: Sequence[str] = ()) -> Iterator[Rows]:
    """All rows of a stream, with the named columns, or all. Raises ValueError that names a damaged file."""
    with arrow_errors(path, "Arrow"), arrow_file(path) as file:
        with _stream_reader(path, file) as reader:
            fields = [reader.schema.get_field_index(name) for name in names]
        file.seek(0)
        first = 0
        with _stream_reader(path, file, fields) as reader:
            for batch in reader:
                yield Rows(batch, range(first, first + batch.num_rows), "the file", file.tell())
                first += batch.num_rows
        if file.tell() != file.size():
            raise ValueError(f"{path}: got {file.size()} bytes, expected {file.tell()}, where its stream ends")


def _stream_reader(path: Place, file: Any, fields: Sequence[int] = ()) -> Any:
    # A reader accepts the end of the file as the end of the stream, so a truncated stream would not be noticed.
    file.seek(max(0, file.size() - len(_END_OF_STREAM)))
    if file.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
        raise ValueError(f"{path}: does not end with the mark of a stream's end: it was cut off, or is no Arrow file")
    file.seek(0)
    return require("pyarrow.ipc", "corpus").open_stream(file, options=read_options(fields))


def arrow_file(path: Place) -> Any:
    """A file, opened by pyarrow."""
    pa = require("pyarrow", "corpus")
    return pa.PythonFile(path.ranges(), mode="r") if isinstance(path, RemotePath) else pa.OSFile(str(path))


def read_options(fields: Sequence[int]) -> Any:
    """Options to read the columns with these numbers, or all."""
    ipc = require("pyarrow.ipc", "corpus")
    # Without threads: each counting thread already reads a part.
    return ipc.IpcReadOptions(use_threads=False, included_fields=list(fields))
