"""What a reader of a format gives the counting loop: sources, cut into ranges, read as batches of tokens."""

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

# What a file may hold, and as what it is counted: the histogram knows no signed 8-bit and 16-bit tokens.
TOKEN_DTYPES = {
    "uint8": np.uint8,
    "int8": np.int8,
    "uint16": np.uint16,
    "int16": np.int16,
    "uint32": np.uint32,
    "int32": np.int32,
    "int64": np.int64,
}

# Enough to tell how many there are in the rest, and encoded in a fraction of a second.
SAMPLE_TOKENS = 2**15
_SAMPLE_BYTES = 2**16


def token_dtype(name: str) -> np.dtype[Any]:
    """The little-endian dtype of a name in TOKEN_DTYPES."""
    return np.dtype(TOKEN_DTYPES[name]).newbyteorder("<")


def as_countable(tokens: NDArray[Any]) -> NDArray[Any]:
    """Integers as TokenFrequency counts them, a copy only where it must be.

    Those above 2^63 become negative: they are of no vocabulary either way, and -100 that was wrapped is -100 again.
    """
    if tokens.dtype.kind == "i" and tokens.dtype.itemsize < 4:
        return tokens.astype(np.int32)
    return tokens.view(np.int64) if tokens.dtype == np.uint64 else tokens


def as_signed(labels: NDArray[Any]) -> NDArray[Any]:
    """Labels among which a negative one, as -100 is, may have been wrapped to be unsigned: negative again."""
    wraps = labels.dtype.kind == "u" and labels.dtype.itemsize >= 4
    return labels.view(labels.dtype.str.replace("u", "i")) if wraps else labels


def count_dtype(dtype: str) -> str:
    """The name in TOKEN_DTYPES of what tokens of a dtype are counted as."""
    return "int64" if dtype == "uint64" else dtype


def check_stated_dtype(path: Place, dtype: str, options: ReadOptions) -> None:
    """Raises ValueError unless the dtype that a file states is counted as the one that is given, or none is."""
    if options.dtype not in (None, count_dtype(dtype)):
        raise ValueError(f"{path}: got dtype {options.dtype}, expected {dtype}, which the file tells, or none")


@dataclass(frozen=True)
class ReadOptions:
    """How to read a corpus, whatever its formats are.

    vocab_size: V, by which readers warn of a dtype that cannot hold it. The dtype is that of files which do not tell
    theirs, a name in TOKEN_DTYPES, or None. The tokenizer is for text: a file of the `tokenizers` library, or a folder
    of a transformers tokenizer. With strict doubts are errors.
    """

    vocab_size: int
    policy: TargetPolicy = field(default_factory=TargetPolicy)
    dtype: str | None = None
    tokenizer: Place | None = None
    strict: bool = False


class Batch(NamedTuple):
    """Some tokens: [n] of a dtype that TokenFrequency counts, and which of them are targets, bool [n]; None: all.

    Views of buffers that the next batch may overwrite.
    """

    tokens: NDArray[Any]
    is_target: NDArray[np.bool_] | None = None


class Part(NamedTuple):
    """A range of a source that is counted at once or not at all: [start, stop) in units of the source's own.

    size: how many bytes of the source it is, for progress and for an even split.
    """

    start: int
    stop: int
    size: int


class Sample(NamedTuple):
    """How many tokens some bytes of a source hold."""

    tokens: int
    size: int


class Stamp(NamedTuple):
    """What tells that a file has changed: its size, and when it was modified, in ns, or what a store tells it by."""

    size: int
    version: int | str

    @classmethod
    def of(cls, path: Place, *, fresh: bool = False) -> Stamp:
        """The stamp of a file, of an object of a store as it was listed or, `fresh`, as it is now.

        Raises ValueError that names one which cannot be read or is no file.
        """
        try:
            if isinstance(path, RemotePath):
                return cls(*path.version(fresh=fresh))
            status = os.stat(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
        # Pipes and devices have no size, and are read once at most.
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: is no regular file, expected one")
        return cls(status.st_size, status.st_mtime_ns)

    def check(self, path: Place) -> None:
        """Raises ValueError that names a file whose stamp is another by now."""
        now = Stamp.of(path, fresh=True)
        if now == self:
            return
        what = "another object by now"
        if isinstance(now.version, int) and isinstance(self.version, int):
            what = f"modified {(now.version - self.version) / 1e9:+.3f} s later"
        raise ValueError(f"{path}: changed while it was counted, from {self.size} bytes to {now.size}, {what}")


class Source(ABC):
    """The tokens of one shard: a file, with its companions.

    path: the file that holds the tokens, whose name and content stand in the provenance; companions: the others that it
    is read with; dtype: the tokens' name in TOKEN_DTYPES, or "text".
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
        """All files, as they were when the source was made."""
        return dict(self._stamps)

    @property
    def is_remote(self) -> bool:
        """Whether it lies in a store, which takes its time to answer."""
        return any(isinstance(path, RemotePath) for path in self._stamps)

    def shard(self) -> Shard:
        """What the provenance says of it. Raises OSError if the file cannot be read."""
        return Shard(str(self.path), self.size, shard_digest(self.path), self.format, self.dtype)

    def doubt(self) -> str | None:
        """What in the file speaks against how it is read, if anything does: a warning that names it."""
        return None

    def stated_tokens(self) -> int | None:
        """How many tokens the file states that it holds, or its size; None if only reading it tells."""
        return None

    def sample(self) -> Sample:
        """Some tokens from its beginning: all of a small source. Raises ValueError as reading it does."""
        tokens = size = 0
        for part in self.parts(_SAMPLE_BYTES):
            tokens += sum(batch.tokens.size for batch in self.batches(part))
            size += part.size
            if tokens >= SAMPLE_TOKENS:
                break
        return Sample(tokens, size)

    def check_unchanged(self) -> None:
        """Raises ValueError that names a file which is no longer what it was when the source was made."""
        for path, stamp in self._stamps.items():
            stamp.check(path)

    def placed_batches(self, part: Part) -> Iterator[tuple[object, Batch]]:
        """The tokens of a part, each batch with the place that errors name: of a line or row where there are any.

        Slower than `batches`.
        """
        return ((self.path, batch) for batch in self.batches(part))

    @abstractmethod
    def parts(self, size: int) -> Iterable[Part]:
        """All of the source, in parts of about `size` bytes: the same whenever the same files are asked."""

    @abstractmethod
    def batches(self, part: Part) -> Iterator[Batch]:
        """The tokens of a part, a bounded number at a time. Raises ValueError that names the file and the place."""


class Format(NamedTuple):
    """A format of corpora, as discover.py asks for it.

    recognises(path, head): whether a file that begins with `head`, 512 bytes of it, can be nothing else;
    open(path, options): its sources; companions: how the names of files end that are read with another one, and what
    the name of that one has instead: left out where the other is there, too, and otherwise opened, to tell of it;
    has_folders: whether a folder may be of the format, which recognises is then asked about, too, with an empty head;
    has_header: whether not all of a file is tokens.
    """

    name: str
    open: Callable[[Place, ReadOptions], list[Source]]
    recognises: Callable[[Place, bytes], bool]
    companions: Mapping[str, str] = MappingProxyType({})
    has_folders: bool = False
    has_header: bool = False
