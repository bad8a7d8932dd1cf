"""The properties of this machine, and what it lacks for the check."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_compile

from gpu_check import ROOT
from gpu_check.check import last_lines, search_path

# As pyproject.toml asks for.
LEAST_SETUPTOOLS = 77
MODULES = ("numpy", "pybind11", "pytest", "safetensors", "setuptools")
NEEDS = "gpu-check needs a CUDA device, PyTorch built with CUDA, and nvcc"


def probe() -> dict[str, Any]:
    """What this machine is and what it lacks."""
    missing = [f"the Python package {name}" for name in MODULES if importlib.util.find_spec(name) is None]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("setuptools")
        if int(version.split(".")[0]) < LEAST_SETUPTOOLS:
            missing.append(f"setuptools {LEAST_SETUPTOOLS} or later (there is {version})")
    if shutil.which("ninja", path=search_path()) is None:
        missing.append("ninja")
    nvcc = cuda_compile.find_nvcc()
    if nvcc is None:
        missing.append("nvcc (set CUDA_HOME)")
    try:
        import torch
    except ImportError:
        return {"missing": ["PyTorch, so that no CUDA device can be looked for", *missing]}
    if torch.version.cuda is None:
        missing.append(f"PyTorch built with CUDA (torch {torch.__version__} was built without)")
    if not torch.cuda.is_available():
        missing.append("a CUDA device that PyTorch sees")
    if missing or nvcc is None:
        return {"missing": missing}
    import harness

    devices = range(torch.cuda.device_count())
    capabilities = sorted({torch.cuda.get_device_capability(device) for device in devices})
    return {
        "missing": [],
        **harness.machine(torch.device("cuda", 0)),
        "nvcc": f"{nvcc}, {nvcc_version(nvcc)}",
        "capabilities": [f"{major}.{minor}" for major, minor in capabilities],
    }


def of_a_dry_run() -> dict[str, Any]:
    """The CPU, under a name that no card has."""
    import harness
    import torch

    return {"missing": [], **harness.machine(torch.device("cpu")), "device": "no card: a dry run", "capabilities": []}


def nvcc_version(nvcc: Path) -> str:
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\S+),", output)
    return found[1] if found else last_lines(output)


def probe_in_a_process(dry: bool = False) -> dict[str, Any]:
    """The probe, where a driver that hangs costs no more than its time limit."""
    name = "of_a_dry_run" if dry else "probe"
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    try:
        result = subprocess.run(
            [sys.executable, "-c", f"import json; from gpu_check import machine; print(json.dumps(machine.{name}()))"],
            env={**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        return {"missing": ["a CUDA driver that answers within a minute"]}
    if result.returncode != 0:
        return {"missing": [f"a PyTorch that works: {last_lines(result.stderr)}"]}
    return json.loads(last_lines(result.stdout))


def default_folder(machine: dict[str, Any]) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"{device}-torch{machine['torch'].partition('+')[0]}"
