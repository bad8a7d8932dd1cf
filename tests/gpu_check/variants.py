"""Builds for a card on another machine, and the kernels' variants, between which that card has to choose.

    python -m gpu_check.variants DIR [--architecture 9.0]

compiles ahead, on a machine with a PyTorch with CUDA, and says which kernels spill registers. On the card's machine

    python -m gpu_check.variants DIR --link NAME

makes DIR/NAME/pdl_ext.

Only library.cpp needs Python. So objects made here can be linked there, whatever Python that machine has. A variant
differs from the release by one source or two, compiled with other macros. With --architecture none it compiles the CPU
kernels alone, for a dry run.
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

from cuda_compile import demangle, parse
from included import with_headers

from gpu_check import ROOT

RELEASE = "release"
# For objects without CUDA.
NO_ARCHITECTURE = "none"
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
    "messages_last_block": Variant((ONE_CALL, TWO_CALLS), ("PDL_EXCHANGE=messages", "PDL_REDUCED_BY=last_block")),
    # A thread loads its next batch of ids before it counts the one before.
    "batches_2": Variant((HISTOGRAM,), ("PDL_HISTOGRAM_BATCHES=2",)),
}
NAMES = (RELEASE, *VARIANTS)


def flags_of(name: str) -> str:
    """What a compiler is told to make the variant."""
    return "" if name == RELEASE else " ".join(f"-D{macro}" for macro in VARIANTS[name].macros)


def sources(with_cuda: bool = True) -> list[str]:
    """Those that are compiled ahead."""
    patterns = ["csrc/*.cpp", "csrc/cpu/*.cpp", *(["csrc/cuda/*.cu"] if with_cuda else [])]
    paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
    return sorted(name for path in paths if (name := path.relative_to(ROOT).as_posix()) != LIBRARY)


def fingerprint() -> str:
    """Of all that the objects are made of."""
    import torch

    # Another PyTorch has other headers.
    key = hashlib.sha256(repr((torch.__version__, VARIANTS)).encode() + (ROOT / "build_flags.json").read_bytes())
    for name in sources():
        key.update(with_headers(ROOT / name, ROOT / "csrc"))
    return key.hexdigest()


def environment_of(architecture: str) -> dict[str, str]:
    """How setup.py is told what to build for."""
    if architecture == NO_ARCHITECTURE:
        return {"PDL_EXT_CUDA": "0"}
    return {"PDL_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}


def compile_ahead(folder: Path, architecture: str) -> dict[str, list[str]]:
    """Makes the objects of the release and, of each variant, those that differ. Returns the kernels that spill."""
    work = folder / "work"
    environment = {**os.environ, **environment_of(architecture)}
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(work), "--build-lib", str(work / "lib")]
    there = sources(architecture != NO_ARCHITECTURE)
    spills: dict[str, list[str]] = {}

    def build(name: str) -> None:
        flags = f"{flags_of(name)} -Xptxas -v".strip()
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**environment, "NVCC_APPEND_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            sys.exit(f"{name} does not compile:\n{done.stdout}")
        spills[name] = spilling(done.stdout)

    def object_of(source: str) -> Path:
        (made,) = work.rglob(str(Path(source).with_suffix(".o")))
        return made

    def keep(source: str, name: str) -> None:
        # Two folders have a loss.o.
        target = folder / "objects" / name / Path(source).with_suffix(".o").as_posix().replace("/", "-")
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["strip", "--strip-debug", "-o", target, object_of(source)], check=True)

    build(RELEASE)
    for source in there:
        keep(source, RELEASE)
    for name, variant in VARIANTS.items():
        differing = [source for source in variant.sources if source in there]
        # What is there would be taken for the variant's.
        for source in differing:
            object_of(source).unlink()
        if differing:
            build(name)
        for source in differing:
            keep(source, name)
    shutil.rmtree(work)
    about = {"fingerprint": fingerprint(), "architecture": architecture, "spills": spills}
    (folder / "objects.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return spills


def spilling(output: str) -> list[str]:
    """The kernels that spill registers, in what nvcc printed with -Xptxas -v, with the bytes stored and loaded."""
    kernels = [kernel for kernel in parse(output, "")[0] if kernel.spills]
    names = demangle([kernel.name for kernel in kernels])
    return [
        f"{name}: {kernel.spill_stores}+{kernel.spill_loads} bytes" for name, kernel in zip(names, kernels, strict=True)
    ]


def spills_of(folder: Path, name: str) -> list[str]:
    """Those of a variant, among the sources in which it differs from the release."""
    return json.loads((folder / "objects.json").read_text(encoding="utf-8"))["spills"].get(name, [])


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
    if (folder / "objects" / name).is_dir():
        others |= {path.name: path for path in (folder / "objects" / name).iterdir()}
    return [others[each] for each in sorted(others)]


def link(folder: Path, name: str) -> None:
    """The package with the variant's module, in a folder of its own."""
    sys.path.insert(0, str(ROOT))
    import setuptools

    import setup as script

    os.environ.update(environment_of(json.loads((folder / "objects.json").read_text())["architecture"]))
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
    parser.add_argument("--architecture", default="9.0", help="default: %(default)s; none for a dry run")
    parser.add_argument("--link", choices=NAMES, metavar="NAME", help=f"one of {', '.join(NAMES)}")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.link is None:
        for name, kernels in compile_ahead(folder, options.architecture).items():
            for kernel in kernels:
                print(f"{name} spills: {kernel}")
        print(f"{folder}: {len(NAMES)} variants for {options.architecture}")
        return 0
    if why := refusal(folder):
        print(why, file=sys.stderr)
        return 1
    link(folder, options.link)
    return 0


if __name__ == "__main__":
    sys.exit(main())
