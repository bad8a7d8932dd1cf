"""Files of JSON that list the other files of a folder."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

from pdl_ext.corpus.source import Stamp
from pdl_ext.storage.place import Place, is_file

__all__ = ["listed_file", "read_json"]

# As Python objects it takes ten times as much memory.
_LARGEST = 2**26


def read_json(path: Place) -> dict[str, Any]:
    """The object in a file. Raises ValueError that names a file that is damaged, has no object or is above 64 MiB."""
    if Stamp.of(path).size > _LARGEST:
        raise ValueError(f"{path}: got {Stamp.of(path).size} bytes, expected {_LARGEST} at most")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, expected an object")
    return content


def listed_file(listing: Place, name: Any) -> Place:
    """The path of a file by its name in a listing. Raises ValueError if it is missing or outside of the folder."""
    if not isinstance(name, str) or not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{listing}: got {name!r}, expected the name of a file in its folder")
    path = listing.parent / name
    # This also covers names that no file can have.
    if not is_file(path):
        raise ValueError(f"{path}: is missing, which {listing.name} lists")
    return path
