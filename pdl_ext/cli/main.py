"""Parses the command line of `pdl-ext` and runs a sub-command."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

from pdl_ext.cli import count, demo, doctor, explore, first_steps, info, merge, plot, show, streams
from pdl_ext.cli.memory import is_out_of_memory

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one sub-command; returns its exit code.

    Errors that the user can correct are one line on standard error, and code 1.
    """
    streams.prepare()
    parser = _Parser(prog="pdl-ext", description="Power-Law Decay Loss for PyTorch")
    parser.set_defaults(run=first_steps.run, shows_time=False)
    parser.add_argument(
        "--version", action="store_const", const=info.print_version, dest="run", help="print the version"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for command in (count, merge, show, plot, explore, info, doctor, demo):
        command.add_parser(subparsers)
    try:
        parsed = parser.parse_args(arguments)
        with warnings.catch_warnings():
            # Without the line of the library that warns.
            warnings.showwarning = _show_warning
            with _clock(parsed):
                code = parsed.run(parsed)
            streams.flush_output()
            return code
    except BrokenPipeError:
        # The reader has closed the pipe.
        code = 128 + 13
    # Python raises warnings as errors on request.
    except (ValueError, OSError, ImportError, Warning) as error:
        # Those that Python raises have a name; those of pdl_ext say themselves what to run.
        is_bare = isinstance(error, ImportError) and error.name is not None
        streams.tell(f"pdl-ext: {error}{': run `pdl-ext doctor`' if is_bare else ''}")
        code = 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        streams.tell(f"pdl-ext: memory is not enough ({(str(error).splitlines() or ['MemoryError'])[0]})")
        code = 1
    with contextlib.suppress(OSError):
        streams.flush_output()
    return code


def _clock(parsed: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """A clock for a sub-command that has no bar of its own."""
    if not parsed.shows_time:
        return contextlib.nullcontext()
    from pdl_ext.cli.progress import waiting

    return waiting(f"pdl-ext {parsed.command}")


class _Parser(argparse.ArgumentParser):
    def print_help(self, file: Any = None) -> None:
        # argparse drops the error where help cannot be written.
        streams.write(*self.format_help().rstrip("\n").split("\n"))


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    streams.tell(f"pdl-ext: warning: {message}")
