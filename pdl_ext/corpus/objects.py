"""Sources for objects in memory: Hugging Face datasets, tables of Arrow, and iterables of arrays."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pdl_ext._optional import require
from pdl_ext.corpus.reading.arrays import array_batches
from pdl_ext.corpus.reading.batches import copied
from pdl_ext.corpus.reading.columns import Columns, Rows
from pdl_ext.corpus.source import Batch, Part, ReadOptions, Source
from pdl_ext.frequency import TokenFrequency
from pdl_ext.provenance import Shard

__all__ = ["StreamedSource", "opener_of"]

# The beginning of errors: the argument's name.
_DATA = Path("data")
# The bytes of rows that are read at once. Rows of a dataset with indices are gathered.
_PIECE_BYTES = 2**22
# Of a stream no more at once either, however small they are.
_STREAMED_ROWS = 1000
# Rows of a table's beginning and of its end, which identify the table.
_DIGESTED_ROWS = 64
_DIGESTED_BYTES = 2**14


def opener_of(data: Any) -> tuple[Callable[[ReadOptions], Source] | None, Any]:
    """A function that opens data that are not names of files, and the data; those of an iterator are complete again.

    The function is None for names. It and this raise TypeError or ValueError that names the argument and a way out.
    """
    # A caller with one of its objects has already imported it.
    datasets = sys.modules.get("datasets")
    if isinstance(data, (str, bytes, os.PathLike)):
        return None, data
    if isinstance(data, Mapping):
        # A DatasetDict is one.
        splits = ", ".join(map(repr, itertools.islice(data, 5)))
        raise TypeError(
            f"data: got {type(data).__name__} with {splits or 'nothing'}, expected one of its values: data[...] of "
            "the split that is trained on"
        )
    if datasets is not None and isinstance(data, datasets.Dataset):
        return functools.partial(_dataset_source, data), data
    if datasets is not None and isinstance(data, datasets.IterableDataset):
        return functools.partial(_StreamedDataset, data), data
    if hasattr(data, "__arrow_c_stream__") or hasattr(data, "__arrow_c_array__"):
        return functools.partial(_table_source, data), data
    if isinstance(data, Tensor) or (isinstance(data, np.ndarray) and data.dtype.kind not in "USO"):
        return functools.partial(_Arrays, [data], type(data).__name__), data
    try:
        iterator = iter(data)
    except TypeError:
        return None, data
    some = list(itertools.islice(iterator, 1))
    if not some:
        again = ": make it anew, since an iterator gives each item once" if iterator is data else ""
        raise ValueError(
            f"data: got {type(data).__name__} with nothing in it, expected files, folders or patterns, or arrays of "
            f"ids{again}"
        )
    # Not restarted: a loader would shuffle again.
    rest = itertools.chain(some, iterator)
    if isinstance(some[0], (str, bytes, os.PathLike)):
        return None, rest if iterator is data else data
    return functools.partial(_Arrays, rest, type(data).__name__), data


class _ObjectSource(Source):
    """A source for an object in memory."""

    def __init__(self, format_name: str, dtype: str, size: int) -> None:
        self.format, self.path, self.dtype = format_name, _DATA, dtype
        self._stamps = {}
        self._size = size

    @property
    def size(self) -> int:
        return self._size


class _RowsSource(_ObjectSource):
    """Rows of columns, of which any range is available as a table. A part is a range of rows.

    name: their name in the provenance; telling: data that distinguish them from other rows.
    """

    def __init__(self, name: str, telling: Iterable[Any], columns: Columns, table: Any, size: int) -> None:
        super().__init__(name.partition(" ")[0], columns.dtype, size)
        self._columns, self._table = columns, table
        self._rows = len(table)
        self._name = f"{name}: {self._rows} rows of {', '.join(columns.names)}"
        digest = hashlib.blake2b(digest_size=16)
        for content in telling:
            digest.update(content)
        self._digest = digest.hexdigest()

    def shard(self) -> Shard:
        return Shard(self._name, self.size, self._digest, self.format, self.dtype)

    def parts(self, size: int) -> Iterator[Part]:
        per_part = max(1, self._rows * size // max(self.size, 1))
        for start in range(0, self._rows, per_part):
            stop = min(start + per_part, self._rows)
            yield Part(start, stop, self.size * stop // self._rows - self.size * start // self._rows)

    def batches(self, part: Part) -> Iterator[Batch]:
        with _arrow_errors():
            yield from self._columns.batches(self._read(part))

    def placed_batches(self, part: Part) -> Iterator[tuple[object, Batch]]:
        with _arrow_errors():
            yield from self._columns.placed_batches(self._read(part))

    def _read(self, part: Part) -> Iterator[Rows]:
        per_piece = max(1, self._rows * _PIECE_BYTES // max(self.size, 1))
        for start in range(part.start, part.stop, per_piece):
            yield from _record_batches(self._table[start : min(start + per_piece, part.stop)], start)


class StreamedSource(_ObjectSource):
    """Data that can be read only once and from the beginning: one part, of unknown size."""

    _unit = "rows"

    def __init__(self, format_name: str, dtype: str) -> None:
        super().__init__(format_name, dtype, 0)
        self._read = 0

    def shard(self) -> Shard:
        return Shard(self.format, 0, "", self.format, self.dtype)

    def shard_of(self, frequency: TokenFrequency) -> Shard:
        """Its entry in the provenance after it was counted, with the digest of the counts."""
        digest = hashlib.blake2b(frequency.table.packed().numpy().data, digest_size=16).hexdigest()
        return Shard(f"{self.format}: {self._read} {self._unit}", self._size, digest, self.format, self.dtype)

    def parts(self, size: int) -> Iterator[Part]:
        yield Part(0, 1, 0)


class _Arrays(StreamedSource):
    """Arrays of ids, one after the other; each, or each row of its last axis, is a sequence."""

    _unit = "arrays"

    def __init__(self, arrays: Iterable[Any], kind: str, options: ReadOptions) -> None:
        for name in ("column", "mask", "skip_prompt"):
            if getattr(options.policy, name) is not None:
                raise ValueError(
                    f"data: got arrays with {name} {getattr(options.policy, name)!r}, expected None: they have no "
                    "columns"
                )
        if options.policy.learn is not None:
            raise ValueError(
                f"data: got arrays with learn {options.policy.learn!r}, expected rows of chats, prompts or texts: "
                "ids do not show which of them are learned"
            )
        if options.tokenizer is not None:
            raise ValueError("tokenizer: got one with arrays, expected None: arrays hold ids already")
        if options.dtype is not None:
            raise ValueError(f"dtype: got {options.dtype!r} with arrays, expected None: arrays have their own")
        super().__init__(kind, "")
        self._arrays = arrays
        self._shifted = options.policy.targets == "shifted"

    def batches(self, part: Part) -> Iterator[Batch]:
        # Copies: the iterable may reuse the memory of its arrays.
        return copied(batch for array in self._ids() for batch in array_batches(array, self._shifted))

    def _ids(self) -> Iterator[NDArray[Any]]:
        dtypes: set[np.dtype[Any]] = set()
        for item in self._arrays:
            array = _ids_of(item, self._read)
            if array.dtype not in dtypes:
                dtypes.add(array.dtype)
                self.dtype = ", ".join(sorted(dtype.name for dtype in dtypes))
            self._read += 1
            self._size += array.nbytes
            yield array


class _StreamedDataset(StreamedSource):
    """A datasets.IterableDataset, through tables of Arrow."""

    def __init__(self, dataset: Any, options: ReadOptions) -> None:
        super().__init__("datasets.IterableDataset", "")
        self._dataset, self._options = dataset, options
        # A table without rows, when there is one.
        self._columns_seen: list[Any] = []

    def batches(self, part: Part) -> Iterator[Batch]:
        for table in self._tables():
            columns = Columns(_DATA, table.schema, self._options)
            self.dtype = columns.dtype
            self._unit = f"rows of {', '.join(columns.names)}"
            with _arrow_errors():
                table = table.select(columns.names)
                yield from columns.batches(_record_batches(table, self._read))
            self._read += len(table)
            self._size += table.nbytes

    def _tables(self) -> Iterator[Any]:
        """Rows that follow one another: _STREAMED_ROWS at most, and one at most that is beyond _PIECE_BYTES."""
        held: list[Any] = []
        size = 0
        # One by one, since it is not known how large those to come are.
        for row in self._dataset.with_format("arrow").iter(1):
            held.append(row)
            size += row.nbytes
            if len(held) == _STREAMED_ROWS or size >= _PIECE_BYTES:
                yield self._joined(held)
                held, size = [], 0
        if held:
            yield self._joined(held)

    def _joined(self, rows: list[Any]) -> Any:
        """A table of rows, whose columns may differ where the dataset does not tell what they hold."""
        pa = require("pyarrow", "corpus")
        # With what was seen of columns before, since a row with an empty list tells nothing of its type.
        tables = [*self._columns_seen, *rows]
        differ = any(not table.schema.equals(tables[0].schema) for table in tables)
        try:
            table = pa.concat_tables(tables, promote_options="permissive" if differ else "none").combine_chunks()
        except pa.ArrowException as error:
            raise ValueError(
                f"data: got rows {self._read} to {self._read + len(rows) - 1} with columns that do not go together "
                f"({str(error).splitlines()[0]}), expected the same type in all rows"
            ) from error
        self._columns_seen = [table[:0]]
        return table


def _dataset_source(dataset: Any, options: ReadOptions) -> Source:
    if dataset.format["type"] == "custom":
        raise ValueError(
            "data: got a Dataset with a transform, expected one without: its table is not transformed. Use map "
            'instead, or pass the ids alone, as (row["input_ids"] for row in dataset)'
        )
    with _arrow_errors():
        columns = Columns(_DATA, dataset.with_format("arrow")[:0].schema, options)
    chosen = dataset.select_columns(columns.names)
    # If rows are selected by indices, the table still holds the others.
    size = chosen.data.nbytes * len(chosen) // max(len(chosen.data), 1)
    name = f"datasets.Dataset {dataset._fingerprint}"
    telling = [repr((name, len(chosen), columns.names)).encode()]
    return _RowsSource(name, telling, columns, chosen.with_format("arrow"), size)


def _table_source(data: Any, options: ReadOptions) -> Source:
    pa = require("pyarrow", "corpus")
    try:
        table = pa.table(data)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise TypeError(f"data: got {type(data).__name__}, expected a table of Arrow ({error})") from error
    columns = Columns(_DATA, table.schema, options)
    table = table.select(columns.names)
    # The same number of bytes as for files, or a row that has more.
    rows = max(1, min(_DIGESTED_ROWS, len(table) * _DIGESTED_BYTES // max(table.nbytes, 1)))
    with _arrow_errors():
        pieces = (_serialised(table[start : start + rows]) for start in (0, max(0, len(table) - rows)))
        name = f"{type(data).__module__.partition('.')[0]}.{type(data).__name__}"
        telling = itertools.chain([repr((len(table), table.nbytes)).encode()], pieces)
        return _RowsSource(name, telling, columns, table, table.nbytes)


def _serialised(table: Any) -> Any:
    """A buffer with the rows of a table as a stream, independent of its chunks."""
    sink = require("pyarrow", "corpus").BufferOutputStream()
    with require("pyarrow.ipc", "corpus").new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue()


def _record_batches(table: Any, first: int) -> Iterator[Rows]:
    for batch in table.to_batches():
        yield Rows(batch, range(first, first + batch.num_rows), "the data")
        first += batch.num_rows


@contextlib.contextmanager
def _arrow_errors() -> Iterator[None]:
    pa = require("pyarrow", "corpus")
    try:
        yield
    except pa.ArrowException as error:
        raise ValueError(f"data: is damaged ({str(error).splitlines()[0]})") from error


def _ids_of(item: Any, number: int) -> NDArray[Any]:
    """An item of an iterable as an array of ids. Raises TypeError or ValueError that names it by its number."""
    array = item
    if isinstance(item, Tensor):
        # NumPy does not have all dtypes of tensors.
        if item.is_floating_point() or item.is_complex():
            raise TypeError(f"{_place(item, number)} of {item.dtype}, expected integers")
        array = item.detach().cpu().numpy()
    elif not isinstance(item, np.ndarray):
        array = _as_array(item, number)
    if array.ndim == 0 or array.dtype.kind not in "iu":
        # Objects could be anything, also code that runs when their value is read.
        raise TypeError(
            f"{_place(item, number)} of {array.dtype} in {array.ndim} axes, expected integers in one axis or more"
        )
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _as_array(item: Any, number: int) -> NDArray[Any]:
    place = _place(item, number)
    if isinstance(item, Mapping):
        raise TypeError(
            f"{place}, expected an array of ids: pass one entry of each, as (row['input_ids'] for row in data), or "
            "count a loader's batches by pdl_ext.count_labels"
        )
    if isinstance(item, (str, bytes)) or not (hasattr(item, "__len__") or hasattr(item, "__array__")):
        raise TypeError(f"{place}, expected an array of ids: pass [data] if the ids are one sequence")
    try:
        array = np.asarray(item)
    except ValueError as error:
        raise ValueError(f"{place}, expected an array of ids, one axis of the same length in all its rows") from error
    # The dtype of an empty list is unknown.
    return array if array.size else array.astype(np.int64)


def _place(item: Any, number: int) -> str:
    return f"data: got {type(item).__name__} as item {number}"
