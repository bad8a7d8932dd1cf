"""The interface between a reader of a format and the counting loop: sources in parts, read as batches of tokens."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pdl_ext.provenance import Shard, TargetPolicy, shard_digest
from pdl_ext.storage.place import Place, RemotePath

__all__ = [
    "SAMPLE_TOKENS",
    "TOKEN_DTYPES",
    "Batch",
    "Format",
    "Part",
    "ReadOptions",
    "Sample",
    "Source",
    "Stamp",
    "as_countable",
    "as_signed",
    "check_stated_dtype",
    "count_dtype",
    "token_dtype",
]

# The dtypes of files. The histogram has no signed 8-bit and 16-bit tokens, so these are converted.
TOKEN_DTYPES = {
    "uint8": np.uint8,
    "int8": np.int8,
    "uint16": np.uint16,
    "int16": np.int16,
    "uint32": np.uint32,
    "int32": np.int32,
    "int64": np.int64,
}

# Enough to estimate the number in the rest, and encoded in a fraction of a second.
SAMPLE_TOKENS = 2**15
_SAMPLE_BYTES = 2**16


def token_dtype(name: str) -> np.dtype[Any]:
    """The little-endian dtype of a name in TOKEN_DTYPES."""
    return np.dtype(TOKEN_DTYPES[name]).newbyteorder("<")


def as_countable(tokens: NDArray[Any]) -> NDArray[Any]:
    """Integers in a dtype that TokenFrequency counts, copied only if necessary.

    uint64 ids from 2^63 on become negative: they are out of range either way, and a wrapped -100 is -100 again.
    """
    if tokens.dtype.kind == "i" and tokens.dtype.itemsize < 4:
        return tokens.astype(np.int32)
    return tokens.view(np.int64) if tokens.dtype == np.uint64 else tokens


def as_signed(labels: NDArray[Any]) -> NDArray[Any]:
    """Labels in which a negative id such as -100 may have been wrapped to an unsigned one: negative again."""
    wraps = labels.dtype.kind == "u" and labels.dtype.itemsize >= 4
    return labels.view(labels.dtype.str.replace("u", "i")) if wraps else labels


def count_dtype(dtype: str) -> str:
    """The name in TOKEN_DTYPES under which tokens of a dtype are counted."""
    return "int64" if dtype == "uint64" else dtype


def check_stated_dtype(path: Place, dtype: str, options: ReadOptions) -> None:
    """Raises ValueError if a dtype was given that differs from the one stated in the file."""
    if options.dtype not in (None, count_dtype(dtype)):
        raise ValueError(f"{path}: got dtype {options.dtype}, expected {dtype}, which the file states, or none")


@dataclass(frozen=True)
class ReadOptions:
    """How to read a corpus, whatever its formats.

    Args:
        vocab_size: V; readers warn of a dtype that is too small for it.
        policy: which tokens are targets.
        dtype: that of files which do not state one, a name in TOKEN_DTYPES, or None.
        tokenizer: for text, a file of the `tokenizers` library, or a folder of a transformers tokenizer.
        strict: doubts are errors.
    """

    vocab_size: int
    policy: TargetPolicy = field(default_factory=TargetPolicy)
    dtype: str | None = None
    tokenizer: Place | None = None
    strict: bool = False


class Batch(NamedTuple):
    """Some tokens, [n], of a dtype that TokenFrequency counts. is_target: bool [n], None for all.

    Both are views of buffers that the next batch may overwrite.
    """

    tokens: NDArray[Any]
    is_target: NDArray[np.bool_] | None = None


class Part(NamedTuple):
    """A range of a source, from start to before stop, in units of the source. It is counted completely or not at all.

    size: its bytes in the source, for progress and for an even division.
    """

    start: int
    stop: int
    size: int


class Sample(NamedTuple):
    """The number of tokens in some bytes of a source."""

    tokens: int
    size: int


class Stamp(NamedTuple):
    """The size and version of a file, which change when it does.

    version: the time of modification in ns, or a text from the store.
    """

    size: int
    version: int | str

    @classmethod
    def of(cls, path: Place, *, fresh: bool = False) -> Stamp:
        """The stamp of a file, or of a store's object as it was listed or, `fresh`, as it is now.

        Raises ValueError that names a file which cannot be read or is not a regular file.
        """
        try:
            if isinstance(path, RemotePath):
                return cls(*path.version(fresh=fresh))
            status = os.stat(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
        # Pipes and devices have no size, and can be read only once.
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: is not a regular file, expected one")
        return cls(status.st_size, status.st_mtime_ns)

    def check(self, path: Place) -> None:
        """Raises ValueError that names a file whose stamp has changed."""
        now = Stamp.of(path, fresh=True)
        if now == self:
            return
        what = "now another object"
        if isinstance(now.version, int) and isinstance(self.version, int):
            what = f"modified {(now.version - self.version) / 1e9:+.3f} s later"
        raise ValueError(f"{path}: changed while it was counted, from {self.size} bytes to {now.size}, {what}")


class Source(ABC):
    """The tokens of one shard: a file, with its companions.

    Attributes:
        path: the file with the tokens; the provenance has its name and digest.
        companions: further files that are read with it.
        dtype: the tokens' name in TOKEN_DTYPES, or "text".
    """

    def __init__(self, format_name: str, path: Place, dtype: str, companions: Sequence[Place] = ()) -> None:
        self.format = format_name
        self.path = path
        self.dtype = dtype
        self._stamps = {file: Stamp.of(file) for file in (path, *companions)}

    @property
    def size(self) -> int:
        """The size of `path` in bytes."""
        return self._stamps[self.path].size

    @property
    def stamps(self) -> dict[Place, Stamp]:
        """The stamps of all files at the time when the source was made."""
        return dict(self._stamps)

    @property
    def is_remote(self) -> bool:
        """Whether it is in a store, whose answers take time."""
        return any(isinstance(path, RemotePath) for path in self._stamps)

    def shard(self) -> Shard:
        """Its entry in the provenance. Raises OSError if the file cannot be read."""
        return Shard(str(self.path), self.size, shard_digest(self.path), self.format, self.dtype)

    def doubt(self) -> str | None:
        """A warning that names the file, if its content suggests another dtype or kind; None otherwise."""
        return None

    def stated_tokens(self) -> int | None:
        """The number of tokens that the file states, or that follows from its size; None if it has to be read."""
        return None

    def sample(self) -> Sample:
        """Some tokens from its beginning; all of a small source. Raises ValueError as reading it does."""
        tokens = size = 0
        for part in self.parts(_SAMPLE_BYTES):
            tokens += sum(batch.tokens.size for batch in self.batches(part))
            size += part.size
            if tokens >= SAMPLE_TOKENS:
                break
        return Sample(tokens, size)

    def check_unchanged(self) -> None:
        """Raises ValueError that names a file which has changed since the source was made."""
        for path, stamp in self._stamps.items():
            stamp.check(path)

    def placed_batches(self, part: Part) -> Iterator[tuple[object, Batch]]:
        """The tokens of a part, each batch with the place that errors name: of a line or row where there are any.

        Slower than `batches`.
        """
        return ((self.path, batch) for batch in self.batches(part))

    @abstractmethod
    def parts(self, size: int) -> Iterable[Part]:
        """The whole source, in parts of about `size` bytes: always the same for the same files."""

    @abstractmethod
    def batches(self, part: Part) -> Iterator[Batch]:
        """The tokens of a part, in batches of limited size. Raises ValueError that names the file and the position."""


class Format(NamedTuple):
    """A format of corpora, as discover.py uses it.

    recognises(path, head): whether a file that begins with `head`, its first 512 bytes, can only be of this format.
    open(path, options): its sources.
    companions: maps the suffix of a side file (`.idx`) to that of its main file (`.bin`). A side file is skipped if its
    main file is present. Otherwise it is opened, so that the reader can report the missing one.
    has_folders: the format can be a folder; `recognises` is then also called for folders, with an empty head.
    has_header: whether a part of the file is not tokens.
    """

    name: str
    open: Callable[[Place, ReadOptions], list[Source]]
    recognises: Callable[[Place, bytes], bool]
    companions: Mapping[str, str] = MappingProxyType({})
    has_folders: bool = False
    has_header: bool = False
