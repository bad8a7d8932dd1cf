"""`pdl-ext merge`: one counts file from several."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdl_ext.cli.streams import report

if TYPE_CHECKING:
    from pdl_ext.storage.place import Place

__all__ = ["add_parser"]


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the sub-command `merge`."""
    parser = subparsers.add_parser(
        "merge",
        help="add up counts files",
        description="Adds up counts of the same vocabulary, tokenizer and policy, of shards that are all different.",
    )
    parser.add_argument("counts", nargs="+", metavar="COUNTS", help="files that `pdl-ext count` wrote")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="where the sum is written")
    parser.add_argument("--allow-overlap", action="store_true", help="count a shard again that was counted before")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from pdl_ext.cli.counts_file import check_counts_output, load_counts
    from pdl_ext.cli.progress import steps
    from pdl_ext.storage.place import place

    output = place("output", arguments.output)
    check_counts_output(output)
    first, *others = (place("counts", name) for name in arguments.counts)
    frequency = load_counts(first)
    seen = {_identity(first)}
    for path in steps(others, "merge", "file"):
        other = load_counts(path)
        # Counts from memory have no shards by which to detect it.
        if not arguments.allow_overlap and _identity(path) in seen:
            raise ValueError(f"{path}: got the same file twice, expected each once (--allow-overlap counts it again)")
        try:
            frequency.merge(other, allow_overlap=arguments.allow_overlap)
        except ValueError as error:
            before = first if len(seen) == 1 else f"{first} and those after it"
            raise ValueError(f"{path}: does not go with {before}: {str(error).removeprefix('other: ')}") from error
        seen.add(_identity(path))
    frequency.save(arguments.output)
    report(f"{output}: {frequency.total:,} tokens of {len(arguments.counts)} files")
    return 0


def _identity(path: Place) -> object:
    if not isinstance(path, Path):
        return path
    status = path.stat()
    return status.st_dev, status.st_ino
