"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["partial_files", "whole_file"]


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives the path of a file to write, which at the end takes the place of `path`.

    A crash at any moment leaves what was there. Raises OSError that names `path`, with what was there untouched.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; not written: {path}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def partial_files(path: Path) -> list[Path]:
    """What killed processes left of `path`, or of files beside it whose names begin with its name and a dot."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.partial"))
