"""Compiles every CUDA source for every architecture, without a GPU, and refuses kernels that spill registers.

    python tests/cuda_compile.py [--arch 80,90,100] [FILE.cu ...]

In Hopper's machine code the instructions of a thread are counted (machine_code.py). Kernels are refused if issuing
them would take more than a share of memory's time. That needs nvdisasm, from the CUDA toolkit or the package triton.

Results are kept in ~/.cache/pdl_ext/cuda_compile, for all clones, until a source, a flag, PyTorch or the compiler
changes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path

import machine_code
import machine_paths
from included import with_headers

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
BUILD_FLAGS = json.loads((ROOT / "build_flags.json").read_text())
# Turing, A100, consumer Ampere, Ada, Hopper, and Blackwell in servers and in consumer cards.
ARCHITECTURES = tuple(capability.replace(".", "") for capability in BUILD_FLAGS["architectures"])
WITH_HOST_CODE = "80"
COUNTED = "90"
FLAGS = [*BUILD_FLAGS["common"], *BUILD_FLAGS["nvcc"], *BUILD_FLAGS["with_cuda"]]


@dataclass
class Kernel:
    """ptxas' report of one function; a function that is called, not launched, has no registers of its own."""

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
    """The kernels in the output of `nvcc -Xptxas -v`, and every line that is not part of that report."""
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


def demangle(names: list[str], tools: Path | None = None) -> list[str]:
    program = shutil.which("cu++filt", path=tools) or shutil.which("c++filt")
    if program is None or not names:
        return names
    lines = subprocess.run([program], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [short_name(line) for line in lines.splitlines()]


def table(kernels: list[Kernel]) -> str:
    """A line a kernel, a column an architecture."""
    architectures = list(dict.fromkeys(kernel.architecture for kernel in kernels))
    cells: dict[str, dict[str, str]] = {}
    for kernel in kernels:
        if kernel.registers == 0 and not kernel.spills:
            continue
        cell = f"{kernel.registers}/{kernel.shared}"
        cell += f" stack {kernel.stack}" if kernel.stack else ""
        cell += f" SPILLS {kernel.spill_stores}+{kernel.spill_loads}" if kernel.spills else ""
        cells.setdefault(kernel.name, {})[kernel.architecture] = cell
    headings = ["registers/shared bytes", *(f"sm_{architecture}" for architecture in architectures)]
    rows = [[name, *(cells[name].get(architecture, "") for architecture in architectures)] for name in sorted(cells)]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = []
    for name, *values in (headings, *rows):
        right = "  ".join(f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True))
        lines.append(f"{name:<{widths[0]}}  {right}")
    return "\n".join(lines)


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc" if home else None, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((Path(path) for path in candidates if path and Path(path).is_file()), None)


def torch_flags() -> tuple[list[str], list[str]]:
    """The flags and include folders that torch.utils.cpp_extension adds to every nvcc call of a CUDAExtension."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

    # -isystem: we cannot fix nvcc's warnings about PyTorch's own headers. CSRC: for the emulator's kernels.
    return COMMON_NVCC_FLAGS, [f"-I{CSRC}", *(part for folder in include_paths() for part in ("-isystem", folder))]


def cache() -> Path:
    """The folder of results, outside of the clone, so that a new clone compiles only what has changed."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdl_ext" / "cuda_compile"


@functools.cache
def compilers(nvcc: Path) -> tuple[str, ...]:
    """The versions of nvcc and of the host's compiler, and the flags that the environment adds to each call."""
    versions = []
    for program in (str(nvcc), "c++"):
        try:
            versions.append(subprocess.run([program, "--version"], capture_output=True, text=True).stdout)
        except OSError:
            versions.append("")
    return (*versions, *(os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")))


def record_of(nvcc: Path, flags: list[str], source: Path, architecture: str) -> Path:
    """The file of the result: its name depends on everything that the result depends on."""
    # PyTorch's version instead of its folder, which differs between clones.
    key = hashlib.sha256(repr((compilers(nvcc), flags, version("torch"))).encode())
    for path in (__file__, machine_code.__file__, machine_paths.__file__):
        key.update(Path(path).read_bytes())
    key.update(with_headers(source, CSRC))
    return cache() / f"{source.stem}-{architecture}-{key.hexdigest()[:16]}.json"


def keep(record: Path, result: Compilation) -> None:
    unfinished = record.with_suffix(f".{os.getpid()}")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(dataclasses.asdict(result)))
        unfinished.replace(record)
    except OSError as error:
        say_once(f"results are not kept: {error.strerror}: {record.parent}")


@functools.cache
def say_once(text: str) -> None:
    print(text, file=sys.stderr)


@dataclass
class Compilation:
    source: str
    architecture: str
    ok: bool
    output: str  # what nvcc printed besides ptxas' figures
    kernels: list[Kernel]
    counted: list[machine_code.Count] | None = None


def compile_source(nvcc: Path, flags: list[str], includes: list[str], source: Path, architecture: str) -> Compilation:
    """Compiles, or returns the kept result."""
    flags = [*flags, "-gencode", f"arch=compute_{architecture},code=sm_{architecture}", "-Xptxas", "-v"]
    # The host's code is the same for all of them, and takes two fifths of the time.
    flags.append("-c" if architecture == WITH_HOST_CODE else "-cubin")
    record = record_of(nvcc, flags, source, architecture)
    disassembler = machine_code.find_disassembler() if architecture == COUNTED else None
    if record.exists():
        values = json.loads(record.read_text())
        if values["counted"] is not None or disassembler is None:
            return Compilation(
                **{
                    **values,
                    "kernels": [Kernel(**kernel) for kernel in values["kernels"]],
                    "counted": machine_code.from_json(values["counted"]),
                }
            )
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "binary"
        command = [str(nvcc), *flags, *includes, "-o", str(binary), str(source)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        kernels, output = parse(done.stdout, architecture)
        for kernel, name in zip(kernels, demangle([kernel.name for kernel in kernels], nvcc.parent), strict=True):
            kernel.name = name
        result = Compilation(source.name, architecture, done.returncode == 0, output, kernels)
        if result.ok and disassembler is not None:
            functions = machine_code.parse(machine_code.disassemble(disassembler, binary))
            names = demangle([function.name for function in functions], nvcc.parent)
            result.counted = machine_code.counts(dict(zip(names, functions, strict=True)))
    if result.ok:
        keep(record, result)
    return result


def compile_all(nvcc: Path, architectures: tuple[str, ...], sources: list[Path] | None = None) -> list[Compilation]:
    flags, includes = torch_flags()
    jobs = product(sources or sorted((CSRC / "cuda").glob("*.cu")), architectures)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: compile_source(nvcc, FLAGS + flags, includes, *job), jobs))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="compute capabilities (default: %(default)s)")
    parser.add_argument("sources", nargs="*", type=Path, metavar="FILE.cu", help="default: all of csrc/cuda")
    options = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc was not found: set CUDA_HOME, or put the CUDA toolkit's bin folder on PATH", file=sys.stderr)
        return 2
    compilations = compile_all(nvcc, tuple(options.arch.split(",")), options.sources)
    for compilation in compilations:
        if compilation.output or not compilation.ok:
            print(f"{compilation.source} for sm_{compilation.architecture}:\n{compilation.output}", file=sys.stderr)
    kernels = [kernel for compilation in compilations for kernel in compilation.kernels]
    if kernels:
        print(table(kernels))
    counted = [compilation.counted for compilation in compilations if compilation.architecture == COUNTED]
    wrong = 0
    if None in counted and all(compilation.ok for compilation in compilations):
        print(
            "nvdisasm was not found, so machine code is not counted: pip install triton, and put the folder of its "
            "nvdisasm on PATH",
            file=sys.stderr,
        )
        wrong = 1
    elif None not in counted and counted:
        lines = machine_code.table([count for counts in counted for count in counts or []])
        print("\n".join(lines))
        wrong = sum(not count.fits for counts in counted for count in counts or [])
        missing = machine_code.EXPECTED.keys() - {count.kernel for counts in counted for count in counts or []}
        if missing and not options.sources:
            print(f"not found in the machine code: {', '.join(sorted(missing))}")
            wrong += len(missing)
    failures = sum(not compilation.ok for compilation in compilations)
    spilling = sum(kernel.spills for kernel in kernels)
    print(f"{len(compilations)} compilations, {failures} failed; {len(kernels)} kernels, {spilling} with spills")
    return 1 if failures or spilling or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
