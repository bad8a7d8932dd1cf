"""A thread's counts before they are added to the totals."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pdl_ext._array import tensor_to_read
from pdl_ext.corpus.source import Batch
from pdl_ext.counts import CountTable
from pdl_ext.frequency import TokenFrequency

__all__ = ["Table"]


class Table:
    """Counts of some tokens.

    A CountTable in one array. NumPy and the histogram change it in the calling thread alone. PyTorch's number of
    threads is left as it is, since new threads inherit the value that any thread has set. Tokens that are not targets
    are counted with the rest, and a second time separately, to be subtracted. That is less work than removing them from
    each batch.

    tokens: how many were given, by the size of the batches and not by the histogram.
    """

    def __init__(self, vocab_size: int, ignore_index: int, strict: bool) -> None:
        self.vocab_size = vocab_size
        self._ignore_index = ignore_index
        self._strict = strict
        self._all, self._no_targets = (np.zeros(CountTable.packed_size(vocab_size), np.int64) for _ in range(2))
        # Made once instead of for each of many batches.
        self._table_of_all = CountTable.unpacked(torch.from_numpy(self._all))
        self._table_of_no_targets = CountTable.unpacked(torch.from_numpy(self._no_targets))
        self.tokens = 0

    def add(self, batch: Batch) -> None:
        """Counts a batch. With `strict` a target outside the vocabulary raises IndexError, with nothing changed."""
        tokens, is_target = batch
        if is_target is not None:
            others = tokens[~is_target]
            if self._strict:
                # A token that is not a target may be any number.
                self._count(tokens[is_target], self._table_of_all)
                self._table_of_all.ignore(others.size)
            else:
                self._count(tokens, self._table_of_all)
                self._count(others, self._table_of_no_targets)
        else:
            self._count(tokens, self._table_of_all)
        self.tokens += tokens.size

    def move_to(self, frequency: TokenFrequency) -> None:
        """Adds the counts to a frequency, and sets them to 0."""
        no_targets = int(self._table_of_no_targets.seen)
        if no_targets:
            self._all -= self._no_targets
            self._table_of_all.ignore(no_targets)
            self._no_targets.fill(0)
        self._table_of_all.seen.fill_(self.tokens)
        for total, added in zip(frequency.table, self._table_of_all, strict=True):
            array = total.numpy()
            np.add(array, added.numpy(), out=array)
        self._all.fill(0)
        self.tokens = 0

    def _count(self, tokens: NDArray[Any], table: CountTable) -> None:
        try:
            table.add(tensor_to_read(tokens), ignore_index=self._ignore_index, strict=self._strict, alone=True)
        except IndexError:
            wrong = (tokens != self._ignore_index) & ((tokens < 0) | (tokens >= self.vocab_size))
            raise IndexError(f"got the id {tokens[wrong][0]}, expected 0 <= id < {self.vocab_size}") from None
