"""Fills those tables of a page that are medians over several runs of cpu.py.

    python benchmarks/medians.py docs/performance.md [--check]

A table is between two comments. The first names the kind of workloads and the folders of the runs: <!-- medians of
loss: benchmarks/results/RUN-1 benchmarks/results/RUN-2 -->, the second is <!-- end of medians -->.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import harness
import regimes
from cpu import side_by_side

MARKED = re.compile(r"(<!-- medians of (\w+): (.+?) -->\n)(.*?)(<!-- end of medians -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with its tables from the results. Raises OSError if there are no results."""

    def table(match: re.Match[str]) -> str:
        folders = [harness.ROOT / name for name in match[3].split()]
        runs = {
            regime: [harness.read_rows(folder / regime / "benchmark.json") for folder in folders]
            for regime in regimes.NAMES
        }
        _, heading, _, *lines = side_by_side(runs, [match[2]])
        return f"{match[1]}\n{heading}\n\n" + "\n".join(lines) + f"\n\n{match[5]}"

    return MARKED.sub(table, page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    options = parser.parse_args()
    before = options.page.read_text(encoding="utf-8")
    after = filled(before)
    if options.check:
        if after != before:
            print(
                f"{options.page}: its tables are not those of the results: python benchmarks/medians.py {options.page}"
            )
        return int(after != before)
    harness.write_whole(options.page, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
