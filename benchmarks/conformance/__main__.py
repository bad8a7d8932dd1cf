"""Which implementations of a weighted cross-entropy pass which cases: `make conformance`.

Prints a table of each case of cases.py and each way of ways.py, and a list of the errors. With --output it is written
into a page of the documentation, between the page's two marks.
"""

from __future__ import annotations

import argparse
import collections
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from cases import CASES
from verdicts import ABSENT, RIGHT, verdicts
from ways import ways

BEGIN, END = "<!-- conformance: begin -->", "<!-- conformance: end -->"


def table(found: dict[str, dict[str, str]]) -> list[str]:
    """Markdown: a mark for each case and way, the sums, and a list of the errors."""
    names = list(found)
    marks = {RIGHT: "yes", ABSENT: ""}
    lines = [f"| case | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    wrong = []
    for case in CASES:
        cells = []
        for name in names:
            said = found[name][case.name]
            if said not in marks:
                wrong.append(f"| {name} | {case.name} | {said.replace('|', '/')} |")
            cells.append(marks.get(said, "**no**"))
        lines.append(f"| {case.name} | {' | '.join(cells)} |")
    sums = [collections.Counter(found[name].values()) for name in names]
    of = [f"{counted[RIGHT]} of {counted.total() - counted[ABSENT]}" for counted in sums]
    lines.append(f"| right | {' | '.join(of)} |")
    return [*lines, "", "| implementation | case | result |", "|---|---|---|", *wrong]


def versions() -> str:
    said = []
    peers = ("liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn", "transformer-engine")
    for name in ("torch", "trl", *peers):
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
    found = {}
    for way in ways(device):
        if args.only is not None and args.only not in way.name:
            continue
        print(f"{way.name} ...", file=sys.stderr, flush=True)
        found[way.name] = verdicts(way, device)
    lines = [f"On {device.type}, with {versions()}.", "", *table(found)]
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
