"""Builds csrc/cuda for the CPU, and registers its kernels as the ops torch.ops.pdl_ext_emulated.*; see README.md."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import json
import mmap
import os
import shlex
import subprocess
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from included import with_headers
from torch import Tensor

from pdl_ext.engine import ops

__all__ = ["build", "guarded", "launch", "library", "load", "request"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
INCLUDE = HERE / "include"
KERNELS = HERE / "kernels"
NAMES = (
    "loss_forward",
    "loss_and_gradient",
    "loss_and_gradient_",
    "correct_gradient_",
    "scale_",
    "loss_backward",
    "loss_backward_",
    "complete_rows_",
    "reduce_rows",
    "token_weights",
    "count_tokens_",
)
# Of a grid, a block or a cluster.
Shape = int | tuple[int, int, int]
LIBC = ctypes.CDLL(None, use_errno=True)
# An op dies with the library that defined it.
LIBRARIES: list[torch.library.Library] = []
TORCH = Path(torch.__file__).resolve().parent

BUILD_FLAGS = json.loads((ROOT / "build_flags.json").read_text())
FLAGS = [*BUILD_FLAGS["common"], *BUILD_FLAGS["cxx"], *BUILD_FLAGS["with_cuda"]]
FLAGS += ["-O1", "-g1", "-fPIC", "-fno-gnu-unique", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
FLAGS += ["-fsanitize=alignment,null,bounds,signed-integer-overflow,integer-divide-by-zero,shift"]
FLAGS += ["-fno-sanitize-recover=all"]
FLAGS += [f"-I{INCLUDE}", "-include", "ex2_approx.h", "-isystem", str(TORCH / "include")]


def build() -> Path:
    """The shared library, compiled unless one from the same sources exists.

    Reads the compiler from CXX, more flags from PDL_EXT_EMULATOR_FLAGS (`--coverage -O0`), and the sources from the
    folder PDL_EXT_EMULATOR_SOURCES instead of csrc.
    """
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    more = shlex.split(os.environ.get("PDL_EXT_EMULATOR_FLAGS", ""))
    csrc = Path(os.environ.get("PDL_EXT_EMULATOR_SOURCES", ROOT / "csrc"))
    folder = ROOT / "build" / "cuda_emulator"
    folder.mkdir(parents=True, exist_ok=True)

    # cuda/ptx has no suffix.
    headers = sorted({*HERE.rglob("*.h"), *filter(Path.is_file, INCLUDE.rglob("*"))})
    common = repr((compiler, FLAGS, torch.__version__)).encode() + b"".join(path.read_bytes() for path in headers)
    sources = [*sorted((csrc / "cuda").glob("*.cu")), *sorted(HERE.glob("*.cpp")), *sorted(KERNELS.glob("*.cu"))]
    flags = {source: known_flags(more, with_headers(source, csrc)) for source in sources}
    names = []
    for source in sources:
        key = hashlib.sha256(common + repr(flags[source]).encode() + with_headers(source, csrc))
        names.append(f"{source.stem}-{key.hexdigest()[:16]}")
    objects = [folder / f"{name}.o" for name in names]
    library = folder / f"pdl_ext_emulated-{hashlib.sha256(repr(names).encode()).hexdigest()[:16]}.so"

    def compile_source(source: Path, target: Path) -> None:
        if not target.exists():
            run([*compiler, *FLAGS, *flags[source], f"-I{csrc}", "-x", "c++", "-c", str(source)], target)

    # Processes of one test run wait for the first of them.
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_source, sources, objects))
            link = ["-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", *map(str, objects)]
            run([*compiler, *more, *link, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"], library)
    return library


def known_flags(flags: list[str], text: bytes) -> list[str]:
    """The flags that affect a source: of macros, those that it names."""
    return [flag for flag in flags if not flag.startswith("-D") or flag[2:].partition("=")[0].encode() in text]


def run(command: list[str], target: Path) -> None:
    """Runs a compiler; `target` appears only when it is complete, since another process may be waiting for it."""
    unfinished = target.with_name(f"{os.getpid()}-{target.name}")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
    unfinished.replace(target)


@functools.cache
def load() -> types.SimpleNamespace:
    """The emulated kernels in the form of pdl_ext.engine.ops.compiled, with the schemas of torch.ops.pdl_ext."""
    library = torch.library.Library("pdl_ext_emulated", "DEF")
    for name in NAMES:
        schema = str(getattr(ops.compiled, name).default._schema)
        library.define(schema.removeprefix("pdl_ext::"))
    torch.ops.load_library(build())
    LIBRARIES.append(library)
    kernels = types.SimpleNamespace(**{name: getattr(torch.ops.pdl_ext_emulated, name) for name in NAMES})
    kernels.count_tokens_ = count_without_refusing
    return kernels


def count_without_refusing(*arguments) -> None:
    """count_tokens_ for callers that see CPU tensors, and so leave it to the kernel to be strict: CUDA's never is."""
    torch.ops.pdl_ext_emulated.count_tokens_(*arguments[:6], False)


def guarded(tensor: Tensor, at_end: bool = True) -> Tensor:
    """A copy that ends (or starts) at unmapped memory: a kernel that reads or writes past it is detected."""
    size, page = max(tensor.nbytes, tensor.element_size()), mmap.PAGESIZE
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for address in (start, start + page + room):
        if LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect failed")
    offset = page + (room - size if at_end else 0)
    count = max(tensor.numel(), 1)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=offset)[: tensor.numel()]
    return copy.view(tensor.shape).copy_(tensor)


class Request(ctypes.Structure):
    """The twin of kernels/launch.cu's."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint * 3),
        ("dynamic_shared", ctypes.c_uint),
        ("max_dynamic_shared", ctypes.c_int),
        ("any_cluster_size", ctypes.c_int),
    )


def request(
    grid: Shape,
    block: Shape,
    cluster: Shape = (0, 0, 0),
    dynamic_shared: int = 0,
    max_dynamic_shared: int = -1,
    any_cluster_size: int = -1,
) -> Request:
    """A launch; without an attribute for clusters where there are none, and no attributes of the kernel below 0."""

    def dimensions(shape: Shape) -> tuple[int, ...]:
        return (shape, 1, 1) if isinstance(shape, int) else shape

    shapes = [(ctypes.c_uint * 3)(*dimensions(shape)) for shape in (grid, block, cluster)]
    return Request(*shapes, dynamic_shared, max_dynamic_shared, any_cluster_size)


@functools.cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build()))


def launch(kernel: str, output: Tensor, input: Tensor | None = None, n: int = 0, **shape) -> str:
    """Runs a kernel of kernels/. Returns "", or the message of its fault, or the number of the launch's error."""
    message = ctypes.create_string_buffer(4000)
    error = library().cuda_emulator_launch(
        kernel.encode(),
        ctypes.byref(request(**shape)),
        ctypes.c_void_p(output.data_ptr()),
        ctypes.c_void_p(0 if input is None else input.data_ptr()),
        n,
        message,
        ctypes.c_size_t(len(message)),
    )
    return f"error {error}" if error else message.value.decode()
