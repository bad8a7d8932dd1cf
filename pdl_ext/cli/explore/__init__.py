"""`pdl-ext explore`: a page with sliders for a weighting's options, and their effect on the counts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pdl_ext.cli.streams import report
from pdl_ext.cli.token_text import literals_of_tokens

if TYPE_CHECKING:
    from pdl_ext.storage.place import Place

__all__ = ["add_parser"]

_SUFFIX = ".html"


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the sub-command `explore`."""
    parser = subparsers.add_parser(
        "explore",
        help="make a page on which to choose a weighting",
        description="Writes one file for a browser, which needs no network: sliders for a weighting's options, and "
        "their effect on the counts.",
    )
    parser.add_argument("counts", metavar="COUNTS", help="a file that `pdl-ext count` wrote")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help=f"a {_SUFFIX} file, or its URL")
    parser.add_argument("--tokenizer", metavar="PATH", help="the counts' tokenizer, to show tokens as text")
    parser.set_defaults(run=_run, shows_time=True)


def _run(arguments: argparse.Namespace) -> int:
    from pdl_ext.storage.place import place

    output = place("output", arguments.output)
    if output.suffix.lower() != _SUFFIX:
        raise ValueError(f"output: got {output}, expected a name that ends in {_SUFFIX}")
    from pdl_ext.cli.counts_file import load_counts
    from pdl_ext.cli.explore.page import page_of
    from pdl_ext.storage.whole_file import write_whole

    _check_output(output)
    counts = place("counts", arguments.counts)
    frequency = load_counts(counts)
    if frequency.total == 0:
        raise ValueError(f"counts: got {counts}, in which nothing was counted, expected some tokens")
    literal = literals_of_tokens(arguments.tokenizer, frequency.provenance)
    write_whole(output, page_of(frequency, counts, literal))
    report(str(output))
    return 0


def _check_output(path: Place) -> None:
    """Raises ValueError unless a page may be written there: no file, an empty one, or another page."""
    from pdl_ext.cli.counts_file import check_output_folder
    from pdl_ext.cli.explore.page import BEGINNING
    from pdl_ext.corpus.reading.access import read_head

    check_output_folder(path)
    if path.is_dir():
        raise ValueError(f"output: got {path}, a folder, expected a file")
    if path.is_file() and read_head(path, len(BEGINNING)) not in (b"", BEGINNING):
        raise ValueError(
            f"output: got {path}, a file that `pdl-ext explore` did not write, expected a new one, or such a page to "
            "replace"
        )
