"""What a wheel holds: its names, its metadata, and what its compiled module needs of other libraries.

Nothing is unpacked but the module, and nothing is imported, so wheels of other systems can be looked at, too.
"""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Collection, Iterable
from email import message_from_bytes
from email.message import Message
from pathlib import Path

from packaging.tags import Tag
from packaging.utils import parse_wheel_filename

__all__ = ["architectures", "extract_module", "faults", "foreign_symbols", "metadata", "needed_libraries"]

# What PyTorch's package brings. Of CUDA's libraries the module links the runtime alone.
TORCH_LIBRARIES = (
    *("libc10.so", "libtorch.so", "libtorch_cpu.so"),
    *("libc10_cuda.so", "libtorch_cuda.so", "libcudart.so.*"),
)
# What every Linux of the platform tag brings.
SYSTEM_LIBRARY = re.compile(r"(libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|librt|ld-linux-[\w-]+)\.so\.\d+")
# Without a version: Python's names, PyTorch's stable ABI and the C++ library's. libc10.so exports some of the latter.
EXPECTED_SYMBOL = re.compile(r"_?Py\w+|(aoti_torch|torch)_[a-z]\w*|_Z(N[KRO]*|T[ISV]N?)?St\w+")
MODULE = re.compile(r"pdl_ext/_C\.cpython-(?P<python>\d+)-(?P<machine>\w+)-linux-gnu\.so")


def metadata(wheel: Path) -> Message:
    """The fields of a wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return message_from_bytes(archive.read(name))


def extract_module(wheel: Path, folder: Path) -> Path:
    """The wheel's compiled module, written into a folder."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = filter(MODULE.fullmatch, archive.namelist())
        return Path(archive.extract(name, folder))


def needed_libraries(module: Path) -> list[str]:
    """The shared libraries that a module asks the loader for."""
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _readelf(module, "--dynamic"))


def foreign_symbols(module: Path) -> list[str]:
    """The symbols that neither a versioned library, Python, the C++ library nor PyTorch's stable ABI defines."""
    undefined = re.findall(r" GLOBAL \w+ +UND (\S+)", _readelf(module, "--dyn-syms"))
    return sorted(name for name in undefined if "@" not in name and not EXPECTED_SYMBOL.fullmatch(name))


def architectures(listing: str) -> list[str]:
    """The architectures in what `cuobjdump --list-elf --list-ptx` prints, code before PTX: sm_90, compute_120."""
    found = set(re.findall(r"^ELF file.*\.(sm_\w+)\.cubin$", listing, flags=re.MULTILINE))
    found |= {f"compute_{number}" for number in re.findall(r"^PTX file.*\.sm_(\w+)\.ptx$", listing, flags=re.MULTILINE)}
    return sorted(found, key=lambda name: (not name.startswith("sm_"), int(re.sub(r"\D", "", name)), name))


def faults(wheel: Path, sdist: Path, module: Path) -> list[str]:
    """What keeps a wheel from being handed out, a line each.

    sdist: what it was built from; module: the wheel's compiled module, extracted.
    """
    with zipfile.ZipFile(wheel) as archive:
        held = [name for name in archive.namelist() if not name.endswith("/")]
    return [
        *_faults_of_names(wheel, module),
        *_faults_of_metadata(metadata(wheel), _metadata_of_sdist(sdist)),
        *_faults_of_files(held, _package_files(sdist)),
        *(f"{module.name} needs {name} of neither PyTorch nor the system" for name in _unknown_libraries(module)),
        *(f"{module.name} uses {name}, which is no part of PyTorch's stable ABI" for name in foreign_symbols(module)),
    ]


def _faults_of_names(wheel: Path, module: Path) -> Iterable[str]:
    tags: Collection[Tag] = parse_wheel_filename(wheel.name)[3]
    if not all(tag.platform.startswith("manylinux_") for tag in tags):
        yield f"the platform of {wheel.name} is not manylinux"
    name = MODULE.fullmatch(f"pdl_ext/{module.name}")
    for tag in tags:
        if name is None or tag.abi != f"cp{name['python']}" or not tag.platform.endswith(f"_{name['machine']}"):
            yield f"{module.name} is not for {tag}"


def _faults_of_metadata(found: Message, expected: Message) -> Iterable[str]:
    version = str(found["Version"]).partition("+")[0]
    if version != expected["Version"]:
        yield f"the version is {found['Version']}, that of the sdist {expected['Version']}"
    for field in ("Requires-Dist", "Requires-Python", "License-Expression"):
        if found.get_all(field) != expected.get_all(field):
            yield f"{field} is not the sdist's"


def _faults_of_files(held: Collection[str], package: Collection[str]) -> Iterable[str]:
    yield from (f"{name} is missing" for name in sorted(set(package) - set(held)))
    beside = [name for name in held if name not in package and not re.match(r"[^/]+\.dist-info/", name)]
    yield from (f"{name} is no part of the package" for name in beside if not MODULE.fullmatch(name))


def _unknown_libraries(module: Path) -> list[str]:
    torch = "|".join(re.escape(name).replace(r"\*", r"\d+") for name in TORCH_LIBRARIES)
    known = re.compile(f"{torch}|{SYSTEM_LIBRARY.pattern}")
    return [name for name in needed_libraries(module) if not known.fullmatch(name)]


def _metadata_of_sdist(sdist: Path) -> Message:
    with tarfile.open(sdist) as archive:
        (member,) = (member for member in archive if re.fullmatch(r"[^/]+/PKG-INFO", member.name))
        return message_from_bytes(archive.extractfile(member).read())


def _package_files(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    return {name for name in names if name.startswith("pdl_ext/")}


def _readelf(module: Path, what: str) -> str:
    command = ["readelf", "--wide", what, str(module)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout
