"""What `make wheel` finds in a wheel, and which Pythons it builds for."""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from wheels import __main__ as command_line
from wheels import build, contents

from pdl_ext import _C

ROOT = build.ROOT
MODULE = Path(_C.__file__)
NAME = re.fullmatch(r"_C\.cpython-(?P<number>\d+)-(?P<machine>\w+)-linux-gnu\.so", MODULE.name)
TAG = f"cp{NAME['number']}-cp{NAME['number']}" if NAME else ""

pytestmark = pytest.mark.skipif(NAME is None, reason="wheels are made on Linux alone")

METADATA = """Metadata-Version: 2.4
Name: pdl_ext
Version: 0.2.0
License-Expression: Apache-2.0
Requires-Python: >=3.10
Requires-Dist: torch>=2.10
Requires-Dist: numpy>=1.24
"""
INFO = "pdl_ext-0.2.0.dist-info"
PACKAGE = ("pdl_ext/__init__.py", "pdl_ext/py.typed", "pdl_ext/cli/explore/page.html")


@pytest.fixture
def sdist(tmp_path):
    path = tmp_path / "pdl_ext-0.2.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {"PKG-INFO": METADATA, **dict.fromkeys((*PACKAGE, "csrc/library.cpp"), "")}.items():
            (tmp_path / "file").write_text(text)
            archive.add(tmp_path / "file", f"pdl_ext-0.2.0/{name}")
    return path


def make_wheel(folder, platform="manylinux_2_34", version="0.2.0", metadata=METADATA, without=(), besides=()):
    files = dict.fromkeys((*PACKAGE, *besides, f"{INFO}/RECORD"), b"") | {f"{INFO}/METADATA": metadata.encode()}
    files[f"pdl_ext/{MODULE.name}"] = MODULE.read_bytes()
    path = folder / f"pdl_ext-{version}-{TAG}-{platform}_{NAME['machine']}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in files.keys() - set(without):
            archive.writestr(name, files[name])
    return path


def found_in(wheel, sdist, folder):
    return contents.faults(wheel, sdist, contents.extract_module(wheel, folder))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"version": "0.2.0+cu130", "metadata": METADATA.replace("0.2.0", "0.2.0+cu130")}, None),
        ({"platform": "linux"}, r"the platform of pdl_ext-.*linux_\w+\.whl is not manylinux"),
        ({"without": ["pdl_ext/cli/explore/page.html"]}, "pdl_ext/cli/explore/page.html is missing"),
        ({"besides": ["pdl_ext.libs/libgomp.so.1"]}, "pdl_ext.libs/libgomp.so.1 is no part of the package"),
        ({"besides": ["tests/conftest.py"]}, "tests/conftest.py is no part of the package"),
        ({"metadata": METADATA.replace("0.2.0", "0.1.0")}, "the version is 0.1.0, that of the sdist 0.2.0"),
        ({"metadata": METADATA.replace("torch>=2.10", "torch")}, "Requires-Dist is not the sdist's"),
        ({"metadata": METADATA.replace("3.10", "3.12")}, "Requires-Python is not the sdist's"),
    ],
)
def test_what_is_wrong_with_a_wheel_is_told(tmp_path, sdist, change, fault):
    found = found_in(make_wheel(tmp_path, **change), sdist, tmp_path)
    if fault is None:
        assert found == []
    else:
        assert len(found) == 1
        assert re.fullmatch(fault, found[0])


@pytest.mark.parametrize("tag", ["cp39-cp39-manylinux_2_34_{machine}", "{tag}-manylinux_2_34_riscv64"])
def test_a_module_of_another_python_or_machine_is_a_fault(tmp_path, sdist, tag):
    tag = tag.format(tag=TAG, machine=NAME["machine"])
    wheel = make_wheel(tmp_path).rename(tmp_path / f"pdl_ext-0.2.0-{tag}.whl")
    assert found_in(wheel, sdist, tmp_path) == [f"{MODULE.name} is not for {tag}"]


def test_the_module_needs_no_more_than_pytorchs_stable_abi():
    assert contents.foreign_symbols(MODULE) == []
    assert "libtorch_cpu.so" in contents.needed_libraries(MODULE)


def test_a_library_on_pytorchs_cpp_api_is_found_out(tmp_path, sdist):
    libshm = Path(torch.__file__).parent / "lib" / "libshm.so"
    foreign = contents.foreign_symbols(libshm)
    assert any(name.startswith("_ZN3c10") for name in foreign)
    found = contents.faults(make_wheel(tmp_path), sdist, libshm)
    assert f"libshm.so uses {foreign[0]}, which is no part of PyTorch's stable ABI" in found


def test_a_library_that_a_wheel_would_have_to_bring_is_a_fault(tmp_path, sdist, monkeypatch):
    monkeypatch.setattr(contents, "needed_libraries", lambda _: ["libc10.so", "libcudart.so.13", "libgomp.so.1"])
    assert found_in(make_wheel(tmp_path), sdist, tmp_path) == [
        f"{MODULE.name} needs libgomp.so.1 of neither PyTorch nor the system"
    ]


def test_architectures_are_listed_as_numbers_with_ptx_last():
    listing = """
Fatbin elf code:
ELF file    1: loss.1.sm_120.cubin
ELF file    2: loss.2.sm_75.cubin
ELF file    3: histogram.1.sm_75.cubin
ELF file    4: loss.3.sm_90a.cubin
PTX file    1: loss.1.sm_120.ptx
"""
    assert contents.architectures(listing) == ["sm_75", "sm_90a", "sm_120", "compute_120"]


def test_a_python_is_one_that_runs_and_is_of_its_version(tmp_path, monkeypatch):
    def program(path, prints, status=0):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho {prints}\nexit {status}")
        path.chmod(0o755)
        return path

    of_path = program(tmp_path / "bin" / "python3.10", "3.10")
    program(tmp_path / "bin" / "python3.12", "''", 127)  # A shim of pyenv whose version is not chosen.
    program(tmp_path / "bin" / "python3.13", "3.11")
    of_pyenv = program(tmp_path / "pyenv" / "versions" / "3.12.1" / "bin" / "python3.12", "3.12")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert build.interpreters() == {"3.10": of_path, "3.12": of_pyenv}


def test_one_python_that_fails_keeps_no_other_from_its_wheel(tmp_path, monkeypatch, capsys):
    wheel = make_wheel(tmp_path)

    def build_cpu(python, torch, sdist, tests):
        if python.name == "python3.10":
            raise build.Failure("pip ended with exit status 1")
        assert (torch, tests) == ("torch==2.13.0", ["-m", "not slow"])
        return build.Made(wheel, MODULE.stat().st_size, "5 passed")

    monkeypatch.setattr(build, "make_sdist", lambda output: output / "pdl_ext-0.2.0.tar.gz")
    monkeypatch.setattr(build, "build_cpu", build_cpu)
    monkeypatch.setattr(build, "program", lambda name, hint: name)
    options = ["cpu", "--torch", "torch==2.13.0", "--python", "python3.10", "python3.12", "--pytest=-m 'not slow'"]
    assert command_line.main(options) == 1
    printed = capsys.readouterr()
    assert printed.err == "pip ended with exit status 1\n"
    assert printed.out.splitlines()[-1] == (
        f"| `{wheel.name}` | {wheel.stat().st_size:,} | {MODULE.stat().st_size:,} | none | 5 passed |"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["cpu", "--torch", "torch", "--python", "python3.99"], "python3.99 was not found (--python takes names on"),
        (["aarch64", "--torch", "torch"], "aarch64-linux-gnu-g++ was not found (apt install g++-aarch64-linux-gnu)"),
        (["cuda", "--torch", "torch"], "cuobjdump was not found (it is part of the CUDA toolkit and of the package"),
    ],
)
def test_a_program_that_is_missing_is_named_before_anything_is_built(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "make_sdist", lambda output: output / "pdl_ext-0.2.0.tar.gz")
    monkeypatch.setattr(build, "_run", None)
    assert command_line.main(options) == 1
    assert capsys.readouterr().err.startswith(said)


def test_the_changelog_begins_with_the_version_of_the_package():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    heading = re.search(r"^## (\S+) \((\d{4}-\d{2}-\d{2})\)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert heading[1] == version[1]
