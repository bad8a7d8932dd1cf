"""Which implementations of a weighted cross-entropy pass which cases: `make conformance`.

Prints a table of each case of cases.py and each way of ways.py, and a list of the errors. With --output it is written
into a page of the documentation, between the page's two marks.
"""

from __future__ import annotations

import argparse
import collections
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from cases import CASES
from verdicts import ABSENT, RIGHT, verdicts
from ways import ways

BEGIN, END = "<!-- conformance: begin -->", "<!-- conformance: end -->"


Found = dict[str, dict[str, str]]


def table(found: Found) -> list[str]:
    """Markdown: a mark for each case that one of the ways offers, and the sums."""
    marks = {RIGHT: "yes", ABSENT: ""}
    lines = [f"| case | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    for case in CASES:
        cells = [marks.get(said[case.name], "**no**") for said in found.values()]
        if any(cells):
            lines.append(f"| {case.name} | {' | '.join(cells)} |")
    sums = [collections.Counter(said.values()) for said in found.values()]
    of = [f"{counted[RIGHT]} of {counted.total() - counted[ABSENT]}" for counted in sums]
    return [*lines, f"| right | {' | '.join(of)} |"]


def errors(found: Found) -> list[str]:
    """Markdown: each error of a way, with the first case that has it."""
    lines = ["| implementation | case | result |", "|---|---|---|"]
    for name, said in found.items():
        cases = collections.defaultdict(list)
        for case in CASES:
            if said[case.name] not in (RIGHT, ABSENT):
                # The number of classes is no part of the error.
                cases[re.sub(r" with size \d+$", "", said[case.name]).replace("|", "/")].append(case.name)
        for result, (first, *others) in cases.items():
            more = f", and {len(others)} more" if others else ""
            lines.append(f"| {name} | {first}{more} | {result} |")
    return lines


def versions() -> str:
    said = []
    peers = ("liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn", "transformer-engine")
    for name in ("torch", "trl", "megatron-core", *peers):
        try:
            said.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"{', '.join(said)}; Python {platform.python_version()}, {platform.machine()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if pdl_ext is right everywhere, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="the ways whose names hold this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a page with both marks")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    found: Found = {}
    of_ranks: Found = {}
    for way in ways(device):
        if args.only is not None and args.only not in way.name:
            continue
        print(f"{way.name} ...", file=sys.stderr, flush=True)
        (found if way.ranks == 1 else of_ranks)[way.name] = verdicts(way, device)
    lines = [f"On {device.type}, with {versions()}."]
    for each in filter(None, (found, of_ranks)):
        lines += ["", *table(each)]
    found |= of_ranks
    lines += ["", *errors(found)]
    print("\n".join(lines))
    if args.output is not None:
        text = args.output.read_text(encoding="utf-8")
        head, rest = text.split(BEGIN)
        tail = rest.split(END)[1]
        args.output.write_text("\n".join([f"{head}{BEGIN}", "", *lines, "", f"{END}{tail}"]), encoding="utf-8")
    ours = [said for name, cases in found.items() if name.startswith("pdl_ext") for said in cases.values()]
    return int(any(said not in (RIGHT, ABSENT) for said in ours))


if __name__ == "__main__":
    sys.exit(main())
