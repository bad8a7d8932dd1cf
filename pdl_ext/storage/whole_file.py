"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from pdl_ext.storage.place import Place, RemotePath

__all__ = ["partial_files", "whole_file", "write_whole"]


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives the path of a file to write, which at the end takes the place of `path`.

    A crash at any moment leaves what was there. Raises OSError that names `path`, with what was there untouched.
    """
    # What a link names is replaced, not the link.
    real = Path(os.path.realpath(path))
    # Not by the process' number: threads share one, and so may machines that share the folder.
    partial = real.with_name(f".{real.name}.{secrets.token_hex(4)}.partial")
    try:
        if real.exists() and not real.is_file():
            # Which would be replaced: a device, for every program on the machine.
            raise FileExistsError(errno.EEXIST, "There is something that is no regular file")
        yield partial
        os.replace(partial, real)
        # Or a power cut may bring back what was there, after checkpoints that it was written from are deleted.
        _sync_folder(real.parent)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; not written: {path}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_whole(path: Place, content: bytes) -> None:
    """Replaces a file or an object, or makes it. Raises OSError that names it, with what was there untouched."""
    if isinstance(path, RemotePath):
        path.write_bytes(content)
        return
    with whole_file(path) as partial:
        partial.write_bytes(content)


def _sync_folder(folder: Path) -> None:
    # Windows opens no folder, some file systems sync none, and one may write into a folder that one may not list.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def partial_files(path: Place) -> list[Path]:
    """What killed processes left of `path` and of the checkpoints that are named after it."""
    found: list[Path] = []
    if isinstance(path, RemotePath):
        # A store takes objects whole.
        return found
    # Checkpoints lie beside a link, and what it names may lie elsewhere.
    for of in {path, Path(os.path.realpath(path))}:
        name = re.compile(rf"\.{re.escape(of.name)}(\.checkpoint-\d+)?\.[0-9a-f]+\.partial")
        # One may write into a folder that one may not list.
        with contextlib.suppress(OSError):
            found += (file for file in of.parent.iterdir() if name.fullmatch(file.name))
    return found
