"""The standard streams, which may be closed or full, or may not support every character."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from pdl_ext._printable import printable

__all__ = ["flush_output", "prepare", "report", "tell", "write"]


def prepare() -> None:
    """Replaces closed streams: standard error is then discarded, and printing to standard output stays an error."""
    # Opened here: otherwise the next file that is opened would get their numbers.
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Unsupported characters, as in names of files, are printed as escapes, as on standard error.
        sys.stdout.reconfigure(errors="backslashreplace")


def write(*lines: str) -> None:
    """Prints lines at once, each as one. Raises OSError that names the stream if they cannot be written."""
    with _named_and_dropped(), _without_bars():
        print(*map(printable, lines), sep="\n", flush=True)


def flush_output() -> None:
    """Raises OSError that names the stream if what was printed cannot be written."""
    with _named_and_dropped():
        sys.stdout.flush()


@contextlib.contextmanager
def _named_and_dropped() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Otherwise the interpreter would try again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "standard output") from error


def _without_bars() -> contextlib.AbstractContextManager[None]:
    """Takes the bars off the terminal that a line is printed to, and draws them again below it."""
    # Imported by whoever has drawn one.
    tqdm: Any = sys.modules.get("tqdm")
    return contextlib.nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(sys.stderr)


def report(*lines: str) -> None:
    """Prints the result of a sub-command after its work is done; a failure to print does not undo the work."""
    try:
        write(*lines)
    except OSError as error:
        tell(f"pdl-ext: warning: the file is written, but standard output is not ({error.strerror})")


def tell(line: str) -> None:
    """Prints a line on standard error, if that can be written."""
    with contextlib.suppress(OSError), _without_bars():
        print(printable(line), file=sys.stderr, flush=True)
