"""Tokens that lie one after the other in a file, whatever stands before them: what most formats come down to."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdl_ext.corpus.source import Batch, Part, ReadOptions, Source, token_dtype

__all__ = ["BUFFER_BYTES", "FlatSource", "read_at"]

# It stays in a core's L2 cache beside the table of counts, so that counting does not read it from memory again.
BUFFER_BYTES = 2**18
# What the kernel is asked to read while the buffers before it are counted.
AHEAD_BYTES = 2**23


def read_at(descriptor: int, buffer: NDArray[Any], offset: int, path: Path) -> None:
    """Fills a contiguous array from a file at a byte offset. Raises ValueError that names a file which is too short."""
    view = memoryview(buffer.view(np.uint8))  # type: ignore[arg-type]
    done = 0
    while done < len(view):
        try:
            got = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read at byte {offset + done} ({error.strerror})") from error
        if got == 0:
            raise ValueError(f"{path}: ends at byte {offset + done}, expected {len(view) - done} bytes more")
        done += got


class FlatSource(Source):
    """Tokens [first_byte, first_byte + tokens * itemsize) of a file.

    starts_between(a, b): the ascending positions in [a, b) of tokens that begin a sequence, whose first token is
    no target with policy.targets "shifted"; None: the file is one sequence. mask: a file with one byte a token, 0 where
    it is no target.

    A part is a range of tokens.
    """

    def __init__(
        self,
        format_name: str,
        path: Path,
        dtype: str,
        options: ReadOptions,
        *,
        first_byte: int = 0,
        tokens: int | None = None,
        starts_between: Callable[[int, int], NDArray[np.int64]] | None = None,
        mask: Path | None = None,
        companions: Sequence[Path] = (),
    ) -> None:
        if mask is not None:
            companions = (*companions, mask)
        super().__init__(format_name, path, dtype, companions)
        self._dtype = token_dtype(dtype)
        itemsize = self._dtype.itemsize
        if tokens is None:
            tokens, rest = divmod(self.size - first_byte, itemsize)
            if rest:
                raise ValueError(
                    f"{path}: got {self.size} bytes, expected {first_byte} and a multiple of {itemsize}: "
                    f"its tokens are {dtype}"
                )
        elif first_byte + tokens * itemsize > self.size:
            raise ValueError(
                f"{path}: got {self.size} bytes, expected {first_byte + tokens * itemsize}: it states {tokens} tokens "
                f"of {dtype} from byte {first_byte} on"
            )
        if mask is not None and self.stamps[mask].size != tokens:
            raise ValueError(f"{mask}: got {self.stamps[mask].size} bytes, expected {tokens}, one a token of {path}")
        if options.vocab_size > np.iinfo(self._dtype).max + 1:
            warnings.warn(
                f"{path}: its tokens are {dtype}, and cannot hold ids above {np.iinfo(self._dtype).max} of a "
                f"vocabulary of {options.vocab_size}: larger ones would have wrapped when it was written",
                stacklevel=2,
            )
        self.first_byte = first_byte
        self.tokens = tokens
        self._shifted = options.policy.targets == "shifted"
        self._starts_between = starts_between or _one_sequence
        self._mask = mask

    def parts(self, size: int) -> Iterator[Part]:
        per_part = max(1, size // self._dtype.itemsize)
        for start in range(0, self.tokens, per_part):
            stop = min(start + per_part, self.tokens)
            yield Part(start, stop, (stop - start) * self._dtype.itemsize)

    def batches(self, part: Part) -> Iterator[Batch]:
        itemsize = self._dtype.itemsize
        buffer = np.empty(min(part.stop - part.start, BUFFER_BYTES // itemsize), self._dtype)
        with _Descriptor(self.path) as file, _Descriptor(self._mask) as mask_file:
            asked = part.start
            for start in range(part.start, part.stop, buffer.size):
                stop = min(start + buffer.size, part.stop)
                if start >= asked:
                    asked = min(start + AHEAD_BYTES // itemsize, part.stop)
                    _read_ahead(file, self.first_byte + start * itemsize, 2 * AHEAD_BYTES)
                tokens = buffer[: stop - start]
                read_at(file, tokens, self.first_byte + start * itemsize, self.path)
                is_target = None
                if self._mask is not None:
                    marks = np.empty(stop - start, np.uint8)
                    read_at(mask_file, marks, start, self._mask)
                    is_target = marks != 0
                if self._shifted:
                    starts = self._starts_between(start, stop)
                    if starts.size:
                        is_target = np.ones(stop - start, np.bool_) if is_target is None else is_target
                        is_target[starts - start] = False
                yield Batch(_countable(tokens), is_target)


class _Descriptor:
    """An open file's descriptor; -1 for None."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def __enter__(self) -> int:
        self._descriptor = -1
        if self._path is not None:
            try:
                self._descriptor = os.open(self._path, os.O_RDONLY)
            except OSError as error:
                raise ValueError(f"{self._path}: cannot be read ({error.strerror})") from error
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def _one_sequence(start: int, stop: int) -> NDArray[np.int64]:
    return np.zeros(1 if start == 0 < stop else 0, np.int64)


def _read_ahead(descriptor: int, offset: int, size: int) -> None:
    # Where the system has no such call, its own read-ahead has to do.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)


def _countable(tokens: NDArray[Any]) -> NDArray[Any]:
    narrow_and_signed = tokens.dtype.kind == "i" and tokens.dtype.itemsize < 4
    return tokens.astype(np.int32) if narrow_and_signed else tokens
