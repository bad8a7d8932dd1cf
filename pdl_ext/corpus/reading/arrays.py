"""Arrays of ids as batches of tokens, and the choice of an array in a file of several."""

from __future__ import annotations

import contextlib
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdl_ext.corpus.reading.columns import TOKEN_COLUMNS
from pdl_ext.corpus.source import Batch, ReadOptions, as_countable
from pdl_ext.storage.place import Place

__all__ = [
    "ZIP_ERRORS",
    "ZIP_MAGIC",
    "array_batches",
    "check_whole_zip",
    "chosen_array",
    "first_zip_name",
    "row_batches",
    "zip_names",
]

ZIP_MAGIC = b"PK\3\4"
_EMPTY_ZIP_MAGIC = b"PK\5\6"
# The errors that Python's zipfile raises for damaged archives.
ZIP_ERRORS = (
    *(zipfile.BadZipFile, OSError, EOFError, zlib.error, struct.error, UnicodeDecodeError, OverflowError),
    # For unknown methods and encryption.
    *(NotImplementedError, RuntimeError),
)
# They fit into a core's cache while they are counted.
_BATCH_TOKENS = 2**18


def array_batches(array: NDArray[Any], shifted: bool) -> Iterator[Batch]:
    """The ids of a contiguous array of one axis or more, views of it; shifted: as in row_batches."""
    tokens = array.reshape(-1)
    pieces = (tokens[start : start + _BATCH_TOKENS] for start in range(0, tokens.size, _BATCH_TOKENS))
    return row_batches(pieces, array.shape[-1], shifted)


def row_batches(pieces: Iterable[NDArray[Any]], row: int, shifted: bool) -> Iterator[Batch]:
    """The ids of rows of one length, which come in consecutive pieces of any size.

    shifted: whether the first id of each row is not a target.
    """
    start = 0
    for piece in pieces:
        is_target = None
        if shifted:
            is_target = np.ones(piece.size, np.bool_)
            is_target[-start % row :: row] = False
        yield Batch(as_countable(piece), is_target)
        start += piece.size


def chosen_array(path: Place, axes: Mapping[str, int], refused: Mapping[str, ValueError], options: ReadOptions) -> str:
    """The name of the array in a file that holds the tokens.

    axes: the number of axes of each array of integers, by name. refused: for each other entry, the error that says why.
    Raises ValueError that names the file if there is no such array or more than one, or for columns beside the tokens.
    """
    policy = options.policy
    for option in ("mask", "skip_prompt"):
        if getattr(policy, option) is not None:
            raise ValueError(
                f"{path}: got {option} {getattr(policy, option)!r}, expected None: only one array of a file is read"
            )
    name = policy.column
    if name is None:
        usual = [column for column in TOKEN_COLUMNS if axes.get(column)]
        # Not another one, in silence, where the one that is meant cannot be read.
        usual += [column for column in TOKEN_COLUMNS if column in refused]
        found = usual[:1] or [array for array in axes if axes[array]]
        name = found[0] if len(found) == 1 else next(iter(refused)) if not axes and len(refused) == 1 else None
    if name is not None and name in refused:
        raise refused[name]
    if name is None or not axes.get(name):
        names = ", ".join(map(repr, [*axes, *refused][:10])) or "none"
        asked = "one" if policy.column is None else repr(policy.column)
        raise ValueError(
            f"{path}: got the arrays {names}, expected {asked} of integers in one axis or more. Name it with --column, "
            "or leave the file out by a pattern"
        )
    return name


def first_zip_name(head: bytes) -> str:
    """The first name in a zip archive, by its first bytes, also if it was cut off; empty for any other file."""
    # Behind a header of 30 bytes, which tells its length.
    size = int.from_bytes(head[26:28], "little")
    return head[30 : 30 + size].decode("utf-8", "replace") if head.startswith(ZIP_MAGIC) else ""


def check_whole_zip(path: Place, writer: str) -> None:
    """Raises ValueError that names a file which is no zip archive, or one that was cut off.

    writer: what makes such files, for the error.
    """
    with path.open("rb") as file:
        head = file.read(len(ZIP_MAGIC))
        if head not in (ZIP_MAGIC, _EMPTY_ZIP_MAGIC):
            raise ValueError(f"{path}: begins with {head!r}, expected a zip archive, as {writer} writes it")
        has_end = True
        # Of an end that is damaged.
        with contextlib.suppress(zipfile.BadZipFile):
            has_end = zipfile.is_zipfile(file)
    if not has_end:
        raise ValueError(
            f"{path}: was cut off: it begins as a zip archive and has no record of its end, expected all of it. Copy "
            "or write it anew"
        )


def zip_names(path: Place) -> list[str]:
    """The names in a zip archive; empty for a file that is not an archive."""
    with contextlib.suppress(*ZIP_ERRORS), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        return archive.namelist()
    return []
