"""Compiles every CUDA source for several architectures, without a GPU, and refuses kernels that spill registers.

python tests/cuda_compile.py [--arch 80,90a,100a] [FILE.cu ...]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
# The twins of setup.py's macros and nvcc flags: change both.
FLAGS = ["-std=c++20", "-O3", "--extended-lambda", "--expt-relaxed-constexpr"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA", "-DPDL_EXT_WITH_CUDA"]


@dataclass
class Kernel:
    """What ptxas says of one function; one that is called, not launched, has no registers of its own."""

    name: str
    architecture: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    @property
    def spills(self) -> bool:
        return self.spill_stores > 0 or self.spill_loads > 0


def parse(output: str, architecture: str) -> tuple[list[Kernel], str]:
    """The kernels in what `nvcc -Xptxas -v` printed, and every line that is no part of that report."""
    kernels: dict[str, Kernel] = {}
    entry = function = None
    rest = []
    for line in output.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            entry = kernels.setdefault(match[1], Kernel(match[1], architecture))
        elif match := re.search(r"Function properties for (\w+)", line):
            function = kernels.setdefault(match[1], Kernel(match[1], architecture))
        elif function and (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", line)):
            function.stack, function.spill_stores, function.spill_loads = map(int, match.groups())
        elif entry and (match := re.search(r"Used (\d+) registers", line)):
            entry.registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            entry.shared = int(shared[1]) if shared else 0
        elif line.strip() and not line.startswith("ptxas info"):
            rest.append(line)
    return list(kernels.values()), "\n".join(rest)


def short_name(demangled: str) -> str:
    """The kernel's name and template arguments, without its result, namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|\b(pdl|cuda|cpu)::", "", demangled)
    name = name.removeprefix("void ")
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name


def demangle(kernels: list[Kernel], tools: Path) -> None:
    filter_names = shutil.which("cu++filt", path=tools) or shutil.which("c++filt")
    if filter_names is None or not kernels:
        return
    names = "\n".join(kernel.name for kernel in kernels)
    lines = subprocess.run([filter_names], input=names, capture_output=True, text=True, check=True).stdout.splitlines()
    for kernel, line in zip(kernels, lines, strict=True):
        kernel.name = short_name(line)


def table(kernels: list[Kernel]) -> str:
    headings = ("kernel", "sm", "registers", "shared", "stack", "spill stores", "spill loads")
    rows = [tuple(str(value) for value in vars(kernel).values()) for kernel in sorted(kernels, key=lambda k: k.name)]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = []
    for name, *numbers in (headings, *rows):
        right = "  ".join(f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True))
        lines.append(f"{name:<{widths[0]}}  {right}")
    return "\n".join(lines)


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home) / "bin" / "nvcc" if home else None, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((Path(path) for path in candidates if path and Path(path).is_file()), None)


def torch_flags() -> list[str]:
    """What torch.utils.cpp_extension adds to every nvcc call of a CUDAExtension."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

    # -isystem: nvcc's warnings about PyTorch's own headers are not ours to mend.
    return [*COMMON_NVCC_FLAGS, *(part for folder in include_paths() for part in ("-isystem", folder))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="80,90a,100a", help="compute capabilities, separated by commas")
    parser.add_argument("sources", nargs="*", type=Path, metavar="FILE.cu", help="default: all of csrc/cuda")
    options = parser.parse_args()
    architectures = options.arch.split(",")
    sources = options.sources or sorted((CSRC / "cuda").glob("*.cu"))
    if not sources:
        parser.error(f"there is no .cu file in {CSRC / 'cuda'}")
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc was not found: set CUDA_HOME, or put the CUDA toolkit's bin folder on PATH", file=sys.stderr)
        return 2
    flags = FLAGS + torch_flags()

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=2) as pool:

        def compile_one(job: tuple[Path, str]) -> subprocess.CompletedProcess[str]:
            source, architecture = job
            target = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
            output = ["-Xptxas", "-v", "-c", "-o", f"{folder}/{source.stem}_{architecture}.o", str(source)]
            command = [str(nvcc), *flags, *target, *output]
            return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        kernels: list[Kernel] = []
        failures = 0
        jobs = list(product(sources, architectures))
        for (source, architecture), result in zip(jobs, pool.map(compile_one, jobs), strict=True):
            found, rest = parse(result.stdout, architecture)
            kernels += found
            failures += result.returncode != 0
            if rest or result.returncode != 0:
                print(f"{source.name} for sm_{architecture}:\n{rest}", file=sys.stderr)

    demangle(kernels, nvcc.parent)
    if kernels:
        print(table(kernels))
    spilling = sum(kernel.spills for kernel in kernels)
    print(f"{len(jobs)} compilations, {failures} failed; {len(kernels)} kernels, {spilling} with spills")
    return 1 if failures or spilling else 0


if __name__ == "__main__":
    sys.exit(main())
