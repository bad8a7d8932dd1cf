"""Megatron's pair of files: .bin with the tokens, .idx with the sequences and documents.

The .idx has a header: magic, version 1 (u64), dtype (u8), and the numbers of sequences (u64) and of document boundaries
(u64). Three arrays follow:

- the sequences' lengths in tokens (i32),
- their positions in the .bin in bytes (i64),
- the boundaries as numbers of sequences (i64), from 0 to all of them.

An .idx of fairseq has neither the boundaries nor their number: each of its sequences is a document.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pdl_ext.corpus.reading.access import opened, read_array, read_head, read_numbers
from pdl_ext.corpus.reading.flat import AscendingNumbers, FlatSource, distinct
from pdl_ext.corpus.source import Format, ReadOptions, Source, Stamp, count_dtype, token_dtype
from pdl_ext.storage.place import Place

__all__ = ["FORMAT"]

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQ")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16", 9: "uint32", 10: "uint64"}
# 32 and 64 bits; Megatron and fairseq assign them differently.
_FLOATS = (6, 7)
_OTHER_MAGICS = {
    b"TNTIDX": "the older datasets (lazy and cached) of fairseq, whose ids are one too large, or of Megatron",
    b"HUFFIDX": "fairseq's Huffman codes",
}
_BLOCK = 2**15


def _recognises(path: Place, head: bytes) -> bool:
    # Whatever the .idx holds: with a damaged .idx, the .bin alone would be read as raw ids.
    return head.startswith(_MAGIC) or (path.suffix == ".bin" and path.with_suffix(".idx").is_file())


def _open(path: Place, options: ReadOptions) -> list[Source]:
    tokens_file, index_file = path.with_suffix(".bin"), path.with_suffix(".idx")
    for file in (index_file, tokens_file):
        if not file.is_file():
            raise ValueError(f"{file}: is missing, expected it beside {path.name}: a .bin and its .idx go together")
    index = _Index(index_file, Stamp.of(tokens_file).size)
    return [
        FlatSource(
            index.format,
            tokens_file,
            index.dtype,
            options,
            tokens=index.tokens,
            starts_between=index.document_starts,
            companions=(index_file,),
        )
    ]


class _Index:
    """A valid .idx for a .bin of `size` bytes. Raises ValueError that names the problem."""

    def __init__(self, path: Place, size: int) -> None:
        self._path = path
        header = read_head(path, _HEADER.size)
        other = next((what for magic, what in _OTHER_MAGICS.items() if header.startswith(magic)), None)
        if other is not None:
            raise ValueError(
                f"{path}: is an index of {other}, expected a memory-mapped one: write the data anew as mmap"
            )
        if len(header) < _HEADER.size:
            raise ValueError(f"{path}: got {len(header)} bytes, expected a header of {_HEADER.size} bytes or more")
        magic, version, code, sequences = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise ValueError(
                f"{path}: got magic {magic!r}, expected {_MAGIC!r} of Megatron's .idx (or --format raw, "
                "if it is another program's)"
            )
        if version != 1:
            swapped = " (a big-endian file)" if version == 1 << 56 else ""
            raise ValueError(f"{path}: got version {version}{swapped}, expected 1")
        if code not in _DTYPES:
            name = " (a float)" if code in _FLOATS else ""
            raise ValueError(f"{path}: got dtype code {code}{name}, expected one of tokens: {_DTYPES}")
        self.dtype = count_dtype(_DTYPES[code])
        self._itemsize = token_dtype(self.dtype).itemsize
        documents = self._boundaries(sequences)
        self.format = "fairseq" if documents is None else "megatron"
        lengths = _HEADER.size + (0 if documents is None else 8)
        places = lengths + 4 * sequences
        self._check_lengths(sequences, lengths, places, size)
        self.tokens = size // self._itemsize
        self._places = AscendingNumbers(path, "<i8", places, sequences)
        self._documents = None if documents is None else self._checked(documents, sequences, places + 8 * sequences)

    def _boundaries(self, sequences: int) -> int | None:
        """The number of document boundaries; None if the file is as long as fairseq's, which has none."""
        got = Stamp.of(self._path).size
        end = _HEADER.size + 12 * sequences
        # They share the magic, but with equally many sequences Megatron's is longer, whatever its boundaries are.
        if got == end:
            return None
        documents = int(read_array(self._path, "<u8", _HEADER.size, 1)[0]) if got >= _HEADER.size + 8 else 0
        of_megatron = end + 8 + 8 * documents
        # An index of several modalities ends with one more byte a sequence, its mode.
        if got not in (of_megatron, of_megatron + sequences):
            raise ValueError(
                f"{self._path}: got {got} bytes, expected {of_megatron}: it states {sequences} sequences and "
                f"{documents} document boundaries (or {end} bytes, as fairseq's without boundaries)"
            )
        return documents

    def _checked(self, documents: int, sequences: int, offset: int) -> AscendingNumbers:
        try:
            numbers = AscendingNumbers(self._path, "<i8", offset, documents)
        except ValueError as error:
            raise ValueError(f"{error}{self._way_out}") from error
        first = int(read_array(self._path, "<i8", offset, 1)[0]) if documents else None
        if first != 0 or numbers.last != sequences:
            raise ValueError(
                f"{self._path}: got documents from sequence {first} to {numbers.last}, expected from 0 to {sequences}, "
                f"as Megatron's builder leaves them if each document is ended{self._way_out}"
            )
        return numbers

    @property
    def _way_out(self) -> str:
        """How to count tokens whose lengths add up to the .bin, if the rest of the index is invalid."""
        return f"; the tokens can be counted without it: --format raw --dtype {self.dtype} (and --targets all)"

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """The positions from start to before stop of tokens that begin a document."""
        return distinct(self._document_starts(start, stop))

    def _document_starts(self, start: int, stop: int) -> Iterator[NDArray[np.int64]]:
        for sequence, places in self._places.between(start * self._itemsize, stop * self._itemsize):
            if self._documents is None:
                yield places // self._itemsize
                continue
            # A document or sequence without tokens begins where the next one does.
            first_sequences = self._documents.distinct_between(sequence, sequence + places.size)
            yield places[first_sequences - sequence] // self._itemsize

    def _check_lengths(self, sequences: int, first: int, places: int, size: int) -> None:
        """Checks that sequences follow one another without a gap, from the .bin's beginning to its end."""
        end, misplaced = 0, ""
        with opened(self._path) as file:
            for start in range(0, sequences, _BLOCK):
                count = min(_BLOCK, sequences - start)
                lengths = read_numbers(file, "<i4", first + 4 * start, count, self._path).astype(np.int64)
                if (lengths < 0).any():
                    wrong = int((lengths < 0).argmax())
                    raise ValueError(
                        f"{self._path}: got length {lengths[wrong]} of sequence {start + wrong}, expected 0 or more"
                    )
                ends = end + np.cumsum(lengths * self._itemsize)
                expected = np.concatenate(([end], ends[:-1]))
                found = read_numbers(file, "<i8", places + 8 * start, count, self._path)
                differs = found != expected
                if differs.any():
                    wrong = int(differs.argmax())
                    misplaced = misplaced or (
                        f"{self._path}: got byte {found[wrong]} as the place of sequence {start + wrong}, expected "
                        f"{expected[wrong]}, where the one before ends"
                    )
                    if ((found - expected) % 2**32 != 0).any():
                        raise ValueError(misplaced)
                end = int(ends[-1])
                if end > size:
                    break
        if end != size:
            raise ValueError(
                misplaced
                or f"{self._path}: its sequences end at byte {end} or later, expected {size}, the size of its .bin"
            )
        if misplaced:
            # The writer computed them in 32 bits.
            raise ValueError(f"{misplaced}: it overflowed when it was written{self._way_out}")


FORMAT = Format("megatron", _open, _recognises, companions={".idx": ".bin"})
