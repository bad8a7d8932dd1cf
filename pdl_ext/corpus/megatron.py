"""Megatron's pair of files: .bin with the tokens, .idx with the sequences and documents that they make up.

The .idx: magic, version 1 (u64), dtype (u8), how many sequences (u64) and document boundaries (u64) there are; then the
sequences' lengths in tokens (i32), their places in the .bin in bytes (i64), and the boundaries as numbers of sequences
(i64), from 0 to how many there are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pdl_ext.corpus.access import read_array, read_head
from pdl_ext.corpus.flat import AscendingNumbers, FlatSource, distinct
from pdl_ext.corpus.source import Format, ReadOptions, Source, Stamp, token_dtype

__all__ = ["FORMAT"]

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_FLOATS = {6: "float64", 7: "float32"}
_BLOCK = 2**15


def _recognises(path: Path, head: bytes) -> bool:
    # Whatever the .idx holds: if that is damaged, the .bin alone would pass for raw ids.
    return head.startswith(_MAGIC) or (path.suffix == ".bin" and path.with_suffix(".idx").is_file())


def _open(path: Path, options: ReadOptions) -> list[Source]:
    tokens_file, index_file = path.with_suffix(".bin"), path.with_suffix(".idx")
    for file in (index_file, tokens_file):
        if not file.is_file():
            raise ValueError(f"{file}: is missing, expected it beside {path.name}: a .bin and its .idx go together")
    index = _Index(index_file, Stamp.of(tokens_file).size)
    return [
        FlatSource(
            "megatron",
            tokens_file,
            index.dtype,
            options,
            tokens=index.tokens,
            starts_between=index.document_starts,
            companions=(index_file,),
        )
    ]


class _Index:
    """A valid .idx of a .bin of `size` bytes. Raises ValueError that names what in it is wrong."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        header = read_head(path, _HEADER.size)
        if len(header) < _HEADER.size:
            raise ValueError(f"{path}: got {len(header)} bytes, expected a header of {_HEADER.size} bytes of Megatron")
        magic, version, code, sequences, documents = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise ValueError(
                f"{path}: got magic {magic!r}, expected {_MAGIC!r} of Megatron's .idx (or --format raw, "
                "if it is another program's)"
            )
        if version != 1:
            swapped = " (a big-endian file)" if version == 1 << 56 else ""
            raise ValueError(f"{path}: got version {version}{swapped}, expected 1")
        if code not in _DTYPES:
            name = f" ({_FLOATS[code]})" if code in _FLOATS else ""
            raise ValueError(f"{path}: got dtype code {code}{name}, expected one of tokens: {_DTYPES}")
        places = _HEADER.size + 4 * sequences
        numbers = places + 8 * sequences
        end = numbers + 8 * documents
        got = Stamp.of(path).size
        # An index of several modalities ends with one more byte a sequence, its mode.
        if got not in (end, end + sequences):
            raise ValueError(
                f"{path}: got {got} bytes, expected {end}: it states {sequences} sequences and {documents} document "
                "boundaries"
            )
        self.dtype = _DTYPES[code]
        self._itemsize = token_dtype(self.dtype).itemsize
        self._check_lengths(sequences, places, size)
        self.tokens = size // self._itemsize
        self._places = AscendingNumbers(path, "<i8", places, sequences)
        self._documents = AscendingNumbers(path, "<i8", numbers, documents)
        first = int(read_array(path, "<i8", numbers, 1)[0]) if documents else None
        if first != 0 or self._documents.last != sequences:
            raise ValueError(
                f"{path}: got documents from sequence {first} to {self._documents.last}, expected from 0 to {sequences}"
            )

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """The positions in [start, stop) of tokens that begin a document."""
        return distinct(self._document_starts(start, stop))

    def _document_starts(self, start: int, stop: int) -> Iterator[NDArray[np.int64]]:
        for sequence, places in self._places.between(start * self._itemsize, stop * self._itemsize):
            # A document or sequence without tokens begins where the next one does.
            first_sequences = self._documents.distinct_between(sequence, sequence + places.size)
            yield places[first_sequences - sequence] // self._itemsize

    def _check_lengths(self, sequences: int, places: int, size: int) -> None:
        """Sequences follow one another without a gap, from the .bin's beginning to its end."""
        end = 0
        for start in range(0, sequences, _BLOCK):
            count = min(_BLOCK, sequences - start)
            lengths = read_array(self._path, "<i4", _HEADER.size + 4 * start, count).astype(np.int64)
            if (lengths < 0).any():
                wrong = int((lengths < 0).argmax())
                raise ValueError(
                    f"{self._path}: got length {lengths[wrong]} of sequence {start + wrong}, expected 0 or more"
                )
            ends = end + np.cumsum(lengths * self._itemsize)
            expected = np.concatenate(([end], ends[:-1]))
            found = read_array(self._path, "<i8", places + 8 * start, count)
            if (found != expected).any():
                wrong = int((found != expected).argmax())
                raise ValueError(
                    f"{self._path}: got byte {found[wrong]} as the place of sequence {start + wrong}, expected "
                    f"{expected[wrong]}, where the one before ends"
                )
            end = int(ends[-1])
            if end > size:
                break
        if end != size:
            raise ValueError(
                f"{self._path}: its sequences end at byte {end} or later, expected {size}, the size of its .bin"
            )


FORMAT = Format("megatron", _open, _recognises, companions={".idx": ".bin"})
