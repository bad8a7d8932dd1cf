"""NumPy's .npz: a zip archive of .npy files; one of them is read, piece by piece."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdl_ext.corpus.reading.arrays import (
    ZIP_ERRORS,
    check_whole_zip,
    chosen_array,
    first_zip_name,
    row_batches,
    zip_names,
)
from pdl_ext.corpus.reading.npy_header import HEAD_BYTES, NpyHeader, npy_header
from pdl_ext.corpus.source import Batch, Format, Part, ReadOptions, Source, check_stated_dtype, token_dtype
from pdl_ext.storage.place import Place

__all__ = ["FORMAT"]

_SUFFIX = ".npy"
_PIECE_BYTES = 2**20
# Other methods may use any amount of memory. NumPy writes none of them.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class _NpzSource(Source):
    """The whole file is one part."""

    def __init__(self, path: Place, options: ReadOptions) -> None:
        headers, sizes, refused = self._headers(path)
        self._name = chosen_array(path, {name: len(header.shape) for name, header in headers.items()}, refused, options)
        self._header = headers[self._name]
        self._header.check_rows(f"{path}: {self._name}", options)
        super().__init__("npz", path, self._header.dtype)
        if sizes[self._name] != self._header.first_byte + self.stated_tokens() * token_dtype(self.dtype).itemsize:
            raise self._not_as_long()
        check_stated_dtype(path, self._header.dtype, options)
        self._shifted = options.policy.targets == "shifted"

    def stated_tokens(self) -> int:
        return math.prod(self._header.shape)

    def parts(self, size: int) -> Iterator[Part]:
        yield Part(0, 1, self.size)

    def batches(self, part: Part) -> Iterator[Batch]:
        row = self._header.shape[-1]
        return row_batches(self._pieces(), row, self._shifted)

    def _headers(self, path: Place) -> tuple[dict[str, NpyHeader], dict[str, int], dict[str, ValueError]]:
        """For each array, by name, its header and its size with it in bytes, or the error that it is not integers."""
        headers, sizes, refused = {}, {}, {}
        with _archive(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(_SUFFIX)
                if name == member.filename:
                    continue
                if member.compress_type not in _METHODS:
                    raise ValueError(
                        f"{path}: got {name!r} of method {member.compress_type}, expected stored or deflated"
                    )
                with archive.open(member) as file:
                    try:
                        headers[name] = npy_header(f"{path}: {name}", file.read(HEAD_BYTES))
                        sizes[name] = member.file_size
                    except ValueError as error:
                        refused[name] = error
        return headers, sizes, refused

    def _not_as_long(self) -> ValueError:
        return ValueError(
            f"{self.path}: {self._name!r} is not as long as it states: {self._header.shape} of {self._header.dtype}"
        )

    def _pieces(self) -> Iterator[NDArray[Any]]:
        dtype = token_dtype(self._header.dtype)
        left = self.stated_tokens() * dtype.itemsize
        with _archive(self.path) as archive, archive.open(self._name + _SUFFIX) as file:
            file.read(self._header.first_byte)
            while left and (piece := file.read(min(left, _PIECE_BYTES))) and not len(piece) % dtype.itemsize:
                yield np.frombuffer(piece, dtype)
                left -= len(piece)
            # Reading to the end makes zipfile compare the checksum.
            if left or file.read(1):
                raise self._not_as_long()


@contextlib.contextmanager
def _archive(path: Place) -> Iterator[zipfile.ZipFile]:
    """Opens an archive. Raises ValueError that names a damaged one, also while it is read."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            yield archive
    except ZIP_ERRORS as error:
        if isinstance(error, zipfile.BadZipFile):
            check_whole_zip(path, "NumPy")
        raise ValueError(f"{path}: is damaged or not an archive of NumPy ({error})") from error


def _recognises(path: Place, head: bytes) -> bool:
    if path.suffix.lower() == ".npz":
        return True
    if not first_zip_name(head).endswith(_SUFFIX):
        return False
    # None of an archive that was cut off.
    return all(name.endswith(_SUFFIX) for name in zip_names(path))


def _open(path: Place, options: ReadOptions) -> list[Source]:
    return [_NpzSource(path, options)]


FORMAT = Format("npz", _open, _recognises, has_header=True)
