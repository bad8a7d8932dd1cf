"""The counts files that sub-commands read and write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdl_ext import TokenFrequency
    from pdl_ext.storage.place import Place

__all__ = ["check_counts_output", "check_output_folder", "load_counts"]


def load_counts(path: Place) -> TokenFrequency:
    """The counts in a file. Raises ValueError that names the argument, for a file that cannot be read as counts."""
    from pdl_ext import TokenFrequency
    from pdl_ext.storage.place import address

    try:
        return TokenFrequency.load(address(path))
    except FileNotFoundError as error:
        raise ValueError(f"counts: no file at {path}, expected one that `pdl-ext count` wrote") from error
    except ValueError as error:
        raise ValueError(f"counts: {str(error).removeprefix('path: ')}") from error


def check_output_folder(path: Place) -> None:
    """Raises ValueError unless the folder of an output file exists."""
    from pdl_ext.storage.place import RemotePath

    # A link's target is written. A store has only folders with something in them.
    if not isinstance(path, RemotePath) and not Path(os.path.realpath(path)).parent.is_dir():
        raise ValueError(f"output: got {path}, expected a file in a folder that exists")


def check_counts_output(path: Place) -> None:
    """Raises ValueError unless a counts file may be written there: no file, an empty one, or other counts."""
    from pdl_ext.corpus.reading.access import read_head
    from pdl_ext.storage.tensor_file import format_of

    check_output_folder(path)
    if path.is_dir():
        raise ValueError(f"output: got {path}, a folder, expected a file")
    is_empty = path.is_file() and not read_head(path, 1)
    if path.exists() and not is_empty and not (format_of(path) or "").startswith("pdl_ext.TokenFrequency"):
        raise ValueError(f"output: got {path}, a file that holds no counts, expected a new one, or counts to replace")
