"""Ray Data: counts the tokens of a dataset's column on the workers that hold its blocks.

Workers send one table per block, int64 [V + 3]. It holds the counts, then the numbers of ignored ids, of ids out of
range and of all tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import pdl_ext
from pdl_ext._checks import check_vocab_size
from pdl_ext._optional import require
from pdl_ext.corpus.source import as_countable
from pdl_ext.counts import CountTable
from pdl_ext.frequency import TokenFrequency
from pdl_ext.provenance import Provenance, TargetPolicy

__all__ = ["TokenCounts", "count_dataset", "to_frequency"]

_aggregate: Any = require("ray.data.aggregate", "ray")
_TABLE, _ERROR = "counts", "error"


class TokenCounts(_aggregate.AggregateFnV2):
    """Counts a column of token ids in `ds.aggregate(...)` and `ds.groupby(...).aggregate(...)`.

    Arguments and errors are those of count_dataset. alias_name: the name of the result, a table that to_frequency
    converts to a TokenFrequency.
    Ray keeps the whole dataset in its object store while it aggregates; count_dataset does not.
    """

    def __init__(
        self,
        column: str,
        vocab_size: int,
        *,
        ignore_index: int = -100,
        mask: str | None = None,
        alias_name: str | None = None,
    ) -> None:
        self._count = _BlockCount(column, vocab_size, ignore_index, mask)
        super().__init__(
            alias_name or f"token_counts({column})",
            self._count.empty,
            # Ray drops all columns but this one, so with a mask it must not know the column.
            on=column if mask is None else None,
            ignore_nulls=False,
        )

    def aggregate_block(self, block: Any) -> NDArray[np.int64]:
        """The table of one block."""
        return self._count(require("ray.data.block", "ray").BlockAccessor.for_block(block).to_arrow())

    def combine(self, current_accumulator: NDArray[np.int64], new: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sum of two tables."""
        # Not in place: either may be a view of the object store.
        return np.add(current_accumulator, new)


def count_dataset(
    ds: Any, column: str, vocab_size: int, *, ignore_index: int = -100, mask: str | None = None
) -> TokenFrequency:
    """Counts a column of a Ray dataset, block by block as they are read.

    Args:
        ds: a ray.data.Dataset.
        column: the column of token ids: integers, lists of integers or tensors.
        vocab_size: V.
        ignore_index: an id that is never a target.
        mask: a column of the same shape, 0 or false where a token is not a target.

    Returns the counts with a provenance that has the policy and no shards, since Ray does not report a dataset's files.
    Raises TypeError or ValueError that names the argument, or the column and the problem. A column is invalid if it is
    missing, has nulls, has no integers or no tokens at all, or if the mask has another shape.
    """
    count = _BlockCount(column, vocab_size, ignore_index, mask)
    data = require("ray.data", "ray")
    if not isinstance(ds, data.Dataset):
        raise TypeError(f"ds: got {type(ds).__name__}, expected ray.data.Dataset")
    total = count.empty()
    tables = ds.map_batches(count.as_batch, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
    for batch in tables.iter_batches(batch_size=None, batch_format="numpy"):
        for message in filter(None, batch[_ERROR]):
            raise ValueError(str(message))
        total += batch[_TABLE].sum(axis=0)
    frequency = to_frequency(total, ignore_index=ignore_index)
    if not frequency.tokens_seen:
        raise ValueError(f"ds: got no token in column {column!r}, expected some")
    frequency.provenance = Provenance((), frequency.tokens_seen, count.policy, None, pdl_ext.__version__)
    return frequency


def to_frequency(table: NDArray[np.int64], *, ignore_index: int = -100) -> TokenFrequency:
    """The TokenFrequency of a result of TokenCounts, int64 [V + 3].

    Raises TypeError for anything else, ValueError if its counts do not add up to the number of tokens given.
    """
    if (
        not isinstance(table, np.ndarray)
        or table.dtype != np.int64
        or table.ndim != 1
        or table.size < CountTable.packed_size(1)
    ):
        got = f"{table.dtype} {list(table.shape)}" if isinstance(table, np.ndarray) else type(table).__name__
        raise TypeError(f"table: got {got}, expected int64 [V + 3]")
    given = CountTable.unpacked(torch.tensor(table, device="cpu"))
    frequency = TokenFrequency(given.counts.numel(), ignore_index=ignore_index)
    frequency.table.copy_(given)
    frequency.check_conserved("table")
    return frequency


class _BlockCount:
    """Returns the table of a block, which is an Arrow table; Ray sends this object to the workers."""

    def __init__(self, column: str, vocab_size: int, ignore_index: int, mask: str | None) -> None:
        check_vocab_size(vocab_size)
        self.policy = TargetPolicy(ignore_index=ignore_index, column=column, mask=mask)
        self._column = column
        self._mask = mask
        self._vocab_size = vocab_size

    def empty(self) -> NDArray[np.int64]:
        return np.zeros(CountTable.packed_size(self._vocab_size), np.int64)

    def as_batch(self, block: Any) -> dict[str, NDArray[Any]]:
        # Ray would wrap an exception, try again, and keep only the text of the first error.
        table, message = self.empty(), ""
        try:
            table = self(block)
        except ValueError as error:
            message = str(error)
        return {_TABLE: table[np.newaxis], _ERROR: np.array([message])}

    def __call__(self, block: Any) -> NDArray[np.int64]:
        columns = [self._column] if self._mask is None else [self._column, self._mask]
        for name in columns:
            if name not in block.column_names:
                raise ValueError(f"{name}: got no such column, expected one of {', '.join(block.column_names)}")
        frequency = TokenFrequency(self._vocab_size, ignore_index=self.policy.ignore_index)
        # The columns of a batch are split at the same rows; those of a table need not be.
        for batch in block.select(columns).to_batches():
            tokens, lengths = _flat(batch.column(0), self._column)
            if tokens.dtype == np.bool_:
                raise ValueError(f"{self._column}: got {batch.column(0).type}, expected integers or lists of them")
            if self._mask is not None:
                marks, lengths_of_marks = _flat(batch.column(1), self._mask)
                if lengths != lengths_of_marks:
                    raise ValueError(
                        f"{self._mask}: got lists of other lengths than those of {self._column}, expected a value for "
                        "each token"
                    )
                is_target = marks != 0
                tokens = tokens[is_target]
                frequency.table.ignore(is_target.size - tokens.size)
            frequency.update(as_countable(tokens))
        return frequency.table.packed().numpy()


def _flat(column: Any, name: str) -> tuple[NDArray[Any], list[Any]]:
    """The values of an Arrow array without their nested lists, and the lengths of the lists at each level."""
    pyarrow, compute = require("pyarrow", "ray"), require("pyarrow.compute", "ray")
    types = pyarrow.types
    array, lengths = column, [len(column)]
    while True:
        if array.null_count:
            raise ValueError(f"{name}: got {array.null_count} nulls, expected none")
        kind = array.type
        if isinstance(kind, pyarrow.BaseExtensionType):
            array = array.storage
            if types.is_struct(array.type):
                # Ray's tensors of different shapes; the other field is the shape.
                array = array.field("data")
        elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            # The lengths of large lists are int64, which never compares equal to int32.
            lengths.append(compute.list_value_length(array).cast(pyarrow.int64()))
            # Unlike `values`, flatten() respects the slice.
            array = array.flatten()
        elif types.is_integer(kind) or types.is_boolean(kind):
            return array.to_numpy(zero_copy_only=False), lengths
        elif types.is_null(kind):
            # Lists that are all empty may have no other type.
            return np.zeros(0, np.int64), lengths
        else:
            raise ValueError(f"{name}: got {column.type}, expected integers or lists of them")
