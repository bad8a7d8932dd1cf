"""Files that are written completely or not at all."""

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
    """Yields the path of a temporary file, which replaces `path` at the end of the block.

    After a crash at any moment the old file is intact. Raises OSError that names `path`, with the old file untouched.
    """
    # The target of a link is replaced, not the link.
    real = Path(os.path.realpath(path))
    # Not named by the process id: threads share one, and so may machines that share the folder.
    partial = real.with_name(f".{real.name}.{secrets.token_hex(4)}.partial")
    try:
        if real.exists() and not real.is_file():
            # It would be replaced: for a device that affects every program on the machine.
            raise FileExistsError(errno.EEXIST, "There is something that is not a regular file")
        yield partial
        os.replace(partial, real)
        # Without this a power cut might restore the old file after the checkpoints behind the new one were deleted.
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
    # Windows opens no folders, and some file systems do not sync them. Some folders may be written to but not listed.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def partial_files(path: Place) -> list[Path]:
    """The temporary files that killed processes left of `path` and of the checkpoints named after it."""
    found: list[Path] = []
    if isinstance(path, RemotePath):
        # A store writes objects in one piece.
        return found
    # Checkpoints are beside a link, whose target may be elsewhere.
    for of in {path, Path(os.path.realpath(path))}:
        name = re.compile(rf"\.{re.escape(of.name)}(\.checkpoint-\d+)?\.[0-9a-f]+\.partial")
        # A folder may be writable but not listable.
        with contextlib.suppress(OSError):
            found += (file for file in of.parent.iterdir() if name.fullmatch(file.name))
    return found
