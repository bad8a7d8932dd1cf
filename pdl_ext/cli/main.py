"""Parses the command line of `pdl-ext` and runs a sub-command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pdl_ext.cli import demo, info

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one sub-command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="pdl-ext", description="Power-Law Decay Loss for PyTorch")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    info.add_parser(subparsers)
    demo.add_parser(subparsers)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)
