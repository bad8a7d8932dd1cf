"""Consecutive tokens in a file, after any header: the basis of most formats."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pdl_ext.corpus.reading.access import OpenFile, opened, read_at, read_numbers
from pdl_ext.corpus.reading.width import BLOCK_BYTES, block_starts, doubt_of_width
from pdl_ext.corpus.source import Batch, Part, ReadOptions, Source, as_countable, check_stated_dtype, token_dtype
from pdl_ext.storage.place import Place

__all__ = ["BUFFER_BYTES", "AscendingNumbers", "FlatSource"]

# Small enough to be in the last cache when it is counted, large enough that the calls cost almost nothing.
BUFFER_BYTES = 2**21


class FlatSource(Source):
    """Consecutive tokens of a file, between a header of first_byte bytes and bytes_behind further bytes.

    tokens: the number that the file states, None if it states none. starts_between(a, b): the positions from a to
    before b where a sequence starts; with targets "shifted" those tokens are not counted. Position 0 may be included or
    not. None: the file is one sequence. mask: a file with one byte per token, 0 where it is not a target. is_given:
    whether the dtype comes from the user, not from the file. has_columns: whether policy.column named the tokens.

    A part is a range of tokens.
    """

    def __init__(
        self,
        format_name: str,
        path: Place,
        dtype: str,
        options: ReadOptions,
        *,
        first_byte: int = 0,
        tokens: int | None = None,
        bytes_behind: int = 0,
        starts_between: Callable[[int, int], NDArray[np.int64]] | None = None,
        mask: Place | None = None,
        companions: Sequence[Place] = (),
        is_given: bool = False,
        has_columns: bool = False,
    ) -> None:
        for name in ("column", "mask", "skip_prompt"):
            value = getattr(options.policy, name)
            if value is not None and not has_columns:
                raise ValueError(f"{path}: got {name} {value!r}, expected None: a file of {format_name} has no columns")
        if mask is not None:
            companions = (*companions, mask)
        super().__init__(format_name, path, dtype, companions)
        check_stated_dtype(path, dtype, options)
        self._dtype = token_dtype(dtype)
        itemsize = self._dtype.itemsize
        if tokens is None:
            tokens, rest = divmod(self.size - first_byte, itemsize)
            if rest:
                raise ValueError(
                    f"{path}: got {self.size} bytes, expected a multiple of {itemsize}: its tokens are {dtype}"
                )
        elif (expected := first_byte + tokens * itemsize + bytes_behind) != self.size:
            raise ValueError(
                f"{path}: got {self.size} bytes, expected {expected}: it states {tokens} tokens of {dtype} from byte "
                f"{first_byte} on"
            )
        if mask is not None and self.stamps[mask].size != tokens:
            raise ValueError(f"{mask}: got {self.stamps[mask].size} bytes, expected {tokens}, one per token of {path}")
        self.first_byte = first_byte
        self.tokens = tokens
        self._options = options
        self._is_given = is_given
        self._shifted = options.policy.targets == "shifted"
        self._starts_between = starts_between
        self._mask = mask

    def stated_tokens(self) -> int:
        return self.tokens

    def doubt(self) -> str | None:
        if not self._is_given:
            return None
        size = self.tokens * self._dtype.itemsize
        blocks = []
        with opened(self.path) as file:
            for start in block_starts(size):
                blocks.append(np.empty(min(BLOCK_BYTES, size - start), np.uint8))
                read_at(file, blocks[-1], self.first_byte + start, self.path)
        return doubt_of_width(self.path, self.dtype, blocks, [size], self._options)

    def parts(self, size: int) -> Iterator[Part]:
        per_part = max(1, size // self._dtype.itemsize)
        for start in range(0, self.tokens, per_part):
            stop = min(start + per_part, self.tokens)
            yield Part(start, stop, (stop - start) * self._dtype.itemsize)

    def batches(self, part: Part) -> Iterator[Batch]:
        itemsize = self._dtype.itemsize
        buffer = np.empty(min(part.stop - part.start, BUFFER_BYTES // itemsize), self._dtype)
        with opened(self.path) as file, self._opened_mask() as mask:
            file.read_ahead(self.first_byte + part.start * itemsize, self.first_byte + part.stop * itemsize)
            for start in range(part.start, part.stop, buffer.size):
                stop = min(start + buffer.size, part.stop)
                tokens = buffer[: stop - start]
                read_at(file, tokens, self.first_byte + start * itemsize, self.path)
                is_target = None
                if self._mask is not None and mask is not None:
                    marks = np.empty(stop - start, np.uint8)
                    read_at(mask, marks, start, self._mask)
                    is_target = marks != 0
                if self._shifted:
                    is_target = self._without_starts(start, stop, is_target)
                yield Batch(as_countable(tokens), is_target)

    def _opened_mask(self) -> contextlib.AbstractContextManager[OpenFile | None]:
        return contextlib.nullcontext() if self._mask is None else opened(self._mask)

    def _without_starts(self, start: int, stop: int, is_target: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        starts = None if self._starts_between is None else self._starts_between(start, stop) - start
        if start > 0 and (starts is None or starts.size == 0):
            return is_target
        if is_target is None:
            is_target = np.ones(stop - start, np.bool_)
        if start == 0:
            is_target[0] = False
        if starts is not None:
            is_target[starts] = False
        return is_target


class AscendingNumbers:
    """Integers in ascending order, possibly with equal ones, in a file of any size; only a few are held in memory.

    last: the last of them, 0 if there is none.
    Raises ValueError that names the file and the position if they do not ascend from 0 or more.
    """

    # One in so many is held; the others are read on request.
    _STEP = 1024

    def __init__(self, path: Place, dtype: str, first_byte: int, count: int) -> None:
        self._path, self._dtype, self._first_byte, self._count = path, dtype, first_byte, count
        self.last = 0
        held = []
        for start, numbers in self.blocks():
            before = np.concatenate(([self.last], numbers[:-1]))
            if (numbers < before).any():
                wrong = int((numbers < before).argmax())
                raise ValueError(
                    f"{path}: got {numbers[wrong]} after {before[wrong]} at entry {start + wrong} from byte "
                    f"{first_byte} on, expected numbers that ascend"
                )
            held.append(numbers[:: self._STEP].copy())
            self.last = int(numbers[-1])
        self._held = np.concatenate(held) if held else np.zeros(0, np.int64)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """The numbers of a range, as pairs of a position and the numbers from there on."""
        stop = self._count if stop is None else stop
        itemsize = np.dtype(self._dtype).itemsize
        # A multiple of _STEP, so that the held numbers are evenly spaced.
        per_block = 32 * self._STEP
        if start >= stop:
            return
        with opened(self._path) as file:
            file.read_ahead(self._first_byte + start * itemsize, self._first_byte + stop * itemsize)
            for block in range(start, stop, per_block):
                count = min(per_block, stop - block)
                offset = self._first_byte + block * itemsize
                yield block, read_numbers(file, self._dtype, offset, count, self._path).astype(np.int64)

    def between(self, low: int, high: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """The numbers from low to before high, as pairs of a position and the numbers from there on, none empty."""
        # After the last held number below `low` there may be further ones below it.
        start = max(0, int(np.searchsorted(self._held, low)) - 1) * self._STEP
        stop = min(int(np.searchsorted(self._held, high)) * self._STEP, self._count)
        for position, numbers in self.blocks(start, stop):
            first, end = np.searchsorted(numbers, (low, high))
            if first < end:
                yield position + int(first), numbers[first:end]

    def distinct_between(self, low: int, high: int) -> NDArray[np.int64]:
        """The numbers from low to before high, each once."""
        return distinct(numbers for _, numbers in self.between(low, high))


def distinct(ascending: Iterator[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The numbers of some arrays, each once."""
    # Each array separately first: however often a number is repeated, only the distinct ones are held.
    found = [np.unique(numbers) for numbers in ascending]
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
