"""Builds the extension against the installed PyTorch.

PDL_EXT_CUDA=1 requires the CUDA kernels, =0 leaves them out. By default they are built if that PyTorch has CUDA and
nvcc is found.
"""

import glob
import json
import os
import re
import shutil
import subprocess
import sys

from setuptools import setup

from build_backend import find_torch


def choose_cuda(torch_cuda, cuda_home) -> tuple[bool, str]:
    """Whether the CUDA kernels are built, and the reason."""
    wish = os.environ.get("PDL_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"PDL_EXT_CUDA is {wish!r}, expected 0 or 1")
    if wish == "0":
        return False, "not built: PDL_EXT_CUDA=0"
    nvcc = os.path.join(cuda_home, "bin", "nvcc") if cuda_home else None
    missing = None
    if torch_cuda is None:
        missing = "this PyTorch was built without CUDA"
    elif nvcc is None or not os.path.exists(nvcc):
        missing = "nvcc was not found (set CUDA_HOME)"
    if missing is None:
        return True, f"built: PyTorch has CUDA {torch_cuda} and nvcc is at {nvcc}"
    if wish == "1":
        sys.exit(f"PDL_EXT_CUDA=1 asks for the CUDA kernels, but {missing}")
    return False, f"not built: {missing}"


def find_toolkit() -> None:
    """Sets CUDA_HOME if nvcc on PATH is a link or a script: PyTorch searches the toolkit in the folder above it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys():
        return
    if not os.path.exists(os.path.join(os.path.dirname(nvcc), "..", "include", "cuda_runtime.h")):
        plan = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        if top := re.search(r"^#\$ TOP=(.+)$", plan, flags=re.MULTILINE):
            os.environ["CUDA_HOME"] = os.path.realpath(top[1])


def choose_architectures(cuda_home, known) -> None:
    """Sets the architectures of the kernels if no card is present; PyTorch uses those of the cards it finds."""
    import torch

    if os.environ.get("TORCH_CUDA_ARCH_LIST", "native") not in ("", "native") or torch.cuda.device_count() > 0:
        return
    nvcc = os.path.join(cuda_home, "bin", "nvcc")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    chosen = [capability for capability in known if f"compute_{capability.replace('.', '')}" in listed]
    if not chosen:
        sys.exit(f"pdl_ext: {nvcc} knows none of the architectures {' '.join(known)}; set TORCH_CUDA_ARCH_LIST")
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(chosen) + "+PTX"
    print(f"pdl_ext: no card is seen: built for {' '.join(chosen)} and later (TORCH_CUDA_ARCH_LIST chooses others)")


def extension_arguments() -> dict:
    find_toolkit()
    import torch
    from torch.utils import cpp_extension

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        sys.exit(f"pdl_ext: found PyTorch {torch.__version__}, expected 2.10 or later")
    with_cuda, status = choose_cuda(torch.version.cuda, cpp_extension.CUDA_HOME)
    print(f"pdl_ext: CUDA kernels {status}")
    import pybind11

    sources = glob.glob("csrc/*.cpp") + glob.glob("csrc/cpu/*.cpp")
    with open("build_flags.json") as file:
        flags = json.load(file)
    common = flags["common"] + (flags["with_cuda"] if with_cuda else [])
    make = cpp_extension.CppExtension
    if with_cuda:
        make = cpp_extension.CUDAExtension
        sources += glob.glob("csrc/cuda/*.cu")
        choose_architectures(cpp_extension.CUDA_HOME, flags["architectures"])
    extension = make(
        "pdl_ext._C",
        sorted(sources),
        include_dirs=[pybind11.get_include()],
        define_macros=[("PDL_EXT_CUDA_STATUS", f'"{status}"')],
        depends=[
            "build_flags.json",
            *glob.glob("csrc/**/*.h", recursive=True),
            *glob.glob("csrc/**/*.cuh", recursive=True),
        ],
        extra_compile_args={compiler: common + flags[compiler] for compiler in ("cxx", "nvcc")},
        extra_link_args=["-s"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


if __name__ == "__main__":
    # Without PyTorch there is nothing to compile, but an sdist can still be made.
    setup(**(extension_arguments() if find_torch() else {}))
