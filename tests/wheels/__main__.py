"""Builds wheels from the sdist, gives them the platform tag that their symbols allow, and checks them.

python tests/wheels cpu --torch REQUIREMENT [--python PROGRAM ...] [--pytest=OPTIONS]
python tests/wheels cuda --torch REQUIREMENT
python tests/wheels aarch64 --torch REQUIREMENT

The kind cpu makes a wheel for each Python from 3.10 to 3.14 that is at hand, and tests it in a new environment. The
kind cuda makes one with the CUDA kernels for the Python that runs this, and imports it. The kind aarch64 cross-compiles
one for that Python, and does not test it. The exit status is 0 if all wheels were made, and 1 if not.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

# Of a folder that is run, Python has only the folder itself on its path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wheels import build


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="wheels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("cpu", "cuda", "aarch64"))
    parser.add_argument("--torch", required=True, metavar="REQUIREMENT", help="the PyTorch to build against")
    parser.add_argument(
        "--python", nargs="+", default=[], metavar="PROGRAM", help="default: those of PATH and of pyenv"
    )
    parser.add_argument("--pytest", type=shlex.split, default=[], metavar="OPTIONS", help="which tests, and how")
    options = parser.parse_args(arguments)
    if options.kind != "cpu" and (options.python or options.pytest):
        parser.error(f"--python and --pytest: got one with {options.kind}, expected cpu")
    made, failed = [], False
    try:
        sdist = build.make_sdist(build.ROOT / "dist")
        for make in _makers(options, sdist):
            try:
                made.append(make())
            except build.Failure as error:
                failed = True
                print(error, file=sys.stderr)
    except build.Failure as error:
        failed = True
        print(error, file=sys.stderr)
    print(*_table(made), sep="\n")
    return 1 if failed else 0


def _makers(options: argparse.Namespace, sdist: Path) -> list[Callable[[], build.Made]]:
    """What makes each of the wheels that are asked for."""
    if options.kind == "cuda":
        return [partial(build.build_cuda, Path(sys.executable), options.torch, sdist)]
    if options.kind == "aarch64":
        return [partial(build.build_aarch64, options.torch, sdist)]
    if options.python:
        pythons = [Path(build.program(name, "--python takes names on PATH and paths")) for name in options.python]
    else:
        found = build.interpreters()
        for version in build.PYTHONS:
            print(f"Python {version}: {found.get(version, 'not at hand, no wheel')}")
        pythons = found.values()
    return [partial(build.build_cpu, python, options.torch, sdist, options.pytest) for python in pythons]


def _table(made: Iterable[build.Made]) -> Iterable[str]:
    """A line for each wheel, in Markdown."""
    yield "| wheel | bytes | module, bytes | architectures | tests |"
    yield "|---|---|---|---|---|"
    for each in made:
        architectures = " ".join(each.architectures) or "none"
        size = each.wheel.stat().st_size
        yield f"| `{each.wheel.name}` | {size:,} | {each.module_bytes:,} | {architectures} | {each.tested} |"


if __name__ == "__main__":
    sys.exit(main())
