"""Parses the command line of `pdl-ext` and runs a sub-command."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from pdl_ext.cli import count, demo, info, merge, plot, show

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one sub-command; returns its exit code. What the user can mend is one line on standard error, and code 1."""
    parser = argparse.ArgumentParser(prog="pdl-ext", description="Power-Law Decay Loss for PyTorch")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for command in (count, merge, show, plot, info, demo):
        command.add_parser(subparsers)
    parsed = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            # Without the place in the library that warns.
            warnings.showwarning = _show_warning
            return parsed.run(parsed)
    except BrokenPipeError:
        # Whoever reads has seen enough; what is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except (ValueError, OSError, ImportError) as error:
        print(f"pdl-ext: {error}", file=sys.stderr)
        return 1


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"pdl-ext: warning: {message}", file=sys.stderr)
