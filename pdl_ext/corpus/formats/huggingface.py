"""Folders of Hugging Face datasets, as save_to_disk writes them or load_dataset leaves them in its cache.

state.json lists the files of rows, which are Arrow streams, and files of indices. With indices a dataset is the rows
that they select from all files in order; a row may occur several times or never. Old versions of the library wrote
indices; newer ones write the rows themselves.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdl_ext._optional import require
from pdl_ext.corpus.reading.arrow_stream import StreamSource, read_stream
from pdl_ext.corpus.reading.columns import Rows
from pdl_ext.corpus.reading.listing import listed_file, read_json
from pdl_ext.corpus.source import Format, ReadOptions, Source
from pdl_ext.storage.place import Place, is_folder

__all__ = ["FORMAT"]

_SPLITS = "dataset_dict.json"
_STATE = "state.json"
_INFO = "dataset_info.json"
_INDICES = "indices"
# How many rows have their number of occurrences in memory at once, 4 bytes each. For each such window the indices are
# read again.
_WINDOW = 2**22


def _recognises(path: Place, head: bytes) -> bool:
    if not path.is_dir():
        return False
    saved = (path / _SPLITS).is_file() or (path / _STATE).is_file()
    return saved or ((path / _INFO).is_file() and any(path.glob("*.arrow")))


def _open(path: Place, options: ReadOptions) -> list[Source]:
    if (path / _SPLITS).is_file():
        path = _only_split(path)
    if (path / _STATE).is_file():
        return _saved(path / _STATE, options)
    if (path / _INFO).is_file():
        return [_source(file, options, path / _INFO) for file in _cached(path)]
    raise ValueError(f"{path}: has neither {_STATE} nor {_INFO}, expected a dataset's folder")


def _only_split(folder: Place) -> Place:
    splits = read_json(folder / _SPLITS).get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
        raise ValueError(f"{folder / _SPLITS}: got splits {splits!r}, expected a list of names")
    if len(splits) > 1:
        raise ValueError(
            f"{folder}: holds the splits {', '.join(splits)}, expected one: name the folder of the one that is trained "
            f"on, as {folder / splits[0]}"
        )
    if not is_folder(folder / splits[0]):
        raise ValueError(f"{folder / splits[0]}: is not a folder, although {_SPLITS} lists it")
    return folder / splits[0]


def _saved(state_file: Place, options: ReadOptions) -> list[Source]:
    state = read_json(state_file)
    files = _files(state_file, state, "_data_files")
    # Only some versions write this key.
    indices_files = _files(state_file, state, "_indices_data_files") if state.get("_indices_data_files") else []
    if not indices_files:
        return [_source(file, options, state_file) for file in files]
    indices = _Indices(indices_files, files)
    return [
        StreamSource(
            "huggingface",
            file,
            options,
            companions=(state_file, *indices_files, *files[:number]),
            choose=functools.partial(indices.choose, number),
        )
        for number, file in enumerate(files)
    ]


def _source(file: Place, options: ReadOptions, listing: Place) -> Source:
    return StreamSource("huggingface", file, options, companions=(listing,))


def _files(state_file: Place, state: dict[str, Any], key: str) -> list[Place]:
    entries = state.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{state_file}: got {key} {entries!r}, expected a list of files")
    return [listed_file(state_file, entry.get("filename")) for entry in entries]


def _cached(folder: Place) -> list[Place]:
    """The files of the only split in a folder of the cache, without those of its transforms."""
    names: dict[str, list[Place]] = {}
    found: list[Any] = sorted(folder.glob("*.arrow"), key=str)
    for file in found:
        name = re.sub(r"-\d{5}-of-\d{5}$", "", file.stem)
        if not name.startswith(("cache-", "tmp")):
            names.setdefault(name, []).append(file)
    if len(names) != 1:
        raise ValueError(
            f"{folder}: holds the splits {', '.join(names) or '(none)'}, expected one: name the files of the one "
            f"that is trained on, as {folder}/*-train*.arrow"
        )
    (files,) = names.values()
    shards = re.search(r"-of-(\d{5})$", files[0].stem)
    if shards is not None and int(shards[1]) != len(files):
        raise ValueError(f"{folder}: got {len(files)} files, expected {int(shards[1])}, as {files[0].name} says")
    return files


class _Indices:
    """The rows of a dataset among those of all its files, and how often each occurs.

    Raises ValueError that names a file of indices which is damaged, or has an index past the last row.
    """

    def __init__(self, files: list[Place], data_files: list[Place]) -> None:
        self._files = files
        self._data_files = data_files

    def choose(self, number: int, all_rows: Iterator[Rows]) -> Iterator[Rows]:
        """The dataset's rows in one data file, given by its number, each as often as it occurs."""
        pa = require("pyarrow", "corpus")
        start = end = self._first_rows[number]
        window_start, window = start, np.zeros(0, np.uint32)
        for rows in all_rows:
            start, end = end, end + rows.batch.num_rows
            if end > window_start + window.size:
                window_start, window = start, self._times(start, max(end - start, _WINDOW))
            times = window[start - window_start : end - window_start].copy()
            # Each pass yields every remaining row once, so that no more rows than the batch's are held.
            while times.any():
                chosen = np.flatnonzero(times)
                batch = rows.batch if chosen.size == times.size else rows.batch.take(pa.array(chosen))
                yield Rows(batch, np.asarray(rows.numbers)[chosen], rows.place, rows.end)
                times[chosen] -= 1
        if number == len(self._data_files) - 1 and self._largest >= end:
            raise ValueError(
                f"{self._files[0]}: got index {self._largest}, expected less than {end}, the number of rows"
            )

    @functools.cached_property
    def _first_rows(self) -> list[int]:
        """The number of rows before each data file."""
        first = [0]
        for file in self._data_files[:-1]:
            first.append(first[-1] + sum(rows.batch.num_rows for rows in read_stream(file)))
        return first

    @functools.cached_property
    def _largest(self) -> int:
        return max((int(indices.max()) for indices in self._read() if indices.size), default=-1)

    def _times(self, start: int, size: int) -> NDArray[np.uint32]:
        """How often each of the rows from start to before start + size occurs in the dataset."""
        times = np.zeros(size, np.uint32)
        for indices in self._read():
            # Indices before the start wrap, and are then beyond the end.
            indices = indices - np.uint64(start)
            np.add.at(times, indices[indices < size].astype(np.int64), np.uint32(1))
        return times

    def _read(self) -> Iterator[NDArray[np.uint64]]:
        for file in self._files:
            for rows in read_stream(file):
                batch = rows.batch
                if batch.schema.names != [_INDICES] or str(batch.schema.types[0]) not in ("uint64", "int64"):
                    raise ValueError(f"{file}: got the columns {batch.schema}, expected {_INDICES} of uint64")
                batch.validate(full=True)
                if batch.column(0).null_count:
                    raise ValueError(f"{file}: got a null in {_INDICES}, expected none")
                # A negative index becomes larger than any number of rows.
                yield batch.column(0).to_numpy().view(np.uint64)


FORMAT = Format("huggingface", _open, _recognises, has_folders=True)
