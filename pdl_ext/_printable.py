"""Names of files and what errors say as text that a terminal shows in one line, and takes for no command."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

__all__ = ["errors_in_one_line", "printable", "warn"]


def printable(text: str) -> str:
    """The text with an escape, as in Python, for each character that is not printed: a line feed, a surrogate."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Makes the message of a TypeError or a ValueError printable. Those of other classes have messages of their own."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if type(error) in (TypeError, ValueError):
            error.args = (printable(str(error)),)
        raise


def warn(message: str) -> None:
    """Warns, at the line that called the caller, by a message that is made printable."""
    warnings.warn(printable(message), stacklevel=3)
