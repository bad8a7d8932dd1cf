"""Builds for a card on another machine, and the kernels' variants, between which that card has to choose.

    python -m gpu_check.variants DIR [--architecture 9.0]

compiles ahead, on a machine with a PyTorch with CUDA. On the card's machine

    python -m gpu_check.variants DIR --link NAME

makes DIR/NAME/pdl_ext.

Only library.cpp needs Python. So objects made here can be linked there, whatever Python that machine has. A variant
differs from the release by one source or two, compiled with other macros.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from included import with_headers

from gpu_check import ROOT

RELEASE = "release"
# The one source that needs Python's headers.
LIBRARY = "csrc/library.cpp"
ONE_CALL, TWO_CALLS, HISTOGRAM = "csrc/cuda/loss_and_gradient.cu", "csrc/cuda/loss.cu", "csrc/cuda/histogram.cu"


@dataclass(frozen=True)
class Variant:
    """The sources that differ from the release's, and the macros that they are compiled with."""

    sources: tuple[str, ...]
    macros: tuple[str, ...]


VARIANTS = {
    # Blocks of a cluster tell each other their statistics by st.async, without a cluster's barrier.
    "messages": Variant((ONE_CALL,), ("PDL_EXCHANGE=messages",)),
    # A row over eight blocks where four would hold it, three of them on a multiprocessor as before, or five.
    "cluster_8": Variant((ONE_CALL,), ("PDL_LEAST_CLUSTER=8",)),
    "cluster_8_resident_5": Variant(
        (ONE_CALL,), ("PDL_LEAST_CLUSTER=8", "PDL_PACKS=2", "PDL_ROWS_OF_MULTIPROCESSOR=5")
    ),
    # The block that finishes last sums the rows' losses, without a kernel behind theirs.
    "last_block": Variant((ONE_CALL, TWO_CALLS), ("PDL_REDUCED_BY=last_block",)),
    # A thread loads its next batch of ids before it counts the one before.
    "batches_2": Variant((HISTOGRAM,), ("PDL_HISTOGRAM_BATCHES=2",)),
}
NAMES = (RELEASE, *VARIANTS)


def flags_of(name: str) -> str:
    """What a compiler is told to make the variant."""
    return "" if name == RELEASE else " ".join(f"-D{macro}" for macro in VARIANTS[name].macros)


def sources() -> list[str]:
    """Those that are compiled ahead."""
    paths = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")]
    return sorted(name for path in paths if (name := path.relative_to(ROOT).as_posix()) != LIBRARY)


def fingerprint() -> str:
    """Of all that the objects are made of."""
    import torch

    # Another PyTorch has other headers.
    key = hashlib.sha256(repr((torch.__version__, VARIANTS)).encode() + (ROOT / "build_flags.json").read_bytes())
    for name in sources():
        key.update(with_headers(ROOT / name, ROOT / "csrc"))
    return key.hexdigest()


def compile_ahead(folder: Path, architecture: str) -> None:
    """The objects of the release and, of each variant, those that differ."""
    work = folder / "work"
    environment = {**os.environ, "PDL_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(work), "--build-lib", str(work / "lib")]

    def build(flags: str = "") -> None:
        subprocess.run(command, cwd=ROOT, check=True, env={**environment, "NVCC_APPEND_FLAGS": flags})

    def object_of(source: str) -> Path:
        (made,) = work.rglob(str(Path(source).with_suffix(".o")))
        return made

    def keep(source: str, name: str) -> None:
        # Two folders have a loss.o.
        target = folder / "objects" / name / Path(source).with_suffix(".o").as_posix().replace("/", "-")
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["strip", "--strip-debug", "-o", target, object_of(source)], check=True)

    build()
    for source in sources():
        keep(source, RELEASE)
    for name, variant in VARIANTS.items():
        # What is there would be taken for the variant's.
        for source in variant.sources:
            object_of(source).unlink()
        build(flags_of(name))
        for source in variant.sources:
            keep(source, name)
    shutil.rmtree(work)
    about = {"fingerprint": fingerprint(), "architecture": architecture}
    (folder / "objects.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def refusal(folder: Path) -> str:
    """Why the objects are not those of these sources and of this PyTorch; empty if they are."""
    try:
        found = json.loads((folder / "objects.json").read_text(encoding="utf-8"))
    except OSError as error:
        return f"{error.filename}: {error.strerror}, expected what `make gpu-variants` leaves"
    if found["fingerprint"] != fingerprint():
        return f"{folder}: made of other sources or for another PyTorch; run `make gpu-variants` again"
    return ""


def objects(folder: Path, name: str) -> list[Path]:
    """What links to a variant, besides the library's own."""
    others = {path.name: path for path in (folder / "objects" / RELEASE).iterdir()}
    if name != RELEASE:
        others |= {path.name: path for path in (folder / "objects" / name).iterdir()}
    return [others[each] for each in sorted(others)]


def link(folder: Path, name: str) -> None:
    """The package with the variant's module, in a folder of its own."""
    sys.path.insert(0, str(ROOT))
    import setuptools

    import setup as script

    os.environ["PDL_EXT_CUDA"] = "1"
    os.environ["TORCH_CUDA_ARCH_LIST"] = json.loads((folder / "objects.json").read_text())["architecture"]
    made = folder / name
    shutil.rmtree(made, ignore_errors=True)
    package = made / "pdl_ext"
    package.mkdir(parents=True)
    for path in (ROOT / "pdl_ext").iterdir():
        if not path.name.startswith("_C.") or path.suffix == ".pyi":
            (package / path.name).symlink_to(path)
    os.chdir(ROOT)
    arguments: dict[str, Any] = script.extension_arguments()
    (extension,) = arguments["ext_modules"]
    extension.sources = [LIBRARY]
    extension.extra_objects = [str(path.resolve()) for path in objects(folder, name)]
    # The library's own object is one for all variants, each of which is linked by itself.
    build = ["build_ext", "--build-temp", str(folder / "library"), "--build-lib", str(made)]
    setuptools.setup(name="pdl_ext", script_args=build, **arguments)
    if not any((package / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        sys.exit(f"{package}: no module was built")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--architecture", default="9.0", help="default: %(default)s")
    parser.add_argument("--link", choices=NAMES, metavar="NAME", help=f"one of {', '.join(NAMES)}")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.link is None:
        compile_ahead(folder, options.architecture)
        print(f"{folder}: {len(NAMES)} variants for {options.architecture}")
        return 0
    if why := refusal(folder):
        print(why, file=sys.stderr)
        return 1
    link(folder, options.link)
    return 0


if __name__ == "__main__":
    sys.exit(main())
