"""Finds the sources that the user names: files, folders, patterns and lists, and the format of each."""

from __future__ import annotations

import glob
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pdl_ext._checks import check_choice
from pdl_ext._printable import warn
from pdl_ext.corpus.formats import (
    arrow,
    datatrove,
    huggingface,
    jsonl,
    litdata,
    llmc,
    mds,
    megatron,
    npy,
    npz,
    parquet,
    raw,
    safetensors_file,
    text,
    torch_file,
)
from pdl_ext.corpus.reading.access import read_head
from pdl_ext.corpus.reading.at_once import in_order
from pdl_ext.corpus.reading.compression import compression_of
from pdl_ext.corpus.reading.foreign import HEAD_BYTES, kind_of, kind_of_content
from pdl_ext.corpus.reading.huggingface_cache import cached_datasets, is_about_data
from pdl_ext.corpus.reading.index_maps import is_index_map
from pdl_ext.corpus.reading.lines import has_suffix
from pdl_ext.corpus.source import Format, ReadOptions, Source, Stamp, token_dtype
from pdl_ext.storage.place import (
    Place,
    RemotePath,
    absolute_name,
    beside,
    check_path,
    is_file,
    is_there,
    place,
    real_name,
)
from pdl_ext.storage.store import Store, redacted
from pdl_ext.storage.tensor_file import format_of

__all__ = ["FORMATS", "open_sources"]

# In the order of the checks: formats with a signature in the first bytes before those known by name.
FORMATS = {
    module.FORMAT.name: module.FORMAT
    for module in (
        *(npy, npz, torch_file, safetensors_file, megatron, llmc, parquet, arrow),
        *(huggingface, mds, litdata, datatrove, jsonl, text, raw),
    )
}
_LIST_SUFFIX = ".list"
_COUNTS, _CHECKPOINT = "pdl_ext.TokenFrequency", "pdl_ext.corpus.State"
_INDEX_MAP = "a trainer's own (an index map, its description, or a dictionary), and holds no tokens"
# Files that a user may miss if a folder is read as one dataset.
_DATA_SUFFIXES = (".bin", ".npy", ".ds", ".arrow", ".parquet", ".mds", ".jsonl", ".ndjson", ".txt", ".text")


def open_sources(
    data: Iterable[str | os.PathLike[str]],
    format_name: str | None,
    options: ReadOptions,
    output: str | os.PathLike[str] | None = None,
) -> list[Source]:
    """The sources of everything named, in order, each file once.

    data: files, folders (searched recursively), glob patterns (`**` too), files that end in .list with one of these a
    line. Each is a path or a URL.

    output: a file that is left out if it is empty.
    Raises TypeError for an argument that is not a path. Raises ValueError that names a file which is missing, empty,
    unreadable or of no known format.
    """
    try:
        names = [] if isinstance(data, (str, bytes, os.PathLike)) else list(data)
    except TypeError as error:
        raise TypeError(f"data: got {redacted(repr(data))}, expected a list of files, folders or patterns") from error
    if not names:
        raise ValueError(f"data: got {redacted(repr(data))}, expected a list of files, folders or patterns")
    for name in names:
        check_path("data", name)
    if format_name is not None:
        check_choice("format", format_name, FORMATS)
    sources: list[Source] = []
    seen: dict[str, Source] = {}
    folders: list[Place] = []
    left_out: list[Place] = []
    stores: dict[Any, Store] = {}
    # An output file with data in it is not left out silently.
    own = None if output is None else _empty_file(place("output", output))
    written = [os.fspath(name) for name in names]
    try:
        paths = [(name, path) for name in written for path in _expand(name, format_name, left_out, stores)]
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be read ({error.strerror})") from error
    of_name: dict[str, list[Source]] = {}

    def opened_at(path: Place) -> list[Source]:
        return _opened(path, format_name, options, own)

    at_once = bool(stores)
    of_path = in_order(opened_at, [path for _, path in paths], at_once=at_once)
    for (name, path), opened in zip(paths, of_path, strict=True):
        if path.is_dir():
            folders.append(path)
        for source in opened:
            # If a file and its companion are both named, the second is the same source as the first. A link to the file
            # is a copy like any other.
            first = seen.setdefault(absolute_name(source.path), source)
            if first is source:
                sources.append(source)
                of_name.setdefault(name, []).append(source)
            elif any(first is other for other in opened):
                raise ValueError(f"{path}: lists {source.path} twice, expected each file once")
            elif first.format != source.format:
                raise ValueError(
                    f"{source.path}: got it as {first.format} and as {source.format}, expected one: name the folder or "
                    "the file, not both"
                )
    known = {real_name(file) for source in sources for file in source.stamps}
    for folder in folders:
        _warn_of_others(folder, known)
    _warn_of_left_out(left_out)
    if not sources:
        raise ValueError(f"data: got nothing to count in {redacted(', '.join(map(str, names)))}")
    for name, some in of_name.items():
        _warn_of_formats(redacted(name), some)
    _check_texts(sources, options)
    _warn_of_narrow(sources, options.vocab_size)
    _report_doubts(sources, format_name, options.strict, at_once)
    return sources


def _empty_file(path: Place) -> str | None:
    """The real name of an empty file; None for anything else."""
    return real_name(path) if is_file(path) and Stamp.of(path, fresh=True).size == 0 else None


def _opened(path: Place, format_name: str | None, options: ReadOptions, own: str | None) -> list[Source]:
    """The sources of a file or folder. own: the real name of a file that is not part of the data."""
    if not path.is_dir() and (real_name(path) == own or (format_of(path) or "").startswith((_COUNTS, _CHECKPOINT))):
        # Counts and checkpoints, which may have been written to a place that patterns match.
        return []
    try:
        return _format_of(path, format_name, options).open(path, options)
    except ValueError:
        # A checkpoint of another count in this folder disappears when that count ends. Any other file was meant to be
        # counted.
        if ".checkpoint-" not in path.name or is_there(path):
            raise
        return []


def _expand(
    name: str,
    format_name: str | None,
    left_out: list[Place],
    stores: dict[Any, Store],
    lists: tuple[str, ...] = (),
) -> Iterator[Place]:
    """The files and folders of a name.

    left_out: collects the index maps among them; these are read only if named themselves together with a format.

    stores: the stores of URLs. lists: the .list files that contain the name.
    """
    path = place("data", name, stores)
    if isinstance(path, RemotePath) and "*" in name:
        # No server is asked whether a pattern is a file.
        yield from _matches(name, path.matches(), left_out)
    elif path.suffix == _LIST_SUFFIX and path.is_file():
        yield from _listed(path, format_name, left_out, stores, lists)
    elif path.is_dir():
        yield from _walk(path, left_out)
    elif path.exists():
        # Checkpoints are no error: if a shell expands a pattern, the same command resumes them.
        if (format_of(path) or "").startswith(_COUNTS):
            raise ValueError(f"data: got {path}, which holds counts, expected a corpus: `pdl-ext merge` adds counts up")
        if format_name is None and is_index_map(path):
            raise ValueError(
                f"data: got {path}, expected tokens: by its name it is {_INDEX_MAP}; if it does hold tokens, give its "
                "format"
            )
        yield path
    elif isinstance(path, RemotePath):
        yield from _matches(name, path.matches(), left_out)
    else:
        yield from _matches(name, [Path(match) for match in sorted(glob.glob(name, recursive=True))], left_out)


def _matches(name: str, matches: Sequence[Place], left_out: list[Place]) -> Iterator[Place]:
    """The files and folders among the matches of a pattern."""
    if not matches:
        raise ValueError(f"data: got {redacted(name)}, expected a file, a folder or a pattern that some file matches")
    names = set(map(str, matches))
    for match in matches:
        if match.is_dir():
            yield from _walk(match, left_out)
        else:
            yield from _if_data(match, names, left_out)


def _listed(
    path: Place, format_name: str | None, left_out: list[Place], stores: dict[Any, Store], lists: tuple[str, ...]
) -> Iterator[Place]:
    real = real_name(path)
    if real in lists:
        raise ValueError(f"{path}: lists itself, expected other files")
    try:
        # Ended by nothing else, since names may have whatever else ends a line elsewhere.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a list of files ({error})") from error
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#"):
            try:
                # As in a shell script's folder: names in a list are relative to the list.
                yield from _expand(beside(path, line), format_name, left_out, stores, (*lists, real))
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: {str(error).removeprefix('data: ')}") from error


def _walk(folder: Place, left_out: list[Place], parents: tuple[str, ...] = ()) -> Iterator[Place]:
    """The contents of a folder: the folder itself if it is of a format, otherwise everything in it that is not hidden.

    Links to `parents` are left out.
    """
    real = real_name(folder)
    if real in parents:
        return
    if _recognised_format(folder):
        yield folder
        return
    try:
        cached = cached_datasets(folder)
        entries: list[Place] = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror})") from error
    if cached is not None:
        for dataset in cached:
            yield from _walk(dataset, left_out, (*parents, real))
        return
    names = set(map(str, entries))
    for path in entries:
        if path.name.startswith((".", "_")):
            continue
        if path.is_dir():
            yield from _walk(path, left_out, (*parents, real))
        else:
            yield from _if_data(path, names, left_out)


def _if_data(path: Place, among: Container[str], left_out: list[Place]) -> Iterator[Place]:
    """A file that was not named itself, unless it is known to hold no tokens of its own.

    among: the files found with it.
    """
    if is_index_map(path):
        left_out.append(path)
    elif not _is_companion(path, among) and not _is_lock(path) and not is_about_data(path):
        yield path


def _is_lock(path: Place) -> bool:
    """Whether a file is a lock between two processes, as in Hugging Face's cache."""
    return path.suffix == ".lock" and path.is_file() and not Stamp.of(path).size


def _warn_of_left_out(paths: Sequence[Place]) -> None:
    """Warns of index maps that were found and not counted."""
    # One file may be found by several names.
    different = set(map(absolute_name, paths))
    if different:
        others = f", and {len(different) - 1} other files like it" if len(different) > 1 else ""
        warn(f"{paths[0]}: is {_INDEX_MAP}: it was left out{others}")


def _warn_of_formats(name: str, sources: Sequence[Source]) -> None:
    """Warns if the files of one name have several formats, of which some may not be data."""
    paths: dict[str, list[Place]] = {}
    for source in sources:
        # Files with and without a mask count as one format.
        paths.setdefault(source.format.partition(" ")[0], []).append(source.path)
    if len(paths) > 1:
        listed = ", ".join(f"{format} ({len(some)}, as {some[0]})" for format, some in sorted(paths.items()))
        warn(
            f"{name}: got files of {len(paths)} formats, expected one: {listed}; all are counted: if some are not "
            "data, name the others by a pattern"
        )


def _report_doubts(sources: Sequence[Source], format_name: str | None, strict: bool, at_once: bool) -> None:
    """Warns, once, of files whose content suggests another kind. Raises ValueError instead if `strict`."""

    def doubt_of(source: Source) -> str | None:
        found = None
        if format_name == raw.FORMAT.name:
            found = _recognised_format(source.path, read_head(source.path, HEAD_BYTES))
        if found is not None and found.has_header:
            return f"{source.path}: is of format {found.name}, and all of it is counted as ids of {source.dtype}"
        return source.doubt()

    doubts = list(filter(None, in_order(doubt_of, sources, at_once=at_once)))
    if doubts:
        others = f"; {len(doubts) - 1} other files are in doubt, too" if len(doubts) > 1 else ""
        if strict:
            raise ValueError(doubts[0] + others)
        warn(doubts[0] + others)


def _warn_of_others(folder: Place, known: Container[str]) -> None:
    """Warns of files that look like data in the folder of a dataset, but are not among the files `known`."""
    below: list[Any] = sorted(folder.rglob("*"), key=str)
    others = [
        path
        for path in below
        if has_suffix(path, *_DATA_SUFFIXES)
        # Names that _walk leaves out, and those of transforms in a cache.
        and not any(part.startswith((".", "_", "cache-")) for part in path.relative_to(folder).parts)
        and path.is_file()
        and real_name(path) not in known
        # MosaicML keeps a compressed shard beside the decompressed one.
        and (compression_of(path) is None or real_name(path.with_suffix("")) not in known)
    ]
    if others:
        warn(
            f"{folder}: is one dataset, which does not list {others[0]}"
            f"{f' and {len(others) - 1} other files in it' if len(others) > 1 else ''}: not counted"
        )


def _check_texts(sources: Sequence[Source], options: ReadOptions) -> None:
    """Raises ValueError that names a file of token ids, if the policy selects targets by the content of text."""
    ids = next((source for source in sources if source.dtype != "text"), None)
    if options.policy.learn is not None and ids is not None:
        raise ValueError(
            f"{ids.path}: holds token ids, and got learn {options.policy.learn} (--learn), expected rows of text. For "
            "ids use a column of labels (--skip-prompt) or a mask (--mask) instead"
        )


def _warn_of_narrow(sources: Sequence[Source], vocab_size: int) -> None:
    """Warns, once for each dtype, of tokens whose dtype is too small for the vocabulary."""
    paths: dict[str, list[Place]] = {}
    for source in sources:
        paths.setdefault(source.dtype, []).append(source.path)
    paths.pop("text", None)
    for dtype, (first, *others) in paths.items():
        largest = np.iinfo(token_dtype(dtype)).max
        if vocab_size > largest + 1:
            warn(
                f"{first}: its tokens are {dtype}, and cannot hold ids above {largest} of a vocabulary of "
                f"{vocab_size}: larger ones would have wrapped when it was written"
                f"{f'; the same goes for {len(others)} other files' if others else ''}"
            )


def _is_companion(path: Place, among: Container[str]) -> bool:
    """Whether a path is the companion of another file that exists."""
    name = str(path)
    return any(
        name.endswith(suffix) and name.removesuffix(suffix) + owner in among
        for format in FORMATS.values()
        for suffix, owner in format.companions.items()
    )


def _recognised_format(path: Place, head: bytes = b"") -> Format | None:
    """The format of a folder, or of a file that begins with `head`, if it can be detected."""
    # A folder with the parts of a file may have the name of that file.
    is_folder = path.is_dir()
    asked = (format for format in FORMATS.values() if format.has_folders or not is_folder)
    return next((format for format in asked if format.recognises(path, head)), None)


def _format_of(path: Place, name: str | None, options: ReadOptions) -> Format:
    is_folder = path.is_dir()
    if not is_folder:
        # Checked before it is opened: opening a pipe without a writer would block.
        Stamp.of(path)
    if name is not None:
        return FORMATS[name]
    head = b"" if is_folder else read_head(path, HEAD_BYTES)
    if (format := _recognised_format(path, head)) is not None:
        return format
    # Not for every file with a given dtype: a folder may hold scripts beside the ids, whose bytes would also pass for
    # ids.
    if path.suffix in (".bin", ".npy"):
        if (kind := kind_of_content(head)) is not None:
            raise ValueError(
                f"{path}: begins like {kind.name}, expected ids: {kind.remedy} (format raw counts all of it as ids)"
            )
        return raw.FORMAT
    if head and (kind := kind_of(path, head)) is not None:
        raise ValueError(f"{path}: is {kind.name}, which is not read: {kind.remedy}, or leave it out by a pattern")
    # For example a file that a writer of columns has not finished.
    reason = "" if head else "is empty, so that "
    raise ValueError(
        f"{path}: {reason}its format is unknown; give format, one of {', '.join(sorted(FORMATS))} (raw with a "
        "dtype), or leave the file out by a pattern"
    )
